"""The ReLUfied model is the model with ReLU for its activation, and can be undone."""

from __future__ import annotations

import pytest
import torch
from support.models import LAYERS, tiny_model, tokens

from cats_ext import apply_cats, apply_relufication, calibrate, remove_cats, sparsity_report, track_sparsity
from cats_ext.patching.detection import find_gated_mlps


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("count", [1, 40], ids=["kernel", "dense path"])
def test_it_is_the_model_with_relu(family, count):
    model, ids = tiny_model(family), tokens(count)
    want = tiny_model(family)
    for mlp in find_gated_mlps(want):
        name = "act_fn" if hasattr(mlp.module, "act_fn") else "activation_fn"
        setattr(mlp.module, name, torch.nn.ReLU())
    before = logits(model, ids)
    assert apply_relufication(model) is model
    torch.testing.assert_close(logits(model, ids), logits(want, ids), rtol=1e-4, atol=1e-4)
    assert (logits(model, ids) - before).abs().max() > 0.01
    remove_cats(model)
    assert torch.equal(logits(model, ids), before)


def test_neurons_below_zero_are_skipped():
    model = apply_relufication(tiny_model())
    with track_sparsity(model), torch.no_grad():
        x = torch.randn(1, 1, model.config.hidden_size)
        for layer in model.model.layers:
            layer.mlp(x)
    for layer, module in zip(sparsity_report(model).layers, model.model.layers, strict=True):
        expected = (module.mlp.gate_proj(x) <= 0).double().mean().item()
        assert layer.up_sparsity == layer.down_sparsity == pytest.approx(expected, abs=1e-6)
        assert 0.2 < expected < 0.8
    assert len(sparsity_report(model).layers) == LAYERS


def test_errors():
    with pytest.raises(ValueError, match="has no gated MLP"):
        apply_relufication(torch.nn.Linear(2, 2))
    model = apply_cats(tiny_model(), calibrate(tiny_model(), tokens(200), progress=False))
    with pytest.raises(ValueError, match="is patched already"):
        apply_relufication(model)
