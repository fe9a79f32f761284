"""Command lines of ``cats`` with absurd values: refused before any work, by a sentence that names option and value.

No model is loaded: what gets that far has accepted the value.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from adversarial.harness.record import Record, is_clear, same_package
from support.cli_runner import cats

from cats_ext.cli import models
from cats_ext.cli.commands import bench

FLOATS = ("abc", "", "0,5", "nan", "inf", "-inf", "1e400", "--")
SHARES = (*FLOATS, "-0.1", "1", "1.5", "-1e-9")
COUNTS = ("0", "-1", "1.5", "abc", "", "1e3", "nan")
HUGE = (str(10**30), str(-(10**30)))
DEVICES = ("tpu", "", "cuda:99", "cuda:-1", "meta", "cpu:0:0", "CPU ", "mps")
DTYPES = ("int8", "", "FLOAT32", "float64")
MISSING = "{place}/nothing"


class ModelLoaded(BaseException):
    """A model was about to be loaded, or timed: the command has begun its work."""


@dataclass(frozen=True)
class CommandLine:
    """A command and an option with an absurd value; ``{place}``, ``{model}`` and ``{text}`` stand for paths."""

    arguments: tuple[str, ...]
    option: str
    value: str

    def words(self, paths: dict[str, str]) -> list[str]:
        given = [*self.arguments, f"{self.option}={self.value}"] if self.option.startswith("--") else [*self.arguments]
        return [word.format(**paths) for word in given]

    def __str__(self) -> str:
        return f"cats {' '.join(self.arguments)} {self.option}={self.value!r}"


_CALIBRATE = ("calibrate", "{model}", "--text", "{text}", "-o", "{place}/new")
_QUANTIZE = ("quantize", "{model}", "-o", "{place}/new")
_GENERATE = ("generate", "{model}", "--prompt", "a cat")
_EVAL = ("eval", "{model}", "--text", "{text}")
_FINETUNE = ("finetune", "{model}", "--text", "{text}", "-o", "{place}/tuned")
_BAD_TEXTS = (
    MISSING,
    "{place}",
    "{place}/empty.txt",
    "{place}/bytes.txt",
    "{place}/bad.jsonl",
    "{place}/bad.txt.gz",
    "",
)
_BAD_DIRECTORIES = (
    "{place}/file",
    "{place}/file/new",
    "/proc/new",
    "/dev/null",
    "/dev/null/new",
    "{place}/" + "x" * 300,
)
_BAD_CONFIGS = (MISSING, "{place}", "{place}/file")

TABLE: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (_CALIBRATE, "--sparsity", SHARES),
    (_CALIBRATE, "--budget", (*FLOATS, "0", "0.3", "1.01", "-1")),
    (_CALIBRATE, "--rule", ("best", "", "PLAIN")),
    (_CALIBRATE, "--down-sparsity", SHARES),
    (_CALIBRATE, "--gate-power", (*FLOATS, "-0.1", "1.1")),
    (_CALIBRATE, "--last-gate-power", (*FLOATS, "-0.1", "1.1")),
    (_CALIBRATE, "--importance", ("most", "")),
    (_CALIBRATE, "--allocation", ("best", "")),
    (_CALIBRATE, "--spread", (*FLOATS, "0", "-1", "1.5")),
    (_CALIBRATE, "--max-tokens", COUNTS),
    (_CALIBRATE, "--sequence-length", COUNTS),
    (_CALIBRATE, "--batch-size", COUNTS),
    (_CALIBRATE, "--seed", ("1.5", "abc", "", *HUGE, str(2**64))),
    (_CALIBRATE, "--device", DEVICES),
    (_CALIBRATE, "--dtype", DTYPES),
    (_CALIBRATE, "--checkpoint", ("/tmp", "{place}", "/proc/new", "/dev/null/new", "{place}/file/new")),
    (("calibrate", "{model}", "--text", "{text}"), "--output", _BAD_DIRECTORIES),
    (("calibrate", "{model}", "-o", "{place}/new"), "--text", _BAD_TEXTS),
    *((_QUANTIZE, option, ("int3", "", "INT4", "int4_g16")) for option in ("--weights", "--gate", "--up", "--down")),
    (_QUANTIZE, "--group-size", (*COUNTS, "16", "256")),
    (_QUANTIZE, "--scope", ("best", "")),
    (_QUANTIZE, "--text", _BAD_TEXTS),
    (_QUANTIZE, "--max-tokens", COUNTS),
    (_QUANTIZE, "--sequence-length", COUNTS),
    (_QUANTIZE, "--seed", ("1.5", "abc", "", *HUGE, str(2**64))),
    (_QUANTIZE, "--device", DEVICES),
    (_QUANTIZE, "--dtype", DTYPES),
    (("quantize", "{model}"), "--output", _BAD_DIRECTORIES),
    (_GENERATE, "--sparsity", SHARES),
    (_GENERATE, "--cats", _BAD_CONFIGS),
    (_GENERATE, "--max-new-tokens", (*COUNTS, *HUGE)),
    (_GENERATE, "--temperature", (*FLOATS, "-1", "1e-40", "-1e-9")),
    (_GENERATE, "--seed", ("1.5", "abc", "", *HUGE, str(2**64))),
    (_GENERATE, "--device", DEVICES),
    (_GENERATE, "--dtype", DTYPES),
    (("generate", "{model}"), "--prompt", ("", "  ", "\n")),
    (("chat", "{model}"), "--sparsity", SHARES),
    (("chat", "{model}"), "--max-new-tokens", COUNTS),
    (("chat", "{model}"), "--context", (*COUNTS, "15")),
    (("chat", "{model}"), "--temperature", (*FLOATS, "-1", "1e-40")),
    (("chat", "{model}"), "--seed", ("abc", *HUGE, str(2**64))),
    (("chat", "{model}"), "--cats", _BAD_CONFIGS),
    (("eval", "{model}"), "--text", _BAD_TEXTS),
    (("eval", "{model}"), "--set", ("nosuch", "WIKITEXT2")),
    (_EVAL, "--cats", _BAD_CONFIGS),
    (_EVAL, "--curve", ("1", "0.5,2", "x", ",", "nan", "0.5,,0.6", "-0.1", "inf")),
    (("eval", "{model}"), "--tasks", ("nosuch", ",", "arc_easy,nosuch", "../x")),
    (("eval", "{model}", "--tasks", "arc_easy"), "--task-data", (MISSING, "{place}", "{place}/file")),
    (_EVAL, "--limit", COUNTS),
    (_EVAL, "--batch-size", COUNTS),
    (_EVAL, "--window", (*COUNTS, "1")),
    (_EVAL, "--max-windows", COUNTS),
    (_EVAL, "--output", ("{place}", "{place}/file/new", "/proc/new", "/dev/null/new")),
    (_EVAL, "--device", DEVICES),
    (("finetune", "{model}", "-o", "{place}/tuned"), "--text", _BAD_TEXTS),
    (("finetune", "{model}", "--text", "{text}"), "--output", _BAD_DIRECTORIES),
    (_FINETUNE, "--sparsity", SHARES),
    (_FINETUNE, "--method", ("best", "")),
    (_FINETUNE, "--cats", _BAD_CONFIGS),
    (_FINETUNE, "--steps", (*COUNTS, *HUGE)),
    (_FINETUNE, "--lora-rank", COUNTS),
    (_FINETUNE, "--learning-rate", (*FLOATS, "-1", "0")),
    (_FINETUNE, "--batch-size", COUNTS),
    (_FINETUNE, "--sequence-length", (*COUNTS, "1")),
    (_FINETUNE, "--save-every", COUNTS),
    (_FINETUNE, "--report-to", ("nosuch", "tensorboard,nosuch")),
    (_FINETUNE, "--seed", ("abc", "", "-1", *HUGE, str(2**64))),
    (("bench",), "--shape", ("", "x", "5", "0x0", "-1x5", "1.5x2", "axb", "4096x", "nosuch")),
    (("bench",), "--shape", ("1000000000x1000000000", "99999999999999999999x99999999999999999999", "1x1000000000000")),
    (("bench",), "--sparsity", ("", "x", ",", "nan", "0.5,2", "-1", "1")),
    (("bench",), "--tokens", (*COUNTS, *HUGE, str(10**12))),
    (("bench",), "--passes", (*COUNTS, *HUGE)),
    (("bench",), "--device", DEVICES),
    (("bench",), "--dtype", DTYPES),
    (("report",), "", (MISSING, "{place}", "{place}/file")),
    (("demo",), "--sparsity", SHARES),
    (("demo",), "--text", _BAD_TEXTS),
    (("demo",), "--max-new-tokens", (*COUNTS, "1")),
    (("demo",), "--device", DEVICES),
    (("demo",), "--output", ("{place}/file/new", "/proc/new", "/dev/null/new", "{place}/file")),
)
NO_JSON = ("chat", "report")  # commands that print no JSON


def command_lines(most: int | None = None, seed: int = 0) -> Iterator[CommandLine]:
    """All of them, or at most so many values of each option, chosen by ``seed``."""
    r = random.Random(seed)
    for arguments, option, values in TABLE:
        for value in values if most is None else r.sample(values, min(most, len(values))):
            if option:
                yield CommandLine(arguments, option, value)
            else:
                yield CommandLine((*arguments, value), "", value)


def make_place(place: Path) -> None:
    """The files that the command lines name."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "file").write_text("not what it should be")
    (place / "empty.txt").touch()
    (place / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (place / "bad.jsonl").write_text('{"text": "one"}\n{"text": 5}\n')
    (place / "bad.txt.gz").write_bytes(gzip.compress(b"text" * 500)[:-9])


@contextmanager
def no_work() -> Iterator[None]:
    """Inside, loading a model and timing the op raise ModelLoaded."""

    def loaded(*_: object, **__: object) -> None:
        raise ModelLoaded

    @contextmanager
    def status(message: str) -> Iterator[object]:
        yield loaded  # the benchmark calls it before each step

    with (
        mock.patch.object(models, "load_model", loaded),
        mock.patch.object(models, "obtain", loaded),
        mock.patch.object(bench, "status", status),
    ):
        yield


def run(paths: dict[str, str], record: Record, most: int | None = None) -> None:
    """The command lines of the table, with --json where there is one; those that leave files behind fail too."""
    place = Path(paths["place"])
    make_place(place)
    before = sorted(place.iterdir())
    for line in command_lines(most, record.seed):
        with_json = line.arguments[0] not in NO_JSON
        outcome, why = run_line(line, paths, with_json)
        new = [path for path in sorted(place.iterdir()) if path not in before]
        if not why and new:
            outcome, why = "left files", ", ".join(path.name for path in new)
        before += new
        record.add(outcome, f"{outcome}: {line}{' --json' if with_json else ''}: {why}" if why else None)


def run_line(line: CommandLine, paths: dict[str, str], with_json: bool = False) -> tuple[str, str]:
    """The outcome, and what is wrong with it."""
    try:
        with no_work():
            result = cats(*line.words(paths), *(["--json"] if with_json else []))
    except ModelLoaded:
        return "accepted", "the work began"
    value, option = line.value.format(**paths), line.option
    shown = " ".join(re.sub("[\u2500-\u257f]", " ", result.stderr).split())  # without a frame
    if result.exit_code not in (1, 2):
        return "accepted", f"exit code {result.exit_code}, {result.exception!r}"
    if "Traceback" in result.output or "defect" in shown:
        return "refused obscurely", shown[-300:]
    if result.exit_code == 1:
        head, _, message = result.stderr.partition("error: ")
        if head.strip() or not is_clear(message, _names(option, value)):
            return "refused obscurely", result.stderr[-300:]
    is_path = "/" in value and value in shown
    if not is_path and not any(name in shown for name in _names(option, "")):
        return "refused obscurely", f"names no {option}: {shown[-200:]}"
    by_typer = result.exit_code == 2 and "Input should be" in shown  # some versions do not show what is no number
    if not by_typer and not any(form in shown for form in _forms(value)):
        return "refused obscurely", f"names no value {value!r}: {shown[-200:]}"
    if not with_json:
        return ("refused clearly", "") if not result.stdout else ("refused obscurely", "standard output is not empty")
    try:
        document = json.loads(result.stdout)
    except json.JSONDecodeError:
        return "no JSON", f"standard output is {result.stdout[:100]!r}"
    if list(document) != ["error"] or not isinstance(document["error"], str) or document["error"] not in shown:
        return "no JSON", f"{result.stdout[:200]!r} is not the error on standard error"
    return "refused clearly", ""


def _names(option: str, value: str) -> tuple[str, ...]:
    """How a message may name the option: as such, or as the argument of the function that is called."""
    bare = option.removeprefix("--")
    names = (option, bare.replace("-", "_"), bare) if option else ("directory", "DIRECTORY")
    return (*names, value) if value else names


def _forms(value: str) -> list[str]:
    """How a message may show the value: as it was typed, without spaces at its ends, or as the number it is."""
    forms = [value.strip(), repr(value)] if value.strip() else ["''", "'.'", "empty", repr(value)]
    for kind in (int, float):
        try:
            forms.append(str(kind(value)))
        except (ValueError, OverflowError):
            continue
    return [" ".join(form.split()) for form in forms] + [part for part in value.split(",") if part]


# --- standard output that cannot be written ---------------------------------------------------------------------------

OUTPUTS = ("closed", "full", "broken pipe")
UNWRITABLE = tuple(
    (command, output)
    for command in (
        ("env",),
        ("env", "--json"),
        ("--help",),
        ("--version",),
        ("bench", "--shape", "64x64", "--passes", "1"),
    )
    for output in OUTPUTS
)


def run_unwritable(command: tuple[str, ...], output: str) -> str:
    """What is wrong with how ``cats`` ends when standard output is such; empty if nothing is."""
    program = [sys.executable, "-c", "from cats_ext.cli import main; main()", *command]
    # Not in the current folder, which -c would look for cats_ext in first.
    where = {"env": same_package() | {"CATS_DEBUG": "0"}, "cwd": os.sep, "stderr": subprocess.PIPE, "text": True}
    if output == "closed":
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", *program]
        done = subprocess.run(shell, **where)
    elif output == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(program, stdout=full, **where)
    else:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(program, stdout=write, **where)
        os.close(write)
    said = done.stderr.strip().splitlines()
    if "Traceback" in done.stderr or "Exception ignored" in done.stderr:
        return f"exit code {done.returncode}: {done.stderr[-300:]!r}"
    if done.returncode == 0 and output == "full":
        return "exit code 0, though nothing was written"
    errors = [line for line in said if line.startswith("error: ")]
    if done.returncode == 1 and output != "broken pipe" and len(errors) != 1:
        return f"exit code 1 with {len(errors)} errors: {done.stderr[-300:]!r}"
    return "" if done.returncode in (0, 1, 141, -13) else f"exit code {done.returncode}: {done.stderr[-300:]!r}"
