"""quantize: arguments and models that are refused, by name and with the model as it was."""

from __future__ import annotations

import pytest
import torch
from support.models import small_model, tiny_model
from support.patched import config_for, layers_of, snapshot
from torch import nn

from cats_ext import apply_cats, apply_exact, quantize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, "weights must be one of int4, int8, fp8, or a format such as int4_g64_zp, got 'int3'"),
        ({"weights": None}, "weights must be one of"),
        ({"gate": "int2"}, "gate must be one of"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, or None, got 48"),
        ({"group_size": 64.0}, r"group_size must be one of 32, 64, 128, or None, got 64\.0"),
        ({"zero_points": 1}, "zero_points must be True or False, got 1"),
        ({"scope": "attention"}, "scope must be one of mlp, all, got 'attention'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(small_model(), **arguments)


def broken(change, **sizes):
    model = small_model(**sizes)
    with torch.no_grad():
        change(layers_of(model)[1])
    return model


def tie_weights(mlp):
    mlp.up_proj.weight = mlp.gate_proj.weight


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            lambda: small_model(hidden_size=96),
            {"group_size": 64},
            r"layers\.0\.mlp\.gate_proj cannot be quantised: group_size must divide its rows of 96 columns, got 64: "
            "take 32",
        ),
        (
            lambda: small_model(hidden_size=48),
            {},
            "group_size must divide its rows of 48 columns, got 32: take fp8, which has none",
        ),
        (
            lambda: broken(lambda mlp: mlp.up_proj.weight[3].fill_(torch.nan)),
            {},
            r"layers\.1\.mlp\.up_proj cannot be quantised: weight must be finite, got 128 values that are NaN",
        ),
        (
            lambda: broken(lambda mlp: mlp.down_proj.weight.mul_(1e9)),
            {},
            r"layers\.1\.mlp\.down_proj cannot be quantised: weight must have scales within float16's 65504",
        ),
        (lambda: small_model().double(), {}, "weight must be float32, float16 or bfloat16, got torch.float64"),
        (lambda: broken(tie_weights), {}, r"layers\.1\.mlp .*cannot run sparsely.* shares memory"),
        (
            lambda: quantize(small_model(), progress=False),
            {},
            "model of class LlamaForCausalLM is quantised already: quantise the dense one",
        ),
        (
            lambda: small_model("phi3"),
            {"up": "int8"},
            "gate and up must have one format, as gate_up_proj is one matrix, got int4 and int8",
        ),
        (lambda: tiny_model("mixtral"), {}, "cannot be quantised: it is a mixture of experts"),
        (lambda: apply_exact(tiny_model("llama-relu2")), {}, "LlamaForCausalLM is patched by apply_exact: call remove"),
        (lambda: apply_exact(tiny_model("opt")), {}, "OPTForCausalLM is patched by apply_exact: call remove_cats"),
        (lambda: nn.Linear(4, 4), {}, "has no gated MLP"),
    ],
)
def test_what_cannot_be_quantised_stays_as_it_is(model, arguments, message):
    model = model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, progress=False, **arguments)
    after = snapshot(model)
    assert {k: v for k, v in after.items() if k != "state"} == {k: v for k, v in before.items() if k != "state"}


def test_refuses_hooks_and_other_modules():
    model = small_model()
    handle = layers_of(model)[0].up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj cannot .*hook or a replaced forward"):
        quantize(model, progress=False)
    handle.remove()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        quantize("model")
    apply_cats(model, config_for(small_model()), check_weights=False)
    layers_of(model)[0].up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"it is a torch\.nn\.modules\.linear\.Identity, not a torch\.nn\.Linear"):
        quantize(model, progress=False)
