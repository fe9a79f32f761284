"""What a run of the harness counts and finds, and the log that it writes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cats_ext
from bench.lib import machine

_ROOT = Path(__file__).resolve().parents[3]
REFUSED, OBSCURE = "refused clearly", "refused obscurely"
UNCHANGED, CHANGED = "accepted unchanged", "accepted changed"
CLEAR_TYPES = (ValueError, TypeError, OSError)
# What Python, torch and C++ say of themselves and not of an argument or a file.
_INTERNAL = re.compile(
    r"object has no attribute|object is not|__\w+__|not subscriptable|unsupported operand|not supported between"
    r"|indices must be|index out of range|recursion|Traceback|Exception raised from|\.(cpp|cu|h|inl\.h|cuh|py)\b"
    r"|API call failed|digits\) for integer|cannot be converted|too large to convert|Overflow"
)
_LONGEST = 700  # characters of one sentence, two paths and two hashes included


def same_package() -> dict[str, str]:
    """The environment of a process that finds this process' cats_ext, which may be installed, before the sources."""
    paths = (Path(cats_ext.__file__).parents[1], _ROOT / "tests", os.environ.get("PYTHONPATH", ""), _ROOT)
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def is_clear(message: str, names: tuple[str, ...]) -> bool:
    """Whether ``message`` is one short line that has one of ``names`` in it and nothing of the library's inside."""
    one_line = "\n" not in message.strip() and 0 < len(message) <= _LONGEST
    return one_line and not _INTERNAL.search(message) and any(name in message for name in names)


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]!r}"


def _without_paths(text: str) -> str:
    """``text`` without what differs from machine to machine."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}(/pytest-of-[^/]+/pytest-\d+)?/[\w.-]+", "PLACE", text)
    return text.replace(str(machine.ROOT), ".")


@dataclass
class Record:
    """Counts by outcome, and a line for each failure that is enough to run its case again."""

    subject: str
    seed: int
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, outcome: str, failure: str | None = None) -> None:
        self.counts[outcome] += 1
        if failure is not None:
            self.failures.append(failure)

    def lines(self, most: int = 20) -> list[str]:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        head = f"{self.subject}, seed {self.seed}: {sum(self.counts.values())} cases, {len(self.failures)} failures"
        seconds = time.perf_counter() - self.started
        left_out = [f"  and {len(self.failures) - most} more"] if len(self.failures) > most else []
        lines = [f"{head}; {counts}; {seconds:.0f} s", *(f"  {line}" for line in self.failures[:most]), *left_out]
        return [_without_paths(line) for line in lines]

    def check(self) -> None:
        """Fail the test that made this record if it holds a failure."""
        assert not self.failures, "\n".join(self.lines())


def facts(device: str = "cpu") -> str:
    """Device, versions, commit and date, in one line."""
    packages = ("transformers", "safetensors")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return ", ".join(f"{key} {value}" for key, value in (machine.facts(device) | versions).items())


def write_log(path: Path, records: list[Record], device: str = "cpu") -> None:
    lines = [facts(device), *(line for record in records for line in record.lines(most=200))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
