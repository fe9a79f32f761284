"""Which implementation computes a patched MLP: the kernel only where nothing needs the projections or gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import HIDDEN, LAYERS, tiny_model
from support.patched import config_for, few, layers_of, logits, many

from cats_ext import apply_cats, remove_cats
from cats_ext.ops.reference import gated_threshold_ref


def test_a_weight_in_another_layout_takes_the_dense_path(called):
    model = tiny_model()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    model.load_state_dict({k: v.clone().contiguous() for k, v in model.state_dict().items()}, assign=True)
    called.clear()
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-4, atol=1e-4)
    assert set(called) == {"gated_threshold"}


def test_gradients_take_the_dense_path_and_are_right(called):
    model = tiny_model().double()
    config = config_for(model)
    reference = copy.deepcopy(layers_of(model)[0])
    apply_cats(model, config)
    module = layers_of(model)[0]
    x = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    called.clear()
    module(x).square().sum().backward()
    assert called == ["gated_threshold"]
    y = x.detach().clone().requires_grad_()
    rule = (module.threshold, module.down_threshold, "silu")
    h = gated_threshold_ref(reference.gate_proj(y), reference.up_proj(y), *rule)
    reference.down_proj(h).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for got, want in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("needs", ["input", "gate weight", "down bias", "nothing"])
def test_the_kernel_never_swallows_a_gradient(needs, called):
    model = tiny_model("llama-bias").requires_grad_(False)
    apply_cats(model, config_for(model))
    module = layers_of(model)[0]
    called.clear()
    x = torch.randn(1, HIDDEN, requires_grad=needs == "input")
    module.gate_proj.weight.requires_grad_(needs == "gate weight")
    module.down_proj.bias.requires_grad_(needs == "down bias")
    y = module(x)
    assert y.requires_grad == (needs != "nothing")
    assert called == ["sparse_mlp" if needs == "nothing" else "gated_threshold"]


@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3"])
def test_prompts_give_the_same_with_and_without_gradients(family):
    model = tiny_model(family)
    apply_cats(model, config_for(model))
    with torch.enable_grad():
        expected = model(input_ids=many()).logits
    assert expected.requires_grad and torch.equal(logits(model, many()), expected)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=many()).logits, expected)


def test_training_with_gradient_checkpointing():
    model = tiny_model().train()
    apply_cats(model, config_for(model))
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    ids = many()
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < losses[0]
    assert layers_of(model)[0].down_proj.weight.t().is_contiguous()


@pytest.mark.parametrize("prompt", [few, many])
def test_hooks_on_a_projection_fire_and_count(prompt, called):
    model, ids = tiny_model(), prompt()
    apply_cats(model, config_for(model))
    dense_layers = 0 if prompt is few else LAYERS - 1
    expected = logits(model, ids)
    seen = []
    handle = layers_of(model)[1].up_proj.register_forward_hook(lambda m, a, output: seen.append(output) or output * 2)
    called.clear()
    assert not torch.allclose(logits(model, ids), expected)
    assert len(seen) == 1 and called.count("gated_threshold") == 1 + dense_layers
    handle.remove()
    assert torch.equal(logits(model, ids), expected)
    handle = layers_of(model)[1].down_proj.register_forward_pre_hook(lambda m, a: seen.append(a))
    logits(model, ids)
    assert len(seen) == 2
    handle.remove()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_backward_hooks_on_a_projection_fire(projection, register):
    model, ids, seen = tiny_model().train(), many(), []
    apply_cats(model, config_for(model))
    handle = getattr(getattr(layers_of(model)[1], projection), register)(lambda *a: seen.append(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(seen) == 1
    handle.remove()


def test_hooks_on_the_mlp_survive_patching_and_removal():
    model, seen = tiny_model(), []
    handle = layers_of(model)[0].register_forward_hook(lambda *a: seen.append(1))
    config = config_for(model)
    seen.clear()
    apply_cats(model, config)
    logits(model, few())
    remove_cats(model)
    logits(model, few())
    assert len(seen) == 2
    handle.remove()
    logits(model, few())
    assert len(seen) == 2


def test_dtype_mismatch_is_as_clear_as_with_a_linear():
    model = tiny_model(dtype=torch.bfloat16)
    apply_cats(model, config_for(model))
    for count in (1, 30):
        with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
            layers_of(model)[0](torch.randn(count, HIDDEN))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_autocast(family, called):
    model = tiny_model(family)
    config = config_for(model)
    apply_cats(model, config)
    module = layers_of(model)[0]
    x = torch.randn(2, HIDDEN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        called.clear()
        y = module(x)
    assert y.dtype == torch.bfloat16 and called == ["gated_threshold"]
    with torch.no_grad():
        torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.3)


def dispatched(model, **arguments):
    """As ``device_map`` does where several devices are used: a hook on every module."""
    from accelerate import dispatch_model

    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" for i in range(LAYERS)}
    return dispatch_model(model, device_map, main_device="cpu", force_hooks=True, **arguments)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("hooks", ["before", "after"])
def test_hooks_that_only_align_devices_are_bypassed(family, hooks, called):
    model = tiny_model(family)
    config = config_for(model)
    dense, expected = logits(model, few()), logits(apply_cats(copy.deepcopy(model), config), few())
    if hooks == "before":
        model = apply_cats(dispatched(model), config)
    else:
        model = dispatched(apply_cats(model, config))
    assert "forward" in vars(layers_of(model)[0]) and "forward" in vars(layers_of(model)[0].down_proj)
    called.clear()
    assert torch.equal(logits(model, few()), expected)
    assert set(called) == {"sparse_mlp"}
    called.clear()
    twin = copy.deepcopy(model)
    remove_cats(model)
    assert torch.equal(logits(model, few()), dense) and not called
    assert torch.equal(logits(twin, few()), expected) and set(called) == {"sparse_mlp"}


@pytest.mark.parametrize("what", ["cpu", "disk"])
def test_a_patched_model_offloaded_later_computes_the_same(what, called, tmp_path):
    import accelerate

    model = tiny_model()
    apply_cats(model, config_for(model))
    expected = {"few": logits(model, few()), "many": logits(model, many())}
    if what == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert layers_of(model)[0].down_proj.weight.is_meta
    called.clear()
    torch.testing.assert_close(logits(model, few()), expected["few"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, many()), expected["many"], rtol=1e-4, atol=1e-4)
    assert set(called) == {"gated_threshold"}  # the weights are not there for the kernel
