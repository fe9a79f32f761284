"""convert_quantized: the model computes with the weights of the file, its down projections rounded again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.foreign_checkpoints import (
    LAYOUTS,
    compressed_entry,
    foreign_checkpoint,
    gptq_tensors,
    random_layer,
    words,
)
from support.models import LAYERS
from support.patched import config_for, few, logits
from torch import nn
from transformers import AutoModelForCausalLM

from cats_ext import apply_cats, convert_quantized, quantize
from cats_ext.quantization import quantized_linears
from cats_ext.quantization.foreign import Scheme
from cats_ext.rows import quantize_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def convert(directory, **arguments):
    return convert_quantized(directory, progress=False, **arguments)


def relative_error(linear, layer):
    return float((linear.unpacked(torch.float32) - layer.weight).norm() / layer.weight.norm())


def with_down_of(dense, converted):
    """A copy of ``dense`` with the down projections of ``converted``."""
    made = copy.deepcopy(dense)
    with torch.no_grad():
        for name, linear in quantized_linears(converted).items():
            if linear.input_rows:
                made.get_submodule(name).weight.copy_(linear.unpacked(torch.float32))
    return made


@pytest.mark.parametrize(
    ("layout", "family"),
    [(layout, "llama") for layout in LAYOUTS]
    + [("awq", "qwen2"), ("gptq", "mistral"), ("awq", "phi3"), ("ct-fp8", "phi3"), ("gptq-sym", "llama-bias")],
)
def test_weights_are_those_of_the_file(layout, family, tmp_path):
    checkpoint = foreign_checkpoint(layout, family)
    model, errors = convert(checkpoint.save(tmp_path))
    linears = quantized_linears(model)
    assert linears.keys() == checkpoint.layers.keys() and len(errors) == LAYERS
    for name, layer in checkpoint.layers.items():
        linear = linears[name]
        assert linear.input_rows == (name in errors) == name.endswith("down_proj")
        if linear.input_rows:
            assert errors[name] == pytest.approx(relative_error(linear, layer), rel=1e-3) and errors[name] < 0.02
            assert linear.row_format.name == "int8_g128"
        else:
            assert torch.equal(linear.unpacked(torch.float32), layer.weight)
    assert not model.training
    expected = logits(with_down_of(checkpoint.dense, model), few())
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-4, atol=1e-4)
    dense = logits(checkpoint.dense, few())
    assert (logits(model, few()) - dense).norm() < 0.03 * dense.norm()


@pytest.mark.parametrize("layout", ["awq", "ct-8-sym", "ct-fp8"])
def test_it_is_saved_patched_and_loaded_like_any_quantised_model(layout, tmp_path):
    model, _ = convert(foreign_checkpoint(layout).save(tmp_path / "foreign"))
    apply_cats(model, config_for(model)).save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(logits(again, few()), logits(model, few()))


def test_shards_tied_embeddings_and_layers_that_are_dense(tmp_path):
    checkpoint = foreign_checkpoint("awq", "qwen2", dense=("lm_head", "layers.0.", "k_proj"), tie_word_embeddings=True)
    model, _ = convert(checkpoint.save(tmp_path, shards=3))
    assert quantized_linears(model).keys() == checkpoint.layers.keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(("qweight", "qzeros", "scales")):
            assert torch.equal(model.state_dict()[name], tensor), name
    expected = logits(with_down_of(checkpoint.dense, model), few())
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_that_is_quantised(tied, tmp_path):
    checkpoint = foreign_checkpoint("gptq", dense=(), tie_word_embeddings=tied)
    directory = checkpoint.save(tmp_path)
    if tied:
        with pytest.raises(ValueError, match="lm_head cannot be converted: it is tied to the embedding"):
            convert(directory)
        return
    model, _ = convert(directory)
    assert torch.equal(model.lm_head.unpacked(torch.float32), checkpoint.layers["lm_head"].weight)
    expected = logits(with_down_of(checkpoint.dense, model), few())
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-4, atol=1e-4)


def test_tensors_that_the_model_has_no_use_for_are_named(tmp_path):
    checkpoint = foreign_checkpoint("awq")
    checkpoint.tensors["model.layers.0.mlp.act_fn.scales"] = torch.ones(192)
    with pytest.warns(
        UserWarning, match=r"has 1 tensors that LlamaForCausalLM has no use for, such as .*act_fn.scales"
    ):
        convert(checkpoint.save(tmp_path))


def test_generation_settings_are_kept(tmp_path):
    checkpoint = foreign_checkpoint("awq")
    checkpoint.save(tmp_path)
    checkpoint.dense.generation_config.max_new_tokens = 7
    checkpoint.dense.generation_config.save_pretrained(tmp_path)
    assert convert(tmp_path)[0].generation_config.max_new_tokens == 7


def test_error_is_judged_by_some_rows_and_reported_of_all(tmp_path, monkeypatch):
    directory = foreign_checkpoint("awq").save(tmp_path)
    monkeypatch.setattr("cats_ext.quantization.convert.SAMPLED_ROWS", 5)  # of 192
    rounded = []
    real = quantize_rows
    monkeypatch.setattr(
        "cats_ext.quantization.convert.quantize_rows",
        lambda w, form: (rounded.append((len(w), form.type)), real(w, form))[1],
    )
    _, errors = convert(directory)
    assert rounded == [(5, "int4"), (192, "int8")] * LAYERS and max(errors.values()) < 0.02


@pytest.mark.parametrize("given", ["auto", torch.float32])
def test_dtype(given, tmp_path):
    checkpoint = foreign_checkpoint("gptq")
    checkpoint.dense.half()
    checkpoint.dense.config.dtype = torch.float16
    model, _ = convert(checkpoint.save(tmp_path), dtype=given)
    assert model.dtype == (torch.float16 if given == "auto" else given)


def test_the_down_projection_is_in_int4_where_it_loses_little(tmp_path):
    checkpoint = foreign_checkpoint("gptq-sym")
    name = "model.layers.1.mlp.down_proj"
    for part in ("scales", "qzeros"):  # rows of neurons become representable: one scale in all of the matrix
        checkpoint.tensors[f"{name}.{part}"][:] = checkpoint.tensors[f"{name}.{part}"][0, 0]
    layer = checkpoint.layers[name]
    layer.scales[:] = layer.scales[0, 0]
    directory = checkpoint.save(tmp_path)
    model, errors = convert(directory)
    formats = {key: linear.row_format.name for key, linear in quantized_linears(model).items() if key in errors}
    assert formats.pop(name) == "int4_g128_zp" and set(formats.values()) == {"int8_g128"}
    assert errors[name] == pytest.approx(relative_error(quantized_linears(model)[name], layer), rel=1e-3, abs=1e-6)
    arguments = {"group_size": 32, "zero_points": False}
    model, errors = convert(directory, max_error=1.0, **arguments)
    assert {quantized_linears(model)[key].row_format.name for key in errors} == {"int4_g32"}
    assert max(errors.values()) > 0.05
    model, errors = convert(directory, down="fp8")
    assert {quantized_linears(model)[key].row_format.name for key in errors} == {"fp8_e4m3"}


def test_biases_of_zeros_beside_layers_without_one(tmp_path):
    checkpoint = foreign_checkpoint("gptq")
    name = "model.layers.0.mlp.up_proj"
    checkpoint.tensors[f"{name}.bias"] = torch.zeros(192)
    model, _ = convert(checkpoint.save(tmp_path / "zeros"))
    assert model.get_submodule(name).bias is None
    checkpoint.tensors[f"{name}.bias"][3] = 1
    with pytest.raises(ValueError, match=f"{name} cannot be converted: it has a bias in the checkpoint"):
        convert(checkpoint.save(tmp_path / "ones"))


def test_early_compressed_tensors_have_plain_zero_points(tmp_path):
    checkpoint = foreign_checkpoint("ct")
    for name, layer in checkpoint.layers.items():
        checkpoint.tensors[f"{name}.weight_zero_point"] = (layer.zeros - 8).to(torch.int8)
    model, _ = convert(checkpoint.save(tmp_path))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).unpacked(torch.float32), checkpoint.layers[name].weight)


INT = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 64}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "group_size": None}


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "awq",
            {"quant_method": "bitsandbytes"},
            "quant_method must be awq or gptq or compressed-tensors or torchao, got 'bits",
        ),
        ("awq", {"version": "gemv"}, "version must be gemm, got 'gemv'"),
        ("awq", {"bits": 3}, "bits must be 4, got 3"),
        ("awq", {"group_size": -1}, "group_size must be 32 or 64 or 128, got -1"),
        ("gptq", {"group_size": 256}, "group_size must be 32 or 64 or 128, got 256"),
        ("gptq", {"group_size": 128}, r"its scales must be \[128, 1\], got \[128, 2\]"),
        ("gptq", {"desc_act": True}, "desc_act must be False, got True"),
        ("gptq", {"bits": 2}, "bits must be 4 or 8, got 2"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2, got 'marlin'"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype must be int32, got 'int16'"),
        ("gptq", {"dynamic": {"-:.*lm_head": {}, "+:.*down": {"bits": 8}}}, r"dynamic must .*, got an entry for '\+:"),
        ("ct-sym", compressed_entry(**INT | {"group_size": 16}), "group_size must be 32 or 64 or 128, got 16"),
        ("ct-sym", compressed_entry(**INT | {"strategy": "channel"}), "strategy must be group, got 'channel'"),
        ("ct-sym", compressed_entry(**INT | {"num_bits": 2}), "num_bits must be 4 or 8, got 2"),
        ("ct-sym", compressed_entry(**INT | {"actorder": "group"}), "actorder must be .*, got 'group'"),
        ("ct-sym", {"format": "nvfp4-pack-quantized"}, "format must be pack-quantized or .*, got 'nvfp4"),
        ("ct-sym", {"config_groups": {}}, r"config_groups must give all quantised layers one format, got \[\]"),
        ("ct-sym", {"transform_config": {"config_groups": {"R3": {}}}}, "transform_config must be empty, got"),
        ("ct-sym", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config must be empty, got 'sparse"),
        (
            "ct-fp8",
            compressed_entry(**FLOAT | {"strategy": "block"}),
            "strategy must be tensor or channel, got 'block'",
        ),
    ],
)
def test_what_config_json_says_is_refused(layout, changes, message, tmp_path):
    checkpoint = foreign_checkpoint(layout)
    checkpoint.entry |= changes
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint.save(tmp_path))
    assert "cannot be converted" in str(caught.value)


UP = "model.layers.1.mlp.up_proj"


def acted_order(t):
    t[f"{UP}.g_idx"] = t[f"{UP}.g_idx"].flip(0)


def zero_of_15(t):
    t[f"{UP}.qzeros"][0, 0] = -1


def missing_scales(t):
    del t[f"{UP}.scales"]


def half_the_scales(t):
    t[f"{UP}.scales"] = t[f"{UP}.scales"][:1].clone()


def tiny_scale(t):
    t[f"{UP}.weight_scale"][3, 1] = 2**-40


def infinite_scale(t):
    t[f"{UP}.scales"][0, 0] = torch.inf


def dense_up(t):
    for part in ("qweight", "qzeros", "scales"):
        del t[f"{UP}.{part}"]
    t[f"{UP}.weight"] = torch.zeros(192, 128)


def another_layer(t):
    t["model.layers.1.mlp.experts.0.up_proj.qweight"] = t[f"{UP}.qweight"].clone()


def zero_points_of_8_bits(t):
    t[f"{UP}.qzeros"] = words(torch.full((2, 192), 99).numpy(), 8)


def no_norm(t):
    del t["model.norm.weight"]


def int8_down(t):
    name = "model.layers.1.mlp.down_proj.weight"
    t[name] = t[name].view(torch.int8)


def dense_model(t):
    for name in [name for name in t if name.endswith("qweight")]:
        del t[name]


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq", acted_order, f"{UP} cannot be converted: g_idx must have groups of consecutive inputs"),
        ("gptq", zero_of_15, f"{UP} cannot be converted: zero points in the file must be less than 15"),
        ("gptq", missing_scales, f"{UP} cannot be converted: the checkpoint has no scales for it"),
        ("awq", half_the_scales, rf"{UP} cannot be converted: its scales must be \[192, 2\], got \[192, 1\]"),
        (
            "ct-sym",
            tiny_scale,
            f"{UP} cannot be converted: scales must be float16 values, got 9.09495e-13 in torch.bfloat16",
        ),
        ("awq", infinite_scale, f"{UP} cannot be converted: scales must be finite, got inf"),
        ("awq", dense_up, f"model.layers.1.mlp cannot be converted: {UP} is dense, but its other projections are"),
        ("awq", another_layer, "experts.0.up_proj cannot be converted: LlamaForCausalLM has no linear layer of that"),
        ("gptq-8-sym", zero_points_of_8_bits, f"{UP} cannot be converted: zero points of 8 bits must be 128, got 100"),
        ("awq", no_norm, "cannot be converted: it has no tensor model.norm.weight"),
        ("ct-fp8", int8_down, "down_proj cannot be converted: its weight must be torch.float8_e4m3fn, got torch.int8"),
        ("awq", dense_model, "LlamaForCausalLM cannot be converted: no gated MLP of it is quantised"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(layout, change, message, tmp_path):
    checkpoint = foreign_checkpoint(layout)
    change(checkpoint.tensors)
    with pytest.raises(ValueError, match=message):
        convert(checkpoint.save(tmp_path))


def test_groups_that_do_not_divide_the_inputs_are_refused():
    layer = random_layer(nn.Linear(192, 128), 4, 64, True, torch.Generator())
    with pytest.raises(ValueError, match="group_size must divide its 192 inputs, got 128"):
        Scheme("gptq", 4, 128).unpack(gptq_tensors(layer, 4, 0), 128, 192)


def test_arguments_and_directories_are_checked(tmp_path):
    with pytest.raises(ValueError, match="max_error must be a number from 0, got -1"):
        convert(tmp_path, max_error=-1)
    with pytest.raises(ValueError, match=r"down must be one of int4, int8, fp8, .* got 'int3'"):
        convert(tmp_path, down="int3")
    foreign_checkpoint("awq").dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be converted: its config\.json has no quantization_config"):
        convert(tmp_path)
    model, _ = convert(foreign_checkpoint("awq").save(tmp_path / "awq"))
    with pytest.raises(ValueError, match="is quantised already"):
        quantize(model)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["quant_method"] == "cats"
    with pytest.raises(
        ValueError, match="quant_method must be awq or gptq or compressed-tensors or torchao, got 'cats'"
    ):
        convert(tmp_path / "ours")
