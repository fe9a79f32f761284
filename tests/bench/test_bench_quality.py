"""The quality benchmark's rules, how its parts are joined, and what its results must say."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])


@pytest.fixture
def sample():
    from quality_rules import Sample

    v, u, rows = torch.randn(3, 2, 100, 24, generator=torch.Generator().manual_seed(0)).unbind()
    return Sample(v * torch.linspace(0.1, 3, 24), u, rows, torch.randn(8, 24))


@pytest.mark.parametrize("down_weight", ["none", "norm", "fisher"])
def test_every_gate_weight_reaches_both_targets(sample, down_weight):
    from quality_rules import GATE_WEIGHTS, Rule

    for name in GATE_WEIGHTS:
        rule = Rule(name, 0.3, 0.6, gate_weight=name, gate_power=0.5, down_weight=down_weight)
        threshold, down_threshold = sample.thresholds(rule, 0.3, 0.6, sample.v, sample.u)
        passed = sample.v.abs() >= threshold
        kept = passed & ((sample.v * sample.u).abs() >= down_threshold)
        assert 1 - passed.float().mean() == pytest.approx(0.3, abs=0.001), name
        assert 1 - kept.float().mean() == pytest.approx(0.6, abs=0.001), name


def test_the_last_layer_has_a_power_and_sparsities_of_its_own():
    from quality_rules import Rule

    last = Rule("a", 0.4, 0.6, last=(0.0, 0.1)).of_layer(2, 3)
    assert (last.up, last.down) == (0.0, 0.1)

    rule = Rule("a", gate_power=0.5, last_power=0.0)
    assert [rule.of_layer(i, 3).gate_power for i in range(3)] == [0.5, 0.5, 0.0]
    assert Rule("a", gate_power=0.5).of_layer(2, 3).gate_power == 0.5


@pytest.mark.parametrize("allocation", ["error", "relative", "fisher"])
def test_dropping_more_loses_more(sample, allocation):
    from quality_rules import Rule

    rule = Rule("a", 0.4, 0.6, gate_weight="rms", allocation=allocation, within=0.15)
    options = sorted(rule.options())
    assert (0.4, 0.6) in options and all(0.25 <= up <= 0.55 for up, _ in options)
    losses = dict(zip(options, sample.losses(rule, options), strict=True))
    assert losses[0.3, 0.5] < losses[0.3, 0.65] and losses[0.4, 0.5] < losses[0.4, 0.7]


def test_parts_are_joined_in_order_and_once(tmp_path, monkeypatch):
    import quality_merge

    (tmp_path / "variants.json").write_text('[{"name": "dense"}, {"name": "a 50%"}, {"name": "b 50%"}]')
    parts = {"one": [("b 50%", "wikitext", "2")], "two": [("b 50%", "wikitext", "3"), ("a 50%", "wikitext", "1")]}
    for part, rows in parts.items():
        (tmp_path / part).mkdir()
        lines = ["name,text,ppl,commit", *(",".join([*row, "abc"]) for row in rows)]
        (tmp_path / part / "text.csv").write_text("\n".join(lines) + "\n")
    arguments = f"--variants {tmp_path}/variants.json --out {tmp_path}/all {tmp_path}/one {tmp_path}/two"
    monkeypatch.setattr(sys, "argv", ["quality_merge.py", *arguments.split()])
    quality_merge.main()
    with (tmp_path / "all" / "text.csv").open(newline="") as file:
        assert [(row["name"], row["ppl"]) for row in csv.DictReader(file)] == [("a 50%", "1"), ("b 50%", "2")]


def test_unseen_text_reaches_the_target_sparsity():
    """Mean over the layers, of every rule on each text: within 1.5 points, and within 2 where three quarters go."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with (RESULTS / "layers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for k in ("up", "down"):
                if row["rule"]:
                    gap = float(row[k]) - float(row[f"{k}_target"])
                    found.setdefault((row["name"], row["text"], float(row["sparsity"]), k), []).append(gap)
    assert {"wikitext", "c4"} <= {text for _, text, _, _ in found}
    for what, gaps in found.items():
        assert abs(sum(gaps) / len(gaps)) < (0.015 if what[2] <= 0.675 else 0.02), what
