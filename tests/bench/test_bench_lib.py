"""Result files are whole after every row and carry the facts of the run; turns alternate; thresholds are exact."""

from __future__ import annotations

import pytest
import torch

from bench.lib import machine
from bench.lib.layers import Layer
from bench.lib.results import ResultFile, read_rows
from bench.lib.timing import in_turns


def test_rows_are_appended_with_the_facts_of_their_run(tmp_path):
    path = tmp_path / "new" / "results.csv"
    ResultFile(path, {"commit": "a"}).add({"us": 1.23456, "n": 1}, {"us": 2.0, "n": 2})
    later = ResultFile(path, {"commit": "b", "driver": "c"}, append=True, digits=3)
    later.add({"n": 3, "us": 1.23456})
    assert read_rows(path) == [
        {"us": "1.23456", "n": "1", "commit": "a", "driver": ""},
        {"us": "2.0", "n": "2", "commit": "a", "driver": ""},
        {"us": "1.23", "n": "3", "commit": "b", "driver": "c"},
    ]
    ResultFile(path, {}).add({"n": 4})
    assert read_rows(path) == [{"n": "4"}]
    assert list(path.parent.iterdir()) == [path]


def test_facts_of_every_row():
    assert list(machine.facts("cpu", "abc")) == ["device", "torch", "commit", "date"]
    assert machine.facts("cuda", name="a card").keys() == {"device", "driver", "torch", "commit", "date"}


def test_turns_alternate_and_leave_out_the_warm_up():
    calls = []
    found = in_turns("ab", lambda thing: calls.append(thing) or len(calls), rounds=2, warmup=1)
    assert calls == list("ababab") and found == [[3, 5], [4, 6]]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 60), (0.5, 30), (0.95, 3)])
def test_thresholds_skip_the_stated_share(sparsity, kept):
    torch.manual_seed(0)
    layer = Layer.random(torch.randn(3, 16), 20)
    mask = layer.value >= layer.threshold(sparsity)
    assert int(mask.sum()) == kept
    assert layer.rows_kept(sparsity) == pytest.approx(float(mask.any(0).sum()) / 20)
