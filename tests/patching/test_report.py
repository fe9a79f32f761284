"""Tracking and the sparsity report, against counts made by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, LAYERS, tiny_model, tokens

from cats_ext import CatsMLP, apply_cats, calibrate, remove_cats, reset_sparsity, sparsity_report, track_sparsity


@pytest.fixture(params=["llama", "phi3"])
def model(request):
    model = tiny_model(request.param)
    config = calibrate(model, tokens(300), rule="two_threshold", sparsity=0.5, progress=False)
    return apply_cats(model, config)


@torch.no_grad()
def run(model, count):
    model(input_ids=tokens(count)[None])


@pytest.mark.parametrize("count", [1, 3, 50], ids=["kernel 1", "kernel 3", "dense path"])
def test_report_is_what_was_skipped(model, count):
    module = model.model.layers[0].mlp
    x = torch.randn(count, HIDDEN)
    with track_sparsity(model), torch.no_grad():
        run(model, 2)
        reset_sparsity(model)
        for layer in model.model.layers:
            layer.mlp(x)
    layer = sparsity_report(model).layers[0]
    with torch.no_grad():
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)
        v = torch.nn.functional.silu(gate).abs()
        skipped = v < module.threshold
        skipped_down = skipped | ((v * up).abs() < module.down_threshold)
    pairs = count * INTERMEDIATE
    assert layer.name == "model.layers.0.mlp"
    assert layer.tokens == count
    assert layer.up_sparsity == pytest.approx(skipped.sum().item() / pairs, abs=1.5 / pairs)
    assert layer.down_sparsity == pytest.approx(skipped_down.sum().item() / pairs, abs=1.5 / pairs)
    assert 0.2 < layer.up_sparsity < layer.down_sparsity < 0.8
    assert (layer.up_target, layer.down_target) == (0.375, 0.625)
    assert layer.bytes_share == pytest.approx((3 - layer.up_sparsity - layer.down_sparsity) / 3)


def test_means_dictionary_and_table(model):
    with track_sparsity(model):
        run(model, 40)
        run(model, 2)
    report = sparsity_report(model)
    assert report.tokens == 42 and len(report.layers) == LAYERS
    assert report.up_sparsity == pytest.approx(sum(layer.up_sparsity for layer in report.layers) / LAYERS)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["down_sparsity"] == report.down_sparsity and values["up_target"] == pytest.approx(0.375)
    assert values["layers"][2]["bytes_share"] == report.layers[2].bytes_share
    text = str(report)
    for layer in report.layers:
        assert f"{layer.name}" in text and f"{layer.up_sparsity:.1%}" in text
    assert "mean" in text and "62.5%" in text


def test_off_by_default_switched_and_nested(model):
    run(model, 3)
    assert all(layer.mlp.counts.sum() == 0 for layer in model.model.layers)
    track_sparsity(model)
    run(model, 3)
    track_sparsity(model, False)
    run(model, 3)
    assert sparsity_report(model).tokens == 3
    with track_sparsity(model):
        run(model, 5)
        with track_sparsity(model, False):
            run(model, 7)
        run(model, 11)
    run(model, 13)
    assert sparsity_report(model).tokens == 3 + 5 + 11
    with pytest.raises(RuntimeError), track_sparsity(model):
        raise RuntimeError
    run(model, 17)
    assert sparsity_report(model).tokens == 19


def test_tracking_does_not_change_the_output(model):
    for count in (2, 30):
        ids = tokens(count)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            with track_sparsity(model):
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_threshold_zero_and_the_largest():
    model = tiny_model()
    config = calibrate(model, tokens(200), rule="plain", progress=False)
    names = list(config.thresholds)
    values = {
        names[0]: torch.tensor(0.0),
        names[1]: torch.tensor(torch.finfo(torch.float32).max),
        names[2]: config.thresholds[names[2]],
    }
    apply_cats(model, replace(config, thresholds=values))
    with track_sparsity(model):
        run(model, 4)
        run(model, 20)
    all_kept, none_kept, _ = sparsity_report(model).layers
    assert (all_kept.up_sparsity, all_kept.down_sparsity, all_kept.bytes_share) == (0, 0, 1)
    assert (none_kept.up_sparsity, none_kept.down_sparsity) == (1, 1)
    assert none_kept.bytes_share == pytest.approx(1 / 3)


def test_removal_inside_tracking(model):
    with track_sparsity(model):
        run(model, 2)
        remove_cats(model)
    assert not any(isinstance(module, CatsMLP) for module in model.modules())


def test_errors(model):
    with pytest.raises(ValueError, match=r"no token has been counted in model.layers.0.mlp: call track_sparsity"):
        sparsity_report(model)
    with track_sparsity(model):
        run(model, 2)
    sparsity_report(model)
    reset_sparsity(model)
    with pytest.raises(ValueError, match="call track_sparsity"):
        sparsity_report(model)
    remove_cats(model)
    for function in (sparsity_report, reset_sparsity, track_sparsity):
        with pytest.raises(ValueError, match="is not patched: call apply_cats first"):
            function(model)
