"""Ctrl-C at any line leaves the old or the new state, and the operation works when it is called again.

A sample of the lines; ``python -m tests.adversarial interrupts`` takes all of them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from adversarial.harness.interrupts import InterruptAt, sweep
from adversarial.harness.operations import Workplace
from adversarial.harness.record import Record

from cats_ext import CatsConfig
from cats_ext.patching.apply import sparse_mlps

LINES = 40
SLOW = {"calibrate": 8, "model.save_pretrained": 16}  # operations that take long
SEED = int(os.environ.get("CATS_ADVERSARIAL_SEED", 0))
NAMES = [
    *("apply_cats", "remove_cats", "set_sparsity", "masking_disabled", "track_sparsity as a context", "track_sparsity"),
    *("config.save_pretrained over another config", "config.save_pretrained into an empty directory"),
    *("model.save_pretrained over the other checkpoint", "model.save_pretrained over the other dense checkpoint"),
    *("model.save_pretrained into an empty directory", "calibrate"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("interrupts"))


@pytest.fixture(scope="module")
def operations(workplace):
    return {operation.name: operation for operation in workplace.operations()}


def test_no_operation_is_left_out(operations):
    assert list(operations) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_old_or_new(operations, name):
    record = Record("interrupts", SEED)
    sweep(operations[name], SEED, SLOW.get(name.split()[0], LINES), record)
    record.check()


def test_a_half_changed_state_is_seen(workplace, operations):
    """Thresholds that are set layer by layer, without a way back."""
    sparser = workplace.config.at_sparsity(0.8)

    def set_carelessly():
        for module in sparse_mlps(workplace.model).values():
            module.set_thresholds(sparser)

    record = Record("interrupts", SEED)
    sweep(replace(operations["set_sparsity"], run=set_carelessly), SEED, None, record)
    assert record.counts["neither"] > 0 and record.counts["old"] > 0


def test_every_line_is_reached():
    seen = set()
    for n in range(3):
        interrupt = InterruptAt(n)
        with pytest.raises(KeyboardInterrupt), interrupt:
            CatsConfig.from_pretrained("nothing")
        seen.add(interrupt.where)
    assert len(seen) == 3
