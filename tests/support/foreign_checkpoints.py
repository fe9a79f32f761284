"""Tiny checkpoints as AWQ, GPTQ, compressed-tensors and torchao write them, and the dense models they stand for.

Each packer follows the definition of its layout, value by value: where an integer's bits are in which int32.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support.models import tiny_model
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble holds, from the lowest


@dataclass
class Layer:
    """What a quantised layer stands for: ``w[o, i] = (q[o, i] - zeros[o, g]) * scales[o, g]``, i in group g."""

    q: Tensor  # [outputs, inputs], not negative; of fp8 the values themselves
    zeros: Tensor  # [outputs, groups]
    scales: Tensor  # [outputs, groups]

    @property
    def weight(self) -> Tensor:
        size = self.q.shape[1] // self.scales.shape[1]
        zeros, scales = (t.float().repeat_interleave(size, 1) for t in (self.zeros, self.scales))
        return (self.q.float() - zeros) * scales


def random_layer(linear: nn.Linear, bits: int, size: int, symmetric: bool, generator: torch.Generator) -> Layer:
    shape = (linear.out_features, linear.in_features // size)
    top = 1 << bits
    q = torch.randint(top, tuple(linear.weight.shape), generator=generator)
    zeros = torch.randint(1, top, shape, generator=generator)  # AutoGPTQ cannot write 0
    zeros = torch.full(shape, top // 2) if symmetric else zeros
    scales = (torch.rand(shape, generator=generator) + 0.5) * 0.2 / top
    return Layer(q, zeros, scales.half())


def fp8_layer(linear: nn.Linear, per_tensor: bool, generator: torch.Generator) -> Layer:
    q = torch.randn(tuple(linear.weight.shape), generator=generator) * 100
    q = q.clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = (torch.rand(1 if per_tensor else linear.out_features, 1, generator=generator) + 0.5) * 1e-3
    scales = scales.to(torch.bfloat16).expand(linear.out_features, 1)
    return Layer(q, torch.zeros(scales.shape), scales)


def words(values: np.ndarray, bits: int) -> Tensor:
    """``[rows, n]`` to int32 ``[rows, n * bits / 32]``, the first integer in the lowest bits; zeros at the end."""
    per = 32 // bits
    rows, n = values.shape
    out = np.zeros((rows, -(-n // per)), dtype=np.uint32)
    for i in range(n):
        out[:, i // per] |= values[:, i].astype(np.uint32) << np.uint32(bits * (i % per))
    return torch.from_numpy(out.view(np.int32).copy())


def awq_tensors(layer: Layer) -> dict[str, Tensor]:
    def along_outputs(t: Tensor) -> Tensor:  # [outputs, n] to [n, outputs / 8]
        columns = [8 * word + output for word in range(len(t) // 8) for output in AWQ_ORDER]
        return words(t.numpy().T[:, columns], 4)

    return {
        "qweight": along_outputs(layer.q),
        "qzeros": along_outputs(layer.zeros),
        "scales": layer.scales.t().contiguous(),
    }


def gptq_tensors(layer: Layer, bits: int, offset: int) -> dict[str, Tensor]:
    inputs = layer.q.shape[1]
    return {
        "qweight": words(layer.q.numpy(), bits).t().contiguous(),
        "qzeros": words(layer.zeros.numpy().T - offset, bits),
        "scales": layer.scales.t().contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // layer.scales.shape[1]),
    }


def pack_quantized_tensors(layer: Layer, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """q and zeros are stored as signed integers plus half of their range: as the layer has them."""
    tensors = {
        "weight_packed": words(layer.q.numpy(), bits),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(layer.zeros.numpy().T, bits).t().contiguous()
    return tensors


def float_quantized_tensors(layer: Layer, per_tensor: bool) -> dict[str, Tensor]:
    return {"weight": layer.q, "weight_scale": layer.scales[0] if per_tensor else layer.scales.contiguous()}


def tiles(q: np.ndarray) -> Tensor:
    """``[outputs, inputs]`` as CUDA's ``_convert_weight_to_int4pack`` has it, padded to 1,024 inputs as by torchao."""
    padded = np.zeros((len(q), -(-q.shape[1] // 1024) * 1024), dtype=np.uint32)
    padded[:, : q.shape[1]] = q
    out = np.zeros((len(q) // 8, padded.shape[1] // 128, 32, 4), dtype=np.uint32)
    for lane, word, i in itertools.product(range(32), range(4), range(8)):
        input_of_word = lane % 4 * 2 + (0, 8, 16, 24, 1, 9, 17, 25)[i]
        out[:, :, lane, word] |= padded[lane // 4 :: 8, 32 * word + input_of_word :: 128] << np.uint32(4 * i)
    return torch.from_numpy(out.view(np.int32))


def torchao_tensors(layer: Layer, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parts of a weight, and the entry of the metadata."""
    outputs, inputs = layer.q.shape
    data: dict[str, Any] = {"block_size": [1, inputs // layer.scales.shape[1]]}
    if "8" in layout or "intx" in layout:
        half = 128 if "8" in layout else 8
        parts = {"qdata": (layer.q - half).to(torch.int8), "zero_point": (layer.zeros - half).to(torch.int8)}
        if "intx" in layout:
            kind, parts["scale"] = "IntxUnpackedToInt8Tensor", layer.scales.to(torch.bfloat16)
            bits = "int8" if "8" in layout else "int4"
            data |= {"target_dtype": {"_type": "torch.dtype", "_data": bits}, "activation_quantization": None}
        else:
            kind, parts["scale"] = "Int8Tensor", layer.scales.float()
            data |= {"act_quant_kwargs": None, "reduce_range": False}
        return {f"_weight_{name}": part for name, part in parts.items()}, {"_type": kind, "_data": data}
    scales = layer.scales.to(torch.bfloat16)
    zeros = ((8 - layer.zeros) * layer.scales.float()).to(torch.bfloat16)
    data["shape"] = [outputs, inputs]
    if "tiled" in layout:
        groups = -(-inputs // 1024) * 1024 // data["block_size"][1]
        both = torch.zeros(groups, outputs, 2, dtype=torch.bfloat16)
        both[: scales.shape[1]] = torch.stack((scales.t(), zeros.t()), 2)
        parts = {"qdata": tiles(layer.q.numpy()), "scale_and_zero": both}
        kind = "Int4TilePackedTo4dTensor"
    else:
        signed = (layer.q - 8 & 15).to(torch.uint8)
        packed = (signed[:, ::2] | signed[:, 1::2] << 4).view(torch.int8)
        parts = {"qdata": packed, "scale": scales.t().contiguous(), "zero_point": zeros.t().contiguous()}
        kind = "Int4Tensor"
        data["activation_dtype"] = {"_type": "torch.dtype", "_data": "bfloat16"}
    return {f"_weight_{name}": part for name, part in parts.items()}, {"_type": kind, "_data": data}


def torchao_entry(kind: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": {}, "_version": 2}}}


def compressed_entry(**weights: Any) -> dict[str, Any]:
    form = "float-quantized" if weights["type"] == "float" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "actorder": None} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def entry_and_tensors(layout: str, linears: dict[str, nn.Linear], size: int, generator: torch.Generator):
    """The entry ``quantization_config``, of each layer what it stands for and its tensors, and their metadata."""
    bits, symmetric = (8 if "8" in layout else 4), "sym" in layout
    layers: dict[str, Layer] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, Any] = {}
    for name, linear in linears.items():
        if "fp8" in layout:
            layers[name] = fp8_layer(linear, "tensor" in layout, generator)
            tensors[name] = float_quantized_tensors(layers[name], "tensor" in layout)
            continue
        of_layer = linear.in_features if "row" in layout else size
        layers[name] = layer = random_layer(linear, bits, of_layer, symmetric, generator)
        if layout == "awq":
            tensors[name] = awq_tensors(layer)
        elif layout.startswith("gptq"):
            tensors[name] = gptq_tensors(layer, bits, 0 if "v2" in layout else 1)
        elif layout.startswith("torchao"):
            # Few digits, so that bfloat16 has zero points exactly.
            layer.scales = layer.scales.to(torch.float8_e5m2).half()
            tensors[name], metadata[name] = torchao_tensors(layer, layout)
        else:
            layer.scales = layer.scales.to(torch.bfloat16)
            tensors[name] = pack_quantized_tensors(layer, bits, symmetric)
    if layout == "awq":
        entry = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    elif layout.startswith("gptq"):
        entry = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": symmetric}
        entry |= {"checkpoint_format": "gptq_v2" if "v2" in layout else "gptq"}
    elif layout.startswith("torchao"):
        kind = "Intx" if "intx" in layout else "Int8" if bits == 8 else "Int4"
        entry = torchao_entry(f"{kind}WeightOnlyConfig")
    elif "fp8" in layout:
        strategy = "tensor" if "tensor" in layout else "channel"
        entry = compressed_entry(num_bits=8, type="float", strategy=strategy, symmetric=True, group_size=None)
    else:
        entry = compressed_entry(num_bits=bits, type="int", strategy="group", symmetric=symmetric, group_size=size)
    return entry, layers, tensors, metadata


LAYOUTS = ("awq", "gptq-sym", "gptq", "gptq-v2", "gptq-8-sym", "ct-sym", "ct", "ct-8-sym", "ct-fp8", "ct-fp8-tensor")
LAYOUTS += ("torchao-int4", "torchao-int4-sym", "torchao-int4-tiled", "torchao-intx", "torchao-intx-8-sym")
LAYOUTS += ("torchao-8-sym", "torchao-8-sym-row")


@dataclass
class ForeignCheckpoint:
    """A checkpoint that can be changed before it is written.

    Attributes:
        dense: the model that it stands for.
        layers: what each quantised layer stands for.
        tensors: of the file, by name.
        entry: ``quantization_config``.
        metadata: of the files; of torchao what each tensor was, as an object.
    """

    dense: nn.Module
    layers: dict[str, Layer]
    tensors: dict[str, Tensor]
    entry: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path, shards: int = 1) -> Path:
        directory.mkdir(exist_ok=True, parents=True)
        self.dense.config.save_pretrained(directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": self.entry}))
        metadata = {name: json.dumps(value) for name, value in self.metadata.items()} | {"format": "pt"}
        if shards == 1:
            save_file(self.tensors, directory / "model.safetensors", metadata)
            return directory
        names = sorted(self.tensors)
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: self.tensors[name] for name in names if files[name] == file}, directory / file, metadata)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return directory


def foreign_checkpoint(
    layout: str, family: str = "llama", size: int = 64, dense: tuple[str, ...] = ("lm_head",), **arguments: Any
) -> ForeignCheckpoint:
    """A tiny model of ``family`` in ``layout``, but for linear layers with one of ``dense`` in their names."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
    model = tiny_model(family, **(sizes | arguments))
    named = model.named_modules()
    linears = {n: m for n, m in named if isinstance(m, nn.Linear) and not any(part in n for part in dense)}
    entry, layers, packed, metadata = entry_and_tensors(layout, linears, size, torch.Generator().manual_seed(0))
    tensors = copy.deepcopy(dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    for name, layer in layers.items():
        tensors.pop(f"{name}.weight", None)  # it may be tied
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed[name].items()}
        with torch.no_grad():
            linears[name].weight.copy_(layer.weight)
    if metadata:
        named = {name: {"_type": "Tensor"} for name in tensors} | {f"{k}.weight": v for k, v in metadata.items()}
        metadata = named | {"tensor_names": list(named)}
    return ForeignCheckpoint(model, layers, tensors, entry, metadata)
