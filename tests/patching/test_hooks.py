"""Hooks for all modules at once and activations that are replaced or hooked: seen on every path."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import HIDDEN, tiny_model
from support.patched import assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from torch import nn
from torch.nn.modules import module as torch_module

from cats_ext import apply_cats, apply_relufication, masking_disabled, remove_cats, sparsity_report, track_sparsity
from cats_ext.ops.reference import ACTIVATIONS, masked

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = pytest.mark.parametrize("ids", [few(), many()], ids=["few", "many"])


def patched(family="llama"):
    model = tiny_model(family)
    return apply_cats(model, config_for(model))


def of_mlps(model, names):
    children = {id(child): name for mlp in layers_of(model) for name, child in mlp.named_children()}
    return [children[id(module)] for module in names if id(module) in children]


@INPUTS
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_for_all_modules_see_every_child(kind, family, ids, called):
    model, seen = patched(family), []
    expected = logits(model, ids)
    called.clear()
    register = getattr(torch_module, f"register_module_{kind}_hook")
    with register(lambda module, *_: seen.append(module)):
        got = logits(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not called  # every part has been called by itself
    names = ["gate_up_proj"] if family == "phi3" else ["gate_proj", "up_proj"]
    activation = "activation_fn" if family == "phi3" else "act_fn"
    assert of_mlps(model, seen) == [*names, activation, "down_proj"] * len(layers_of(model))
    seen.clear()
    logits(model, few())
    assert not seen and set(called) == {"sparse_mlp"}


@INPUTS
def test_a_hook_for_all_modules_can_change_what_they_give(ids):
    model = patched()

    def double_up(module, inputs, output):
        return 2 * output if any(module is mlp.up_proj for mlp in layers_of(model)) else None

    with torch_module.register_module_forward_hook(double_up):
        got = logits(model, ids)
    for mlp in layers_of(model):
        mlp.up_proj.weight.data.mul_(2)
    torch.testing.assert_close(got, logits(model, ids), rtol=1e-4, atol=1e-4)


def test_backward_hooks_for_all_modules():
    model, seen = patched(), []
    with torch_module.register_module_full_backward_hook(lambda module, *_: seen.append(module)):
        model(input_ids=many()).logits.sum().backward()
    assert sorted(set(of_mlps(model, seen))) == ["act_fn", "down_proj", "gate_proj", "up_proj"]


@INPUTS
def test_a_hook_on_the_activation(ids):
    model, seen = patched(), []
    expected = logits(model, ids)
    hooks = [mlp.act_fn.register_forward_hook(lambda *_: seen.append(1)) for mlp in layers_of(model)]
    with track_sparsity(model):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(hooks)
    assert sparsity_report(model).tokens == ids.numel()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits(model, ids), expected)


class Halved(nn.Module):
    def forward(self, x):
        return torch.tanh(x) / 2


@INPUTS
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_another_activation_is_computed(family, ids, called):
    model = patched(family)
    dense = copy.deepcopy(model)
    remove_cats(dense)
    mlps, dense_mlps = (
        [m for m in net.modules() if hasattr(m, "act_fn") or hasattr(m, "activation_fn")] for net in (model, dense)
    )
    for mlp in (*mlps, *dense_mlps):
        setattr(mlp, "act_fn" if hasattr(mlp, "act_fn") else "activation_fn", Halved())
    for mlp in mlps:
        mlp.threshold.zero_()
        mlp.down_threshold.zero_()
    called.clear()
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    assert not called
    remove_cats(model)
    torch.testing.assert_close(logits(model, ids), logits(dense, ids))


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("where", ["directly", "while masking is disabled", "in a copy"])
def test_its_output_is_compared_with_the_threshold(where, count):
    model = patched()
    mlp, own = layers_of(model)[0], layers_of(model)[0].act_fn
    x = torch.randn(count, HIDDEN)
    expected = mlp(x)
    if where == "while masking is disabled":
        with masking_disabled(model):
            mlp.act_fn = Halved()
    else:
        mlp.act_fn = Halved()
    if where == "in a copy":
        mlp = copy.deepcopy(mlp)
    h = masked(Halved()(mlp.gate_proj(x)), mlp.up_proj(x), mlp.threshold, mlp.down_threshold)
    torch.testing.assert_close(mlp(x), mlp.down_proj(h), rtol=1e-4, atol=1e-4)
    assert mlp.operands() is None  # for the fused decode step
    mlp.act_fn = own
    if where != "in a copy":
        torch.testing.assert_close(mlp(x), expected)
        assert mlp.operands() is not None


@INPUTS
def test_relufication_does_not_call_the_activation_that_it_replaces(ids):
    model = apply_relufication(tiny_model())
    expected, seen = logits(model, ids), []
    with torch_module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert "up_proj" in of_mlps(model, seen) and "act_fn" not in of_mlps(model, seen)
    dense = copy.deepcopy(model)
    remove_cats(dense)
    for mlp in layers_of(dense):
        mlp.act_fn = nn.ReLU()
    torch.testing.assert_close(logits(dense, ids), expected, rtol=1e-4, atol=1e-4)


def test_compiled_models_notice(called):
    model = patched()
    torch._dynamo.reset()
    compiled, mlp, x = torch.compile(model, backend="eager"), layers_of(model)[0], few()
    before = logits(compiled, x)
    mlp.act_fn = Halved()
    torch.testing.assert_close(logits(compiled, x), logits(model, x))
    assert not torch.allclose(logits(compiled, x), before, atol=1e-3)


def test_the_attributes_come_and_go():
    model = tiny_model()
    config, before = config_for(model), snapshot(model)
    apply_cats(model, config)
    for mlp in layers_of(model):
        mlp.act_fn = mlp.act_fn
        assert mlp.activation() == "silu" and mlp.activation() in ACTIVATIONS
    remove_cats(model)
    assert_unchanged(model, before)
