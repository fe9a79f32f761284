"""Tiny models of every supported family: the same numbers as the formula, and restored bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import CONFIGS, HIDDEN, LAYERS, tiny_model, tokens
from patched import assert_unchanged, config_for, few, layers_of, logits, many, snapshot

from cats_ext import apply_cats, remove_cats
from cats_ext.functional import MAX_KERNEL_TOKENS
from cats_ext.reference import ACTIVATIONS

FAMILIES = list(CONFIGS)
ACTIVATION = {"gemma2": "gelu_tanh", "gemma3": "gelu_tanh", "llama-relu": "relu"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [few(), many()], ids=["kernel", "dense path"])
def test_threshold_zero_is_the_dense_model(family, ids):
    model = tiny_model(family)
    expected = logits(model, ids)
    apply_cats(model, config_for(model, sparsity=0.0))
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_mlp_computes_the_formula(family, rule):
    model = tiny_model(family)
    originals = copy.deepcopy(layers_of(model))
    config = config_for(model, rule=rule)
    apply_cats(model, config)
    for (name, threshold), module, dense in zip(config.thresholds.items(), layers_of(model), originals, strict=True):
        for x in (torch.randn(3, HIDDEN), torch.randn(2, 9, HIDDEN)):
            if hasattr(dense, "gate_up_proj"):
                gate, up = dense.gate_up_proj(x).chunk(2, -1)
            else:
                gate, up = dense.gate_proj(x), dense.up_proj(x)
            v = ACTIVATIONS[ACTIVATION.get(family, "silu")](gate)
            h = torch.where(v.abs() >= threshold, v * up, 0)
            if rule == "two_threshold":
                h = torch.where(h.abs() >= config.down_thresholds[name], h, 0)
            assert (h == 0).float().mean() > 0.3
            with torch.no_grad():
                torch.testing.assert_close(module(x), dense.down_proj(h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_equals_the_dense_masked_path(family, called, monkeypatch):
    model = tiny_model(family)
    apply_cats(model, config_for(model))
    kernel = logits(model, few())
    assert called == ["sparse_mlp"] * LAYERS
    called.clear()
    ids = few()
    monkeypatch.setitem(MAX_KERNEL_TOKENS, "cpu", 0)
    dense = logits(model, ids)
    assert called == ["gated_threshold"] * LAYERS
    torch.testing.assert_close(kernel, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_bit_for_bit(family):
    model = tiny_model(family)
    before, expected = snapshot(model), logits(model, many())
    config = config_for(model)
    assert apply_cats(model, config) is model
    assert remove_cats(model) is model
    assert_unchanged(model, before)
    assert torch.equal(logits(model, many()), expected)
    remove_cats(apply_cats(model, config))  # and again
    assert_unchanged(model, before)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    model = tiny_model(family)
    config = config_for(model)
    expected = {
        n: logits(apply_cats(copy.deepcopy(model), config), ids) for n, ids in (("few", few()), ("many", many()))
    }
    there = apply_cats(copy.deepcopy(model), config).cuda()  # moved after patching, and patched after moving
    patched_there = apply_cats(model.cuda(), config_for(model))
    for m in (there, patched_there):
        assert layers_of(m)[0].threshold.is_cuda
        for n, ids in (("few", few()), ("many", many())):
            assert F.cosine_similarity(logits(m, ids.cuda()).cpu(), expected[n], dim=-1).min() > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(family, called):
    model = tiny_model(family)
    arguments = dict(max_new_tokens=12, do_sample=False)
    prompt = tokens(17)[None]
    dense = model.generate(prompt, **arguments)
    apply_cats(model, config_for(model, sparsity=0.0))
    called.clear()
    assert torch.equal(model.generate(prompt, **arguments), dense)
    assert set(called) == {"sparse_mlp", "gated_threshold"}  # the prompt is long, a step is not
    remove_cats(model)
    apply_cats(model, config_for(model, sparsity=0.9))
    assert not torch.equal(model.generate(prompt, **arguments), dense)
