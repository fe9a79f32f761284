"""Memory that runs out at any large allocation of ``apply_cats`` and ``remove_cats`` leaves the old or the new state.

On the CPU, with allocations that fail from the n-th one on; ``test_gpu_memory.py`` fills a real GPU.
"""

from __future__ import annotations

import pytest
import torch
from adversarial.harness.interrupts import differences
from adversarial.harness.operations import model_state
from support.models import tiny_model
from support.patched import config_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cats_ext import apply_cats, remove_cats

SIZES = {"hidden_size": 64, "intermediate_size": 512}
LARGE = 64 * 512 * 4  # bytes of a down projection's weight

pytestmark = pytest.mark.usefixtures("one_thread")


class MemoryRunsOut(TorchDispatchMode):
    """Inside, new tensors of ``LARGE`` bytes or more cannot be had from the n-th on: one of them, or all."""

    def __init__(self, n: int, once: bool) -> None:
        super().__init__()
        self.n, self.once, self.count = n, once, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        there = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            new = isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.untyped_storage()._cdata not in there
            if new and t.untyped_storage().nbytes() >= LARGE:
                self.count += 1
                if self.count == self.n + 1 or (self.count > self.n and not self.once):
                    raise torch.OutOfMemoryError("out of memory")
        return result


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("operation", ["apply_cats", "remove_cats"])
def test_old_or_new(operation, once):
    model = tiny_model(**SIZES)
    config = config_for(model)
    dense = model_state(model)
    patched = model_state(apply_cats(model, config))

    def run():
        return apply_cats(model, config) if operation == "apply_cats" else remove_cats(model)

    old, new = (dense, patched) if operation == "apply_cats" else (patched, dense)
    failed = 0
    for n in range(20):
        if (not differences(model_state(model), dense)) == (operation == "remove_cats"):
            apply_cats(model, config) if operation == "remove_cats" else remove_cats(model)
        try:
            with MemoryRunsOut(n, once):
                run()
        except torch.OutOfMemoryError:
            failed += 1
        else:
            break
        state = model_state(model)
        from_old, from_new = differences(state, old), differences(state, new)
        assert from_old == [] or from_new == [], f"allocation {n}"
        if from_new:
            run()
        again = differences(model_state(model), new)
        assert again == []
    assert failed >= 1
