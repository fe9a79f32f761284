"""KeyboardInterrupt at the n-th line that an operation executes, for every n: it must leave the old or the new state.

Lines are those of cats_ext, and where files are written also those of transformers, safetensors, json and shutil that
it calls. After each interrupt the operation is called again and must work.
"""

from __future__ import annotations

import json.encoder
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from adversarial.harness.record import Record
from torch import Tensor

import cats_ext

_OWN = str(Path(cats_ext.__file__).parent) + "/"
FILE_CODE = (
    *(transformers.modeling_utils.__file__, safetensors.torch.__file__, shutil.__file__),
    *(json.encoder.__file__, json.__file__),
)


class InterruptAt:
    """Inside, raises KeyboardInterrupt before line number ``n`` of the traced files is executed, once."""

    def __init__(self, n: int | None, more_files: tuple[str, ...] = ()) -> None:
        self.n, self.more_files = n, more_files
        self.lines: list[tuple[str, int]] = []  # file and number of each line that was executed
        self.where = ""

    def _call(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        name = frame.f_code.co_filename
        return self._line if name.startswith(_OWN) or name in self.more_files else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable:
        if event == "line":
            code = frame.f_code
            if len(self.lines) == self.n:
                name = getattr(code, "co_qualname", code.co_name)  # in Python 3.10 the second only
                self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} in {name}"
                sys.settrace(None)
                raise KeyboardInterrupt
            self.lines.append((code.co_filename, frame.f_lineno))
        return self._line

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


State = dict[str, Any]  # plain values, tensors, and lists of tensors


def differences(a: State, b: State) -> list[str]:
    """The entries in which two states differ."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)
        if isinstance(x, list) and isinstance(y, list):
            return len(x) == len(y) and all(map(same, x, y))
        return type(x) is type(y) and x == y

    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key]))


@dataclass
class Operation:
    """One operation under interrupts.

    Attributes:
        name: of the public function.
        prepare: makes the old state, in place; called before each run.
        run: the operation; it works from the old state and from the new one.
        state: what can be seen of the state, old or new.
        more_files: beside cats_ext's, the files whose lines count.
        may_be: whether a state is as good as the old and the new one.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[], Any]
    state: Callable[[], State]
    more_files: tuple[str, ...] = ()
    may_be: Callable[[State], bool] = field(default=lambda state: False)


def _lines_of(operation: Operation) -> tuple[State, State, list[tuple[str, int]]]:
    """The old state, the new one, and the lines between them."""
    operation.prepare()
    operation.run()  # once before: what is imported or cached at the first call is no part of it
    operation.prepare()
    old = operation.state()
    with InterruptAt(None, operation.more_files) as counter:
        operation.run()
    return old, operation.state(), counter.lines


def sweep(operation: Operation, seed: int, most: int | None, record: Record) -> None:
    """Interrupt ``operation`` at all lines that it executes, or at ``most`` of them by ``seed``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old, new, lines = _lines_of(operation)
        for n in range(len(lines)) if most is None else _sample(lines, random.Random(seed), most):
            outcome, failure = _interrupted(operation, n, old, new)
            record.add(outcome, None if failure is None else f"{operation.name}, line {n} of {len(lines)}, {failure}")


def _sample(lines: list[tuple[str, int]], r: random.Random, most: int) -> list[int]:
    """Numbers of ``lines``: first a turn of each line of source, three of cats_ext's for one of others, then any."""
    turns: dict[tuple[str, int], list[int]] = {}
    for n, place in enumerate(lines):
        turns.setdefault(place, []).append(n)
    own = [r.choice(numbers) for (name, _), numbers in turns.items() if name.startswith(_OWN)]
    others = [r.choice(numbers) for (name, _), numbers in turns.items() if not name.startswith(_OWN)]
    r.shuffle(own)
    r.shuffle(others)
    share = most - min(len(others), most // 4)
    chosen = own[:share] + others[: most - min(share, len(own))]
    rest = sorted({*range(len(lines))} - {*chosen})
    return sorted(chosen + r.sample(rest, min(len(rest), most - len(chosen))))


def _interrupted(operation: Operation, n: int, old: State, new: State) -> tuple[str, str | None]:
    operation.prepare()
    interrupt = InterruptAt(n, operation.more_files)
    try:
        with interrupt:
            operation.run()
        return "not reached", None  # caches made this run shorter than the first
    except KeyboardInterrupt:
        pass
    except BaseException as error:
        if not interrupt.where.startswith("shutil.py"):  # whose own clean-up may close a file twice
            return "another error", f"{interrupt.where}: {type(error).__name__}: {str(error)[:200]}"
    try:
        state = operation.state()
    except Exception as error:
        return "unusable", f"{interrupt.where}: afterwards {type(error).__name__}: {str(error)[:200]}"
    from_old, from_new = differences(state, old), differences(state, new)
    failure = None
    if from_old and from_new and not operation.may_be(state):
        failure = f"{interrupt.where}: neither old ({_shown(from_old)} differ) nor new ({_shown(from_new)} differ)"
    outcome = "neither" if failure else "new" if not from_new else "old"
    try:
        if from_old and from_new:
            operation.prepare()
        operation.run()
        again = differences(operation.state(), new)
    except BaseException as error:
        return "cannot be repeated", failure or f"{interrupt.where}: again, {type(error).__name__}: {str(error)[:200]}"
    if again and not failure:
        return "cannot be repeated", f"{interrupt.where}: called again, {_shown(again)} differ from the new state"
    return outcome, failure


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
