"""The quality benchmark's variants, and how its parts are joined."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.lib.results import read_rows
from bench.quality import merge
from bench.quality.sweep_variants import GATE_WEIGHTS, Sample, Variant


@pytest.fixture
def sample():
    v, u, rows = torch.randn(3, 2, 100, 24, generator=torch.Generator().manual_seed(0)).unbind()
    return Sample(v * torch.linspace(0.1, 3, 24), u, rows, torch.randn(8, 24))


@pytest.mark.parametrize("down_weight", ["none", "norm", "fisher"])
def test_every_gate_weight_reaches_both_targets(sample, down_weight):
    for name in GATE_WEIGHTS:
        variant = Variant(name, 0.3, 0.6, gate_weight=name, gate_power=0.5, down_weight=down_weight)
        threshold, down_threshold = sample.thresholds(variant, 0.3, 0.6, sample.v, sample.u)
        passed = sample.v.abs() >= threshold
        kept = passed & ((sample.v * sample.u).abs() >= down_threshold)
        assert 1 - passed.float().mean() == pytest.approx(0.3, abs=0.001), name
        assert 1 - kept.float().mean() == pytest.approx(0.6, abs=0.001), name


def test_the_last_layer_has_a_power_and_sparsities_of_its_own():
    last = Variant("a", 0.4, 0.6, last=(0.0, 0.1)).of_layer(2, 3)
    assert (last.up, last.down) == (0.0, 0.1)

    variant = Variant("a", gate_power=0.5, last_power=0.0)
    assert [variant.of_layer(i, 3).gate_power for i in range(3)] == [0.5, 0.5, 0.0]
    assert Variant("a", gate_power=0.5).of_layer(2, 3).gate_power == 0.5


@pytest.mark.parametrize("allocation", ["error", "relative", "fisher"])
def test_dropping_more_loses_more(sample, allocation):
    variant = Variant("a", 0.4, 0.6, gate_weight="rms", allocation=allocation, within=0.15)
    options = sorted(variant.options())
    assert (0.4, 0.6) in options and all(0.25 <= up <= 0.55 for up, _ in options)
    losses = dict(zip(options, sample.losses(variant, options), strict=True))
    assert losses[0.3, 0.5] < losses[0.3, 0.65] and losses[0.4, 0.5] < losses[0.4, 0.7]


def test_parts_are_joined_in_order_and_once(tmp_path, monkeypatch):
    (tmp_path / "variants.json").write_text('[{"name": "dense"}, {"name": "a 50%"}, {"name": "b 50%"}]')
    parts = {"one": [("b 50%", "wikitext", "2")], "two": [("b 50%", "wikitext", "3"), ("a 50%", "wikitext", "1")]}
    for part, rows in parts.items():
        (tmp_path / part).mkdir()
        lines = ["name,text,ppl,commit", *(",".join([*row, "abc"]) for row in rows)]
        (tmp_path / part / "text.csv").write_text("\n".join(lines) + "\n")
    arguments = f"--variants {tmp_path}/variants.json --output {tmp_path}/all {tmp_path}/one {tmp_path}/two"
    monkeypatch.setattr(sys, "argv", ["merge.py", *arguments.split()])
    merge.main()
    rows = read_rows(tmp_path / "all" / "text.csv")
    assert [(row["name"], row["ppl"]) for row in rows] == [("a 50%", "1"), ("b 50%", "2")]
