"""Runs calls of the ops in a process of its own, in guarded memory, so that a crash is seen and the rest goes on.

``python op_worker.py FIRST END SEED`` prints the number of each call before it is made, and its
outcome after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from adversarial.harness.record import Record, same_package

_MOST_CRASHES = 20


def run(count: int, seed: int, first: int = 0) -> Record:
    """``count`` calls from number ``first`` on, in as many processes as there are crashes, and one."""
    record = Record("op calls", seed)
    number, end = first, first + count
    while number < end and record.counts["crash"] < _MOST_CRASHES:
        command = [sys.executable, __file__, *map(str, (number, end, seed))]
        done = subprocess.run(command, capture_output=True, text=True, env=same_package())
        for line in done.stdout.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "call":
                number = int(rest)
            elif kind == "outcome":
                outcome, what = json.loads(rest)
                record.add(outcome, f"{outcome}, call {number}: {what}" if what else None)
        if done.returncode < 0:
            record.add("crash", f"crash by signal {-done.returncode}, call {number}: {call_in_words(number, seed)}")
        elif done.returncode:
            raise RuntimeError(f"the worker failed at call {number}:\n{done.stderr[-2000:]}")
        number += 1
    return record


def call_in_words(number: int, seed: int) -> str:
    from adversarial.harness.op_calls import make_call

    return str(make_call(number, seed, lambda t, at_end: t))


def main(first: int, end: int, seed: int) -> None:
    import warnings

    import torch
    from adversarial.harness.guard_pages import Arenas
    from adversarial.harness.op_calls import LARGEST, run_case

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arenas = Arenas(LARGEST)
    for number in range(first, end):
        os.write(1, f"call {number}\n".encode())
        arenas.reset()
        os.write(1, f"outcome {json.dumps(run_case(number, seed, arenas.place))}\n".encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
