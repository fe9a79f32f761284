"""quantize: linear layers become packed rows in place, all of them or none, and patching and calibration take them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools

import pytest
import torch
from support.models import LAYERS, small_model, tokens
from support.patched import InterruptAt, assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from torch import nn

from cats_ext import (
    CatsMLP,
    QuantizationConfig,
    apply_cats,
    apply_relufication,
    masking_disabled,
    quantize,
    remove_cats,
    set_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.integrations.transformers import attach
from cats_ext.patching.apply import current_config
from cats_ext.quantization import quantized_linears
from cats_ext.quantization.run import _follow, _untie, quantize_as
from cats_ext.rows import QuantizedLinear, quantize_rows


def quantized_model(family: str = "llama", **arguments):
    return quantize(small_model(family), progress=False, **arguments)


def with_rounded_weights(quantized):
    """A dense model with the weights that the packed rows stand for."""
    model = small_model("phi3" if hasattr(layers_of(quantized)[0], "gate_up_proj") else "llama")
    with torch.no_grad():
        for name, linear in quantized_linears(quantized).items():
            model.get_submodule(name).weight.copy_(linear.unpacked(torch.float32))
    return model


@pytest.mark.parametrize("family", ["llama", "llama-bias", "phi3", "gemma2"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_every_projection_becomes_packed_rows(family, weights):
    model = small_model(family)
    before = [{name: p for name, p in mlp.named_parameters()} for mlp in layers_of(model)]
    assert quantize(model, weights, progress=False) is model
    for mlp, dense in zip(layers_of(model), before, strict=True):
        for name, child in mlp.named_children():
            if not name.endswith("_proj"):
                continue
            assert type(child) is QuantizedLinear and child.input_rows == (name == "down_proj")
            weight = dense[f"{name}.weight"]
            rows = weight.t() if child.input_rows else weight
            assert torch.equal(child.weight, quantize_rows(rows, child.row_format))
            assert child.bias is dense.get(f"{name}.bias")
    assert all("mlp" in name for name in quantized_linears(model))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
def test_kernel_and_masked_path_compute_what_the_rounded_weights_give(family, rule, called):
    model = quantized_model(family, **({} if family == "phi3" else {"gate": "int8", "up": "fp8"}))
    dense = with_rounded_weights(model)
    for ids in (few(), many()):
        torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    config = config_for(model, rule=rule)
    apply_cats(dense, config, check_weights=False)
    apply_cats(model, config)
    called.clear()
    kernel = logits(model, few())
    assert set(called) == {"sparse_mlp_packed"}
    torch.testing.assert_close(kernel, logits(dense, few()), rtol=1e-3, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cats_ext.ops.dispatch.kernel_fits", lambda *_: False)
        torch.testing.assert_close(logits(model, few()), kernel, rtol=1e-3, atol=1e-3)
    assert called[-1].startswith("gated_threshold")
    with track_sparsity(model):
        logits(model, few())
    assert "sparse_mlp_packed_counted" in called


def test_calibration_with_gradients_and_a_search():
    model = quantized_model()
    config = config_for(model, importance="gradient", allocation="search")
    expected = config_for(with_rounded_weights(model), importance="gradient", allocation="search")
    for name, threshold in config.thresholds.items():
        torch.testing.assert_close(threshold, expected.thresholds[name], rtol=0.05, atol=1e-4)


def test_masking_removing_and_another_sparsity():
    model = quantized_model()
    dense = logits(model, few())
    before = snapshot(model)
    apply_cats(model, config_for(model))
    sparse = logits(model, few())
    assert not torch.allclose(sparse, dense, atol=1e-3)
    with masking_disabled(model):
        assert torch.equal(logits(model, few()), dense)
    set_sparsity(model, 0.0)
    torch.testing.assert_close(logits(model, few()), dense, rtol=1e-4, atol=1e-4)
    remove_cats(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, few()), dense)


def test_relufication_of_a_quantised_model():
    model = quantized_model()
    assert isinstance(layers_of(apply_relufication(model))[0], CatsMLP)
    logits(model, few())


def test_report_counts_the_bytes_of_each_matrix():
    model = quantized_model(down="int8", zero_points=False)
    apply_cats(model, config_for(model))
    with track_sparsity(model):
        logits(model, many())
    report = sparsity_report(model)
    layer, mlp = report.layers[0], layers_of(model)[0]
    sizes = [mlp.gate_proj.weight.numel(), mlp.up_proj.weight.numel(), mlp.down_proj.weight.numel()]
    assert list(layer.matrix_bytes) == sizes and sizes[0] == sizes[1] < sizes[2]
    read = sizes[0] + sizes[1] * (1 - layer.up_sparsity) + sizes[2] * (1 - layer.down_sparsity)
    assert layer.bytes_share == pytest.approx(read / sum(sizes))
    assert report.to_dict()["layers"][0]["weight_bytes"] == sum(sizes)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_patched_model_stays_patched(family):
    model = small_model(family)
    config = config_for(model)
    track_sparsity(apply_cats(model, config))
    quantize(model, progress=False)
    assert [type(m).__name__ for m in layers_of(model)] == ["CatsMLP"] * LAYERS
    assert layers_of(model)[0].forward_settings.tracking
    sparse, now = logits(model, few()), current_config(model)
    assert all(torch.equal(now.thresholds[name], config.thresholds[name]) for name in config.thresholds)
    remove_cats(model)
    apply_cats(model, now)  # thresholds go with the packed rows from now on
    assert torch.equal(logits(model, few()), sparse)
    with pytest.raises(ValueError, match=r"for other weights than the model's: gate_proj of model\.layers\.0"):
        apply_cats(remove_cats(model), config)
    assert torch.equal(logits(apply_cats(model, config, check_weights=False), few()), sparse)


def test_cast_moved_copied_and_pickled():
    model = quantized_model("llama-bias")
    apply_cats(model, config_for(model))
    expected, rows = logits(model, few()), layers_of(model)[0].gate_proj.weight.clone()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, few()), expected)
        other.to(torch.bfloat16)
        assert torch.equal(layers_of(other)[0].gate_proj.weight, rows)
        assert layers_of(other)[0].gate_proj.bias.dtype == torch.bfloat16
        for ids in (few(), many()):
            assert logits(other, ids).dtype == torch.bfloat16
    other = quantized_model("llama-bias", up="int8", gate="int8", down="int8")
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())


def test_other_parameters_can_be_trained():
    model = apply_cats(quantized_model(), config_for(quantized_model()))
    model.train()(input_ids=few(), labels=few()).loss.backward()
    assert all((p.grad is None) == (p.dtype == torch.uint8) for p in model.parameters())


def test_formats():
    mlp = layers_of(quantized_model("llama", weights="int4_g32", up="int8", group_size=64, down="fp8"))[0]
    names = [getattr(mlp, f"{name}_proj").row_format.name for name in ("gate", "up", "down")]
    assert names == ["int4_g32", "int8_g64", "fp8_e4m3"]
    narrow = quantize(small_model(hidden_size=96), zero_points=False, progress=False)
    assert layers_of(narrow)[0].gate_proj.row_format.name == "int4_g32"  # the largest that divides 96
    assert quantize_as(small_model(), QuantizationConfig("fp8"), progress=False) is not None


@pytest.mark.parametrize(
    ("arguments", "down"),
    [
        ({}, "int8_g128"),
        ({"weights": "int4", "group_size": 64}, "int8_g64"),
        ({"weights": "int4", "down": "int4"}, "int4_g128_zp"),
        ({"weights": "int4_g32"}, "int4_g32"),
        ({"weights": "fp8"}, "fp8_e4m3"),
    ],
)
def test_the_down_projection_is_in_int8_by_default_in_int4(arguments, down):
    config = QuantizationConfig(**arguments)
    assert config.format_of("down", 256).name == down
    assert (
        config.format_of("gate", 256).type == config.format_of("o_proj", 256).type == config.weights.partition("_")[0]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_scope_all(tied):
    model = small_model(tie_word_embeddings=tied)
    embedding = model.model.embed_tokens.weight
    head = model.lm_head.weight.detach().clone()
    assert (model.lm_head.weight is embedding) == tied
    quantize(model, "int4", scope="all", progress=False)
    found = {name: linear.row_format.name for name, linear in quantized_linears(model).items()}
    assert (
        len(found) == 7 * LAYERS + 1 and found["model.layers.1.self_attn.o_proj"] == found["model.layers.0.mlp.up_proj"]
    )
    assert found["lm_head"] == "int8_g128"
    assert model.model.embed_tokens.weight is embedding
    torch.testing.assert_close(model.lm_head.unpacked(torch.float32), head, rtol=0, atol=0.02 * head.abs().max())
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert isinstance(model.lm_head, QuantizedLinear)
    logits(apply_cats(model, config_for(model)), few())


@pytest.mark.parametrize("patched", [False, True])
def test_interrupted_at_any_line_leaves_nothing(patched, monkeypatch):
    model = small_model(tie_word_embeddings=True)
    round_once = functools.cache(QuantizedLinear.from_linear)
    monkeypatch.setattr(QuantizedLinear, "from_linear", round_once)
    if patched:
        apply_cats(model, config_for(model))
    functions = [inspect.unwrap(quantize_as), _follow, _untie, attach]
    before = snapshot(model)
    states = [vars(mlp.cats).copy() for mlp in layers_of(model)] if patched else []
    for line in itertools.count():
        try:
            with InterruptAt(line, functions, KeyboardInterrupt):
                quantize(model, scope="all", progress=False)
            break
        except KeyboardInterrupt:
            assert_unchanged(model, before)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert states == ([vars(mlp.cats) for mlp in layers_of(model)] if patched else [])
    assert line > 8 * LAYERS
    assert len(quantized_linears(model)) == 7 * LAYERS + 1


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("patched", [False, True])
def test_with_data_the_outputs_change_less(family, patched, monkeypatch):
    model = small_model(family)
    if patched:
        apply_cats(model, config_for(model, rule="plain"))
    ids, before = tokens(600), snapshot(model)
    dense = [mlp.down_proj.weight.detach().clone() for mlp in layers_of(model)]
    inputs = []
    layers_of(model)[0].down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(model, ids[None])
    layers_of(model)[0].down_proj._forward_pre_hooks.clear()
    nearest = quantize(copy.deepcopy(model), progress=False)
    arguments = {"data": ids, "sequence_length": 128, "progress": False}
    at_once = quantize(copy.deepcopy(model), scope="all", **arguments)
    assert_unchanged(model, before)
    monkeypatch.setattr("cats_ext.quantization.moments.MEMORY", 1)
    model = quantize(model, scope="all", **arguments)
    for name, linear in quantized_linears(model).items():
        assert torch.equal(linear.weight, at_once.get_submodule(name).weight), name
    errors = [
        (inputs[0] @ (layers_of(m)[0].down_proj.unpacked(torch.float32) - dense[0]).t()).norm()
        for m in (nearest, model)
    ]
    assert errors[1] < errors[0]
    assert len(quantized_linears(model)) == len(quantized_linears(at_once))


def test_interrupted_as_a_hook_is_registered_leaves_none(monkeypatch):
    """Then nobody has its handle; the next call would refuse the layer for its hook."""
    model, register = small_model(), nn.Module.register_forward_pre_hook

    def interrupted(module, hook, **options):
        register(module, hook, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, data=tokens(200), progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_data_is_checked():
    model = small_model()
    for arguments, message in (
        ({"data": "text"}, "tokenizer must be given when data is text"),
        ({"data": tokens(600), "max_tokens": 0}, "max_tokens must be a positive integer, got 0"),
        ({"data": tokens(600) + 10**6}, "data has token id"),
        ({"data": tokens(60)}, "data must have at least 128 tokens"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            quantize(model, **arguments)
    model.model.layers[1] = nn.ModuleDict({"mlp": layers_of(model)[1]})
    model.model.layers[1].forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj cannot be quantised: no token of data reaches it"):
        quantize(model, data=tokens(600), progress=False)
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj cannot be quantised: its inputs from data have"):
        quantize(model, data=tokens(600), progress=False)


def test_all_zero_groups():
    model = small_model()
    with torch.no_grad():
        layers_of(model)[1].gate_proj.weight[:, :64].zero_()
    quantize(model, group_size=64, progress=False)
    assert not layers_of(model)[1].gate_proj.unpacked(torch.float32)[:, :64].any()
