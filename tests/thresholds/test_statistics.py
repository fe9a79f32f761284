"""Thresholds derived from stored counts, against exact quantiles and against a calibration of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.models import tiny_model, tokens

from cats_ext import CatsConfig, calibrate
from cats_ext.thresholds.histogram import Histogram
from cats_ext.thresholds.statistics import SMALLEST, JointHistogram, LayerStatistics

generator = torch.Generator().manual_seed(0)
GATE = torch.randn(200_000, generator=generator)
UP = torch.randn(200_000, generator=generator) * (1 + GATE.abs())
ACTIVATIONS = {"silu": torch.nn.functional.silu(GATE - 0.3), "relu": GATE.relu(), "plain": GATE}


def statistics_of(v: torch.Tensor, contribution: torch.Tensor) -> LayerStatistics:
    gate = Histogram()
    gate.add(v)
    joint = JointHistogram.over(gate)
    for some in torch.arange(len(v)).split(70_000):
        joint.add(v[some], contribution[some])
    return LayerStatistics(gate, joint.trimmed())


@pytest.fixture(scope="module", params=ACTIVATIONS)
def layer(request):
    v = ACTIVATIONS[request.param]
    return v, v * UP, statistics_of(v, v * UP)


@pytest.mark.parametrize("up", [0.0, 0.1, 0.33, 0.5, 0.61, 0.9])
@pytest.mark.parametrize("more", [0.02, 0.1, 0.3])
def test_both_shares_are_reached(layer, up, more):
    v, h, statistics = layer
    down = min(up + more, 0.98)
    threshold, down_threshold = statistics.thresholds(up, down)
    kept = v.abs() >= threshold
    zeros = float((v == 0).double().mean())
    # 2 %: values where silu turns back share a bucket (test_histogram.py); exact zeros are all dropped or all kept
    assert float((~kept).double().mean()) == pytest.approx(max(up, zeros if up else 0), abs=0.02)
    dropped = ~(kept & (h.abs() >= down_threshold))
    assert float(dropped.double().mean()) == pytest.approx(max(down, zeros), abs=0.003)


def test_no_second_sparsity_is_a_second_threshold_of_zero(layer):
    for target in ((0.5, 0.5), (0.0, 0.0)):
        assert float(layer[2].thresholds(*target)[1]) == 0
    assert float(layer[2].thresholds(0.0, 0.0)[0]) == 0


def test_thresholds_rise_with_sparsity(layer):
    cuts = [layer[2].thresholds(s / 100, s / 100 + 0.1) for s in range(0, 90, 3)]
    for one, other in itertools.pairwise(cuts):
        assert one[0] <= other[0]
    downs = [layer[2].thresholds(0.4, s / 100)[1] for s in range(40, 99, 3)]
    assert downs == sorted(downs)


def test_order_and_pieces_do_not_matter(layer):
    v, h, statistics = layer
    order = torch.randperm(len(v))
    assert statistics_of(v[order], h[order]) == statistics


def test_bins_of_a_part_reach_the_shares_of_all(layer):
    v, h, _ = layer
    part, gate = Histogram(), Histogram()
    part.add(v[::97])
    gate.add(v)
    joint = JointHistogram.over(part)
    joint.add(v, h)
    bins = torch.bucketize(v.abs(), joint.edges, right=True) - 1
    assert torch.equal(joint.counts.sum(1), bins.bincount(minlength=len(joint.edges)))
    threshold, down_threshold = LayerStatistics(gate, joint.trimmed()).thresholds(0.375, 0.625)
    dropped = ~((v.abs() >= threshold) & (h.abs() >= down_threshold))
    assert float(dropped.double().mean()) == pytest.approx(0.625, abs=0.003)


def test_bins_of_an_empty_part_are_two():
    joint = JointHistogram.over(Histogram())
    joint.add(torch.tensor([0.0, -2.0]), torch.ones(2))
    assert joint.counts.sum(1).tolist() == [1, 1]


def test_contributions_that_are_all_zero():
    v = torch.linspace(0.1, 1, 1000)
    threshold, down_threshold = statistics_of(v, torch.zeros(1000)).thresholds(0.4, 0.6)
    assert 0.4 < threshold < 0.5 and down_threshold == SMALLEST


def test_not_finite_is_an_error():
    gate = Histogram()
    gate.add(torch.ones(3))
    with pytest.raises(ValueError, match="2 of 3 contributions are NaN or infinite"):
        JointHistogram.over(gate).add(torch.ones(3), torch.tensor([float("nan"), 1, -torch.inf]))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.55])
def test_the_share_of_inputs_is_reached(layer, share):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).pow(3)
    _, _, statistics = layer
    assert statistics.input_threshold(share) is None
    inputs = Histogram()
    inputs.add(x)
    tested = replace(statistics, inputs=inputs)
    threshold = tested.input_threshold(share)
    assert threshold.shape == () and threshold.dtype == torch.float32
    assert float((x.abs() < threshold).double().mean()) == pytest.approx(share, abs=0.002)
    assert float(tested.input_threshold(0.0)) == 0
    for one, other in zip(tested.thresholds(0.3, 0.6), statistics.thresholds(0.3, 0.6), strict=True):
        assert torch.equal(one, other)


def test_inputs_of_which_most_are_zero():
    inputs = Histogram()
    inputs.add(torch.tensor([0.0] * 9 + [2.0]))
    statistics = replace(statistics_of(torch.ones(4), torch.ones(4)), inputs=inputs)
    assert float(statistics.input_threshold(0.5)) == SMALLEST


@pytest.mark.parametrize(
    ("rule", "weighted"),
    [("plain", False), ("two_threshold", False), ("two_threshold", True), ("three_threshold", True)],
)
def test_another_sparsity_needs_no_second_calibration(rule, weighted, tmp_path):
    arguments = dict(rule=rule, gate_power=int(weighted), sequence_length=100, progress=False)
    config = calibrate(tiny_model(), tokens(300), sparsity=0.5, **arguments)
    config.save_pretrained(tmp_path)
    for sparsity in (0.0, 0.3, 0.7):
        want = calibrate(tiny_model(), tokens(300), sparsity=sparsity, **arguments)
        for source in (config, CatsConfig.from_pretrained(tmp_path), config.at_sparsity(0.9)):
            got = source.at_sparsity(sparsity)
            assert got.to_dict() == want.to_dict()
            for field in ("thresholds", "down_thresholds", "input_thresholds"):
                have, need = getattr(got, field), getattr(want, field)
                assert have.keys() == need.keys() and all(torch.equal(have[name], need[name]) for name in need)
    assert config.sparsity == 0.5  # as it was


def test_at_sparsity_errors():
    config = calibrate(tiny_model(), tokens(200), progress=False)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1.2"):
        config.at_sparsity(1.2)
    config.statistics.clear()
    with pytest.raises(ValueError, match=r"no calibration statistics for model\.layers\.0\.mlp: calibrate the model"):
        config.at_sparsity(0.3)
