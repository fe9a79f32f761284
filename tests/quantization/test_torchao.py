"""convert_quantized on torchao's checkpoints: what is kept exactly, what loses a little, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.foreign_checkpoints import foreign_checkpoint, tiles, torchao_entry, torchao_tensors
from support.models import LAYERS, tiny_model
from support.patched import few, logits
from transformers import AutoModelForCausalLM

from cats_ext import convert_quantized
from cats_ext.quantization import quantized_linears
from cats_ext.quantization.torchao import _untiled

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj"


def convert(directory):
    return convert_quantized(directory, progress=False)


@pytest.mark.parametrize("layout", ["torchao-int4", "torchao-int4-tiled"])
def test_real_zero_points_are_rounded_to_float16_and_the_error_is_reported(layout, tmp_path):
    checkpoint = foreign_checkpoint(layout)
    layer = checkpoint.layers[UP]
    generator = torch.Generator().manual_seed(1)
    layer.scales = (torch.rand(layer.scales.shape, generator=generator) * 0.01 + 0.01).to(torch.bfloat16)
    layer.zeros = layer.zeros + torch.rand(layer.zeros.shape, generator=generator)
    parts, _ = torchao_tensors(layer, layout)
    checkpoint.tensors |= {f"{UP}.{name}": part for name, part in parts.items()}
    model, errors = convert(checkpoint.save(tmp_path))
    zero = ((8 - layer.zeros) * layer.scales.float()).bfloat16()  # what the file has
    size = layer.q.shape[1] // zero.shape[1]
    scale, zero = (t.double().repeat_interleave(size, 1) for t in (layer.scales, zero))
    weight = (layer.q - 8) * scale + zero
    kept = model.get_submodule(UP)
    assert kept.row_format.name == "int4_g64_zp"
    q, scales, _ = kept.row_format.fields(kept.weight, 128)
    assert torch.equal(q.long(), layer.q) and torch.equal(scales.double(), layer.scales.double())
    assert len(errors) == LAYERS + 1
    error = float((kept.unpacked(torch.float32) - weight).norm() / weight.norm())
    assert errors[UP] == pytest.approx(error, rel=1e-3) and 1e-5 < error < 2**-9


def test_float32_scales_are_rounded_to_float16_and_the_error_is_reported(tmp_path):
    checkpoint = foreign_checkpoint("torchao-8-sym-row")
    scale = checkpoint.tensors[f"{UP}._weight_scale"]
    scale *= 1 + 2**-12
    model, errors = convert(checkpoint.save(tmp_path))
    assert errors[UP] == pytest.approx(2**-12, rel=0.01)
    assert torch.equal(model.get_submodule(UP).unpacked(torch.float32), checkpoint.layers[UP].weight)
    scale *= 2**-16  # where float16 has two or three digits
    checkpoint.entry |= torchao_entry("FqnToConfig")
    with pytest.raises(
        ValueError, match=f"{UP} cannot be .*: its scales and zero points must lose at most 0.00195312 in"
    ):
        convert(checkpoint.save(tmp_path))


@pytest.mark.parametrize(("block", "made"), [([192, 128], "int8_g128"), ([2, 32], "int8_g32"), ([1, 256], "int8_g128")])
def test_a_scale_of_other_blocks_is_repeated(block, made, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 192}
    checkpoint = foreign_checkpoint("torchao-8-sym-row", size=128, **sizes)
    shape = (192 // block[0], 256 // block[1])
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5).half()
    checkpoint.metadata[f"{UP}.weight"]["_data"]["block_size"] = block
    checkpoint.tensors |= {f"{UP}._weight_scale": scale.float(), f"{UP}._weight_zero_point": torch.zeros(shape)}
    model, errors = convert(checkpoint.save(tmp_path, shards=2))
    kept = model.get_submodule(UP)
    assert kept.row_format.name == made and len(errors) == LAYERS
    each = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(kept.unpacked(torch.float32), (checkpoint.layers[UP].q - 128) * each)


def set_attribute(name, value):
    return lambda c: c.metadata[f"{UP}.weight"]["_data"].update({name: value})


def set_part(name, make):
    return lambda c: c.tensors.update({f"{UP}._weight_{name}": make(c.tensors.get(f"{UP}._weight_{name}"))})


def drop(name):
    return lambda c: c.tensors.pop(f"{UP}._weight_{name}")


def another_class(c):
    c.metadata[f"{UP}.weight"]["_type"] = "Int4PlainInt32Tensor"


FLOAT8 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("int4", another_class, "its class of torchao must be Int4Tensor or Int4TilePacked.*, got 'Int4PlainInt32"),
        ("int4", set_attribute("activation_dtype", FLOAT8), "its inputs must not be .*, got activation_dtype float8"),
        ("int4", set_part("act_pre_scale", lambda t: torch.ones(128)), "its inputs must not be .*, got act_pre_scale"),
        ("8-sym", set_attribute("act_quant_kwargs", {"_type": "X"}), "its inputs must not be .*, got act_quant_kwargs"),
        ("intx", set_attribute("activation_quantization", "int8_asym"), "its inputs must .*, got activation_quant"),
        ("intx", set_attribute("target_dtype", {"_data": "int3"}), "target_dtype must be int4 or int8, got 'int3'"),
        ("int4", set_attribute("block_size", [1, 64.0]), r"block_size must be two sizes, got \[1, 64.0\]"),
        ("int4", set_attribute("block_size", [1, 96]), r"block_size must divide \[192, 128\], got \[1, 96\]"),
        ("int4", set_attribute("block_size", [1, 16]), "block_size must be multiples of 32 inputs, got 16"),
        ("int4", set_attribute("block_size", [1, 32]), r"its scale must be \[192, 4\], got \[192, 2\]"),
        ("int4", drop("scale"), "the checkpoint has no _weight_scale for it"),
        ("int4", drop("zero_point"), "the checkpoint has no _weight_zero_point for it"),
        ("int4", set_part("qdata", lambda t: t[:64].clone()), r"its qdata must be \[192, 128\], got \[64, 128\]"),
        ("int4", set_part("qdata", torch.Tensor.int), "its qdata must be torch.int8 or torch.uint8, got torch.int32"),
        ("int4-tiled", set_part("qdata", lambda t: t[..., :2].clone()), "its qdata must be .*, got .*, 32, 2]"),
        ("int4", set_part("zero_point", lambda t: t.fill_(math.nan)), "zeros must be finite, got nan"),
        ("int4", set_part("zero_point", lambda t: t.fill_(1e5)), "zeros must be finite, got -inf"),
        ("8-sym", set_part("zero_point", lambda t: t.fill_(3)), "zero points of 8 bits must be 0, got 3"),
    ],
)
def test_what_a_layer_says_is_refused(layout, change, message, tmp_path):
    checkpoint = foreign_checkpoint(f"torchao-{layout}")
    change(checkpoint)
    with pytest.raises(ValueError, match=f"{UP} cannot be converted: {message}"):
        convert(checkpoint.save(tmp_path))


@pytest.mark.parametrize("given", ["int4_weight_only", {"default": {"_type": "Float8WeightOnlyConfig"}}, None])
def test_other_kinds_are_refused(given, tmp_path):
    checkpoint = foreign_checkpoint("torchao-int4")
    checkpoint.entry["quant_type"] = given
    with pytest.raises(ValueError, match=r"cannot be converted: quant_type must be Int4WeightOnlyConfig or .*, got"):
        convert(checkpoint.save(tmp_path))


def test_pickled_files_and_files_without_metadata_are_refused(tmp_path):
    checkpoint = foreign_checkpoint("torchao-int4")
    checkpoint.metadata = {}
    directory = checkpoint.save(tmp_path)
    with pytest.raises(ValueError, match=f"{directory} cannot .*: its safetensors files must have torchao's metadata"):
        convert(directory)
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{directory} cannot be converted: it has no safetensors files, and pickled"):
        convert(directory)


@pytest.mark.gpu
def test_tiles_are_those_of_the_cuda_op():
    q = torch.randint(16, (24, 1024), generator=torch.Generator().manual_seed(0))
    packed = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to("cuda", torch.uint8), 8).cpu()
    assert torch.equal(packed, tiles(q.numpy())) and torch.equal(_untiled(packed).long(), q)


@pytest.mark.parametrize("kind", ["int8", "int8-group", "intx-4"])
def test_what_torchao_itself_writes(kind, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int8-group": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(64)),
        "intx-4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
    }[kind]()
    dense = tiny_model("llama", hidden_size=128, intermediate_size=192, tie_word_embeddings=False)
    dense.bfloat16().save_pretrained(tmp_path / "dense")
    options = {"quantization_config": TorchAoConfig(config), "dtype": torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    theirs.save_pretrained(tmp_path / "torchao", max_shard_size="60KB")
    ours, errors = convert(tmp_path / "torchao")
    linears = quantized_linears(ours)
    assert len(errors) == LAYERS and len(linears) == 7 * LAYERS
    for name, linear in linears.items():
        if not linear.input_rows:
            assert torch.equal(linear.unpacked(torch.bfloat16), theirs.get_submodule(name).weight.dequantize()), name
    assert (logits(ours, few()) - logits(theirs, few())).norm() < 0.03 * logits(theirs, few()).norm()


@pytest.mark.parametrize(
    ("layout", "kind"), [("torchao-int4", "Int4Tensor"), ("torchao-int4-tiled", "Int4TilePackedTo4dTensor")]
)
def test_parts_are_those_that_torchao_saves(layout, kind):
    """int4 needs a GPU to be made, but not to be taken apart."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    checkpoint = foreign_checkpoint(layout)
    ours = {name: part for name, part in checkpoint.tensors.items() if name.startswith(UP)}
    parts = {name.removeprefix(f"{UP}._weight_"): part for name, part in ours.items()}
    weight = getattr(quantization, kind)(**parts, block_size=[1, 64], shape=torch.Size([192, 128]))
    theirs, metadata = flatten_tensor_state_dict({f"{UP}.weight": weight})
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    saved = json.loads(metadata[f"{UP}.weight"])
    assert saved.pop("_tensor_data_names") and saved == checkpoint.metadata[f"{UP}.weight"]
