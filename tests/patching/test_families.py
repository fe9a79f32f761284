"""Tiny models of every supported family, on the CPU and on a GPU: the formula's numbers, and restored bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import models_table
from support.models import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    MIXTURES,
    REFUSED,
    installed,
    keeps_experts_together,
    tiny_model,
    tokens,
)
from support.patched import assert_unchanged, config_for, logits, many, snapshot

from cats_ext import apply_cats, remove_cats, set_sparsity
from cats_ext.functional import MAX_KERNEL_TOKENS
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.detection import find_gated_mlps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


CASES = [(name, "two_threshold") for name in installed(FAMILIES)]
CASES += [(name, "plain") for name in ("llama-bias", "gemma3", "phi3")]  # the same with one test less


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_family(name, rule, device, called, monkeypatch):
    family, model = FAMILIES[name], tiny_model(name).to(device)
    short, long = tokens(MAX_KERNEL_TOKENS[device], 5)[None].to(device), many().to(device)
    before, dense = snapshot(model), [logits(model, ids) for ids in (short, long)]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    text = model.generate(long, **greedy)

    config = config_for(model, rule=rule)
    mlps = find_gated_mlps(model)
    assert [(mlp.activation, mlp.merged) for mlp in mlps] == [(family.activation, family.merged)] * LAYERS
    originals = [copy.deepcopy(mlp.module) for mlp in mlps]
    assert apply_cats(model, config) is model

    for mlp, original in zip(mlps, originals, strict=True):
        thresholds = (config.thresholds[mlp.name], config.down_thresholds.get(mlp.name))
        check_formula(mlp.module, original, family.activation, *thresholds)

    called.clear()
    by_kernel = logits(model, short)
    assert called == ["sparse_mlp"] * LAYERS
    assert (by_kernel - dense[0]).norm() > 0.01 * dense[0].norm()
    with monkeypatch.context() as patch:
        patch.setitem(MAX_KERNEL_TOKENS, device, 0)
        torch.testing.assert_close(logits(model, short), by_kernel, rtol=1e-3, atol=1e-3)
    assert called == ["sparse_mlp"] * LAYERS + ["gated_threshold"] * LAYERS

    set_sparsity(model, 0.0)
    for ids, expected in zip((short, long), dense, strict=True):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    called.clear()
    assert torch.equal(model.generate(long, **greedy), text)
    assert set(called) == {"sparse_mlp", "gated_threshold"}  # the prompt is long, a step is not

    assert remove_cats(model) is model
    assert_unchanged(model, before)
    assert torch.equal(logits(model, long), dense[1])


def check_formula(module, original, activation, threshold, down_threshold):
    """The patched module against the formula on the dense one, for few tokens and for many."""
    parameter = next(original.parameters())
    for shape in ((2, HIDDEN), (2, 19, HIDDEN)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(parameter)
        with torch.no_grad():
            if hasattr(original, "gate_up_proj"):
                gate, up = original.gate_up_proj(x).chunk(2, -1)
            else:
                gate, up = original.gate_proj(x), original.up_proj(x)
            v = ACTIVATIONS[activation](gate)
            h = torch.where(v.abs() >= threshold.to(v), v * up, 0)
            if down_threshold is not None:
                h = torch.where(h.abs() >= down_threshold.to(v), h, 0)
            assert (h == 0).float().mean() > 0.2
            torch.testing.assert_close(module(x), original.down_proj(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", installed(REFUSED))
def test_refused_families(name):
    model = tiny_model(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no gated MLP|\(\w+\) cannot run sparsely: "):
        apply_cats(model, config_for(tiny_model()))
    assert_unchanged(model, before)


def test_the_table_in_the_documentation():
    every = FAMILIES | MIXTURES | REFUSED
    if len(installed(every)) < len(every) or not all(keeps_experts_together(tiny_model(name)) for name in MIXTURES):
        pytest.skip("this version of transformers lacks some of the families, or has other modules in them")
    assert models_table.document() == DOCUMENT.read_text(), "run python tests/support/models_table.py"
