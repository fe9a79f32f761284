"""Checkpoints that AWQ, GPTQ and compressed-tensors wrote: what their config.json says, and unpacking their tensors.

The layouts are those of AutoAWQ's gemm kernels, of AutoGPTQ and GPTQModel, and of compressed-tensors. In all of them
int32 values hold integers of 4 or 8 bits, the first in the lowest bits, and groups of inputs share a scale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cats_ext.rows import Fields, RowFormat
from cats_ext.rows.formats import GROUP_SIZES

METHODS = ("awq", "gptq", "compressed-tensors", "torchao")
# A layer's tensors by the last part of their names, its outputs and inputs, to its weight as rows of its outputs.
Unpack = Callable[[Mapping[str, Tensor], int, int], tuple[RowFormat, Fields]]
# Of eight outputs, the place of each in AWQ's int32, whose places hold outputs 0, 2, 4, 6, 1, 3, 5 and 7.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# The tensor that says that a layer is quantised, and all that one may have, some of which have no use here.
_MARKS = {"awq": "qweight", "gptq": "qweight", "int": "weight_packed", "float": "weight_scale"}
_TENSORS = ("qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_zero_point")
_TENSORS += ("weight_shape", "weight_g_idx", "input_scale", "input_zero_point")


def method_of(directory: str | os.PathLike) -> str | None:
    """The method of :data:`METHODS` that the checkpoint in ``directory`` is quantised with; None if with none."""
    try:
        content = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        method = content["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it says what is wrong
        return None
    return method if method in METHODS else None


@dataclass(frozen=True)
class Scheme:
    """How the quantised layers of a checkpoint are stored.

    Attributes:
        layout: awq, gptq, or of compressed-tensors int (pack-quantized) or float (float-quantized).
        bits: of a weight, 4 or 8.
        group_size: inputs that share a scale; 0 of float, which has one scale an output, or for all of them.
        zero_offset: what is added to the zero points in the file: 1 in the first format of GPTQ.
    """

    layout: str
    bits: int
    group_size: int
    zero_offset: int = 0

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Scheme:
        """From the entry ``quantization_config``. Raises ValueError if it describes what cannot be converted."""
        method = one_of("quant_method", entry.get("quant_method"), METHODS)
        if method == "compressed-tensors":
            return cls._parse_compressed(entry)
        size = entry.get("group_size", entry.get("q_group_size"))
        if method == "awq":
            one_of("version", str(entry.get("version") or entry.get("format") or "gemm").lower(), ("gemm",))
            bits = one_of("bits", entry.get("bits", entry.get("w_bit")), (4,))
            return cls(method, bits, one_of("group_size", size, GROUP_SIZES))
        kind = entry.get("checkpoint_format") or entry.get("format") or "gptq"
        one_of("checkpoint_format", kind, ("gptq", "gptq_v2"))
        one_of("pack_dtype", entry.get("pack_dtype") or "int32", ("int32",))
        one_of("desc_act", bool(entry.get("desc_act")), (False,))
        dynamic = [rule for rule in entry.get("dynamic") or {} if not rule.startswith("-:")]  # those leave layers out
        if dynamic:
            raise ValueError(f"dynamic must give all quantised layers one format, got an entry for {dynamic[0]!r:.80}")
        bits = one_of("bits", entry.get("bits"), (4, 8))
        return cls(method, bits, one_of("group_size", size, GROUP_SIZES), int(kind == "gptq"))

    @classmethod
    def _parse_compressed(cls, entry: Mapping[str, Any]) -> Scheme:
        kind = one_of("format", entry.get("format"), ("pack-quantized", "float-quantized"))
        for name, part in (("sparsity_config", "format"), ("transform_config", "config_groups")):
            value = (entry.get(name) or {}).get(part)
            if value and value != "dense":
                raise ValueError(f"{name} must be empty, got {value!r:.80}")
        groups = [group["weights"] for group in entry.get("config_groups", {}).values() if group.get("weights")]
        names = ("num_bits", "type", "strategy", "group_size", "actorder")
        kinds = {tuple(weights.get(name) for name in names) for weights in groups}
        if len(kinds) != 1:
            raise ValueError(f"config_groups must give all quantised layers one format, got {sorted(kinds, key=str)}")
        bits, number, strategy, size, order = kinds.pop()
        one_of("actorder", order, (None, False, "weight", "static"))
        if kind == "float-quantized":
            one_of("type", number, ("float",))
            one_of("strategy", strategy, ("tensor", "channel"))
            return cls("float", one_of("num_bits", bits, (8,)), 0)
        one_of("type", number, ("int",))
        one_of("strategy", strategy, ("group",))
        return cls("int", one_of("num_bits", bits, (4, 8)), one_of("group_size", size, GROUP_SIZES))

    def layers(self, names: Iterable[str]) -> dict[str, Unpack]:
        """The quantised layers of a checkpoint with tensors of these names, and what unpacks each."""
        ending = "." + _MARKS[self.layout]
        return {name.removesuffix(ending): self.unpack for name in names if name.endswith(ending)}

    @staticmethod
    def tensors_of(layer: str) -> set[str]:
        """Names of the tensors that a quantised layer may have, but for its bias."""
        return {f"{layer}.{name}" for name in _TENSORS}

    def unpack(self, get: Mapping[str, Tensor], outputs: int, inputs: int) -> tuple[RowFormat, Fields]:
        """A layer's weight as rows of its outputs, without loss.

        Args:
            get: the layer's tensors, by the last part of their names.

        Raises:
            ValueError: a tensor is missing or of another shape, or a value has no place in the format.
        """
        missing = [name for name in self._needed() if name not in get]
        if missing:
            raise ValueError(f"the checkpoint has no {missing[0]} for it")
        if self.layout == "float":
            q, scales = get["weight"], get["weight_scale"].float().reshape(-1, 1)
            if q.dtype != torch.float8_e4m3fn:
                raise ValueError(f"its weight must be torch.float8_e4m3fn, got {q.dtype}")
            check_shape("weight", q, (outputs, inputs))
            if len(scales) == 1:
                scales = scales.expand(outputs, 1)
            check_shape("weight_scale", scales, (outputs, 1))
            return RowFormat("fp8"), Fields(q, scales)
        if inputs % self.group_size:
            raise ValueError(f"group_size must divide its {inputs} inputs, got {self.group_size}")
        q, scales, zeros = self._integers(get, outputs, inputs)
        per_group = (outputs, inputs // self.group_size)
        for name, t, shape in (("weight", q, (outputs, inputs)), ("scales", scales, per_group)):
            check_shape(name, t, shape)
        if zeros is not None:
            check_shape("zero points", zeros, per_group)
            if (zeros == 1 << (self.bits - 1)).all():
                zeros = None
        for name in ("g_idx", "weight_g_idx"):
            order = torch.arange(inputs) // self.group_size
            if name in get and not torch.equal(get[name].cpu().long(), order):
                raise ValueError(f"{name} must have groups of consecutive inputs, got another order (act-order)")
        scales = _as_float16(scales)
        if self.bits == 4:
            made = RowFormat("int4", self.group_size, zeros is not None)
            return made, Fields(q, scales, None if zeros is None else zeros.half())
        if zeros is not None:
            raise ValueError(f"zero points of 8 bits must be 128, got {int(zeros[zeros != 128][0])}")
        return RowFormat("int8", self.group_size), Fields((q ^ 0x80).view(torch.int8), scales)

    def _needed(self) -> tuple[str, ...]:
        if self.layout in ("awq", "gptq"):
            return "qweight", "qzeros", "scales"
        return ("weight_packed" if self.layout == "int" else "weight"), "weight_scale"

    def _integers(self, get: Mapping[str, Tensor], outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is stored for weights, ``[outputs, inputs]``, and scales and zero points, ``[outputs, groups]``."""
        if self.layout == "int":
            zeros = get.get("weight_zero_point")
            if zeros is not None and zeros.dtype != torch.int32:  # signed and not packed, in early files
                zeros = (zeros.to(torch.int32) + (1 << (self.bits - 1))).to(torch.uint8)
            elif zeros is not None:
                zeros = _split(zeros, self.bits, 0)[:outputs]
            return _split(get["weight_packed"], self.bits, 1)[:, :inputs], get["weight_scale"], zeros
        q = _split(get["qweight"], self.bits, 1 if self.layout == "awq" else 0)
        zeros = _split(get["qzeros"], self.bits, 1)
        if self.layout == "awq":
            q, zeros = (t.unflatten(1, (-1, 8))[:, :, list(_AWQ_PLACES)].flatten(1) for t in (q, zeros))
        if self.zero_offset:
            if (zeros == (1 << self.bits) - 1).any():  # a zero point of 0 wrapped around; readers do not agree on it
                raise ValueError(f"zero points in the file must be less than {(1 << self.bits) - 1}, got that")
            zeros = zeros + self.zero_offset
        return q.t().contiguous(), get["scales"].t(), zeros.t()


def _split(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The integers in int32 values, as uint8, side by side along ``dim``."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(f"packed integers must be torch.int32 with 2 dimensions, got {packed.dtype} {packed.dim()}")
    parts = [(packed >> shift & ((1 << bits) - 1)).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def _as_float16(scales: Tensor) -> Tensor:
    stored = scales.half()
    lost = stored.double() != scales.double()
    if lost.any():
        raise ValueError(f"scales must be float16 values, got {float(scales[lost][0]):g} in {scales.dtype}")
    return stored


def check_shape(name: str, t: Tensor, shape: tuple[int, int]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"its {name} must be {list(shape)}, got {list(t.shape)}")


def one_of(name: str, value: Any, allowed: tuple) -> Any:
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}, got {value!r:.80}")
    return value
