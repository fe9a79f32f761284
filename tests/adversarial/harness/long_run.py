"""The long form of the adversarial tests: the arguments of ``python -m tests.adversarial``."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from adversarial.harness import altered_files, commands, op_worker
from adversarial.harness.checkpoints import make_checkpoints
from adversarial.harness.interrupts import sweep
from adversarial.harness.operations import Workplace
from adversarial.harness.record import Record, write_log
from support.saved_model import save_tiny_model

CASES = {"files": 10_000, "ops": 10_000, "interrupts": 600}


def run_files(cases: int, seed: int, place: Path) -> Record:
    return altered_files.run(cases, seed, make_checkpoints(place / "checkpoints"), place / "altered")


def run_ops(cases: int, seed: int, place: Path) -> Record:
    return op_worker.run(cases, seed)


def run_interrupts(cases: int, seed: int, place: Path) -> Record:
    """At most so many lines of each operation; most have fewer."""
    record = Record("interrupts", seed)
    for operation in Workplace(place / "interrupts").operations():
        sweep(operation, seed, cases, record)
    return record


def run_commands(cases: int, seed: int, place: Path) -> Record:
    save_tiny_model(place / "model")
    (place / "text.txt").write_text("the cat sat on a mat and saw it " * 60)
    record = Record("command lines", seed)
    paths = {"place": str(place / "place"), "model": str(place / "model"), "text": str(place / "text.txt")}
    commands.run(paths, record)
    for command, output in commands.UNWRITABLE:
        wrong = commands.run_unwritable(command, output)
        failure = f"cats {' '.join(command)}, standard output {output}: {wrong}" if wrong else None
        record.add("ends badly" if wrong else "ends well without an output", failure)
    return record


SUBJECTS = {"files": run_files, "ops": run_ops, "interrupts": run_interrupts, "commands": run_commands}


def main() -> int:
    """The exit code: 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.adversarial", description=__doc__.partition("\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; all without any")
    parser.add_argument("--cases", type=int, help=f"of each subject; without it {CASES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file to write counts and failures to")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"SUBJECT must be of {', '.join(SUBJECTS)}, got '{unknown[0]}'")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    records: list[Record] = []
    for subject in arguments.subjects or SUBJECTS:
        with tempfile.TemporaryDirectory() as place:
            cases = arguments.cases or CASES.get(subject, 0)
            records.append(SUBJECTS[subject](cases, arguments.seed, Path(place)))
        print("\n".join(records[-1].lines()), flush=True)
        if arguments.log is not None:
            write_log(arguments.log, records)
    return int(any(record.failures for record in records))
