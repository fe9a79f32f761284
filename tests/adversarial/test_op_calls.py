"""The ops with right and wrong arguments, in memory whose neighbours are forbidden: right results, clear errors.

CATS_ADVERSARIAL_SEED=1 runs other calls; ``python -m tests.adversarial ops`` more of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adversarial.harness import columns_calls, op_calls, op_worker
from adversarial.harness.record import Record
from support.op_cases import to_device

CALLS = 600
SEED = int(os.environ.get("CATS_ADVERSARIAL_SEED", 0))


def test_op_calls():
    op_worker.run(CALLS, SEED).check()


@pytest.mark.gpu
def test_op_calls_on_a_gpu():
    """The same calls, without guarded memory; of ops that not every shape has only those that must be refused."""
    record = Record("op calls on a GPU", SEED)
    place = lambda t, at_end: to_device(t, "cuda")  # noqa: E731
    for number in range(CALLS):
        call = op_calls.make_call(number, SEED, place)
        if call.op.endswith("_step") and not call.spoilt:
            continue
        if "columns" in call.op and not call.spoilt and not columns_calls.fits_gpu(call.arguments):
            continue
        outcome, what = op_calls.run_case(number, SEED, place)
        record.add(outcome, f"{outcome}, call {number}: {what}" if what else None)
    torch.cuda.synchronize()
    record.check()


@pytest.mark.parametrize("at_end", [True, False])
def test_one_element_too_far_is_a_crash(at_end):
    code = (
        "import ctypes, torch; from adversarial.harness.guard_pages import Arena\n"
        f"arena = Arena(5000); t = arena.place(torch.randn(7, 3), {at_end})\n"
        "assert ctypes.string_at(t.data_ptr(), t.nbytes)\n"
        f"print('inside', flush=True); ctypes.string_at(t.data_ptr() + ({'t.nbytes' if at_end else '-1'}), 1)"
    )
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "inside\n" and done.returncode < 0, done.stderr


def test_a_wrong_result_is_seen(monkeypatch):
    """One element off by a thousandth, in the output or in the counts, and an argument that is written to."""
    real, place = op_calls.Call.run, lambda t, at_end: t

    def outcome_with(change):
        monkeypatch.setattr(op_calls.Call, "run", lambda call: change(call, real(call)))
        numbers = (
            n for n in range(400) if not (c := op_calls.make_call(n, SEED, place)).spoilt and c.op == "sparse_mlp"
        )
        return {op_calls.run_case(n, SEED, place)[0] for n in list(numbers)[:10]}

    assert outcome_with(lambda call, y: y) == {"right"}
    assert "wrong" in outcome_with(lambda call, y: y + 0.01)
    assert "wrong" in outcome_with(lambda call, y: (call.arguments["x"].add_(1), y)[1])
