"""The decode engine on models that are sparse by themselves, and on those whose layers share keys and values."""

from __future__ import annotations

import pytest
import torch
from support.models import EXACT, VOCABULARY, installed, tiny_model, tokens
from torch import nn

import cats_ext
from cats_ext import DecodeEngine
from cats_ext.decode import fused
from cats_ext.patching.exact.modules import ExactMLP

FUSED = ("llama-relu", "phi3-relu")
OPTIONS = dict(max_new_tokens=24, do_sample=False, eos_token_id=VOCABULARY)  # past the windows of 16
FAMILIES = [f for f in installed(EXACT) if f not in ("mixtral-relu", "bitnet", "jais2", "persimmon", "arcee")]

pytestmark = pytest.mark.filterwarnings("error:the decode step cannot be captured", "error:the fused step failed")


def captured(model: nn.Module, **options: object) -> DecodeEngine:
    engine = DecodeEngine(model, **options)
    engine.capture = True  # see static_steps
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_the_tokens_of_the_dense_model(family, static_steps, monkeypatch):
    model, ids = tiny_model(family), tokens(6)[None]
    want = model.generate(ids, **OPTIONS)
    calls = []
    step = fused.sparse_mlp_step
    monkeypatch.setattr(fused, "sparse_mlp_step", lambda *arguments: calls.append(arguments) or step(*arguments))
    engine = captured(cats_ext.apply_exact(model))
    assert torch.equal(engine.generate(ids, **OPTIONS), want)
    assert engine.fused_active == (family in (*FUSED, "llama-relu2")) and bool(calls) == (family in FUSED)


def test_fused_steps_call_an_mlp_from_its_activations_on(static_steps, monkeypatch):
    model, ids = cats_ext.apply_exact(tiny_model("llama-relu2")), tokens(6)[None]
    calls, forward = [], ExactMLP.forward
    monkeypatch.setattr(ExactMLP, "forward", lambda self, x: calls.append(x.shape[:-1]) or forward(self, x))
    engine = captured(model, fused=True)
    engine.generate(ids, **OPTIONS)
    assert engine.fused_active and calls[-1] == (1, 1)


@pytest.mark.skipif("gemma3n" not in FAMILIES, reason="transformers has no Gemma 3n")
@pytest.mark.parametrize("static", [False, True])
def test_layers_that_share_keys_and_values(static, request):
    """Of Gemma 3n: with two sequences, one padded; the second half of its layers have none in the cache."""
    if static:
        request.getfixturevalue("static_steps")
    model, ids = tiny_model("gemma3n"), tokens(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model.generate(ids, attention_mask=mask, pad_token_id=0, **OPTIONS)
    engine = (captured if static else DecodeEngine)(cats_ext.apply_exact(model))
    assert torch.equal(engine.generate(ids, mask, pad_token_id=0, **OPTIONS), want)
    layers = engine._session.cache.layers
    assert [layer.is_initialized for layer in layers] == [True, True, False, False] and engine.cache_bytes() > 0
    with pytest.raises(ValueError, match=r"fused=True: .*: Gemma3nForCausalLM is none of"):
        DecodeEngine(model, fused=True).generate(ids[:1], max_new_tokens=1)
