"""Checkpoints that torchao quantised and transformers saved as safetensors: what they say, and unpacking their tensors.

A weight is stored in parts, layer L's as ``L._weight_qdata``, ``L._weight_scale`` and so on. Which of torchao's tensor
classes it was, and with what attributes, is JSON under the weight's name in the metadata of the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cats_ext.quantization.foreign import Unpack, check_shape, one_of
from cats_ext.rows import Fields, RowFormat
from cats_ext.rows.formats import CENTRE, GROUP_SIZES

_CONFIGS = ("Int4WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "FqnToConfig", "ModuleFqnToConfig")
_CLASSES = ("Int4Tensor", "Int4TilePackedTo4dTensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
_PARTS = ("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale", "act_quant_scale", "act_quant_zero_point")


class TorchaoScheme:
    """How the quantised layers of a checkpoint are stored: each says so itself."""

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> TorchaoScheme:
        """From the entry ``quantization_config``. Raises ValueError if it describes what cannot be converted."""
        kind = entry.get("quant_type")
        if isinstance(kind, Mapping) and isinstance(kind.get("default"), Mapping):
            kind = kind["default"].get("_type")
        one_of("quant_type", kind, _CONFIGS)  # a plain string is of early versions, which could only be pickled
        return cls()

    def layers(self, files: Mapping[str, safe_open]) -> dict[str, Unpack]:
        """The quantised layers of a checkpoint, and what unpacks each."""
        metadata: dict[str, str] = {}
        for file in {id(file): file for file in files.values()}.values():
            metadata |= file.metadata() or {}
        if "tensor_names" not in metadata:
            raise ValueError("its safetensors files must have torchao's metadata, got none")
        stored = {name: json.loads(metadata[name]) for name in json.loads(metadata["tensor_names"])}
        return {
            name.removesuffix(".weight"): _Weight(entry["_type"], entry.get("_data") or {}).unpack
            for name, entry in stored.items()
            if entry["_type"] != "Tensor"
        }

    @staticmethod
    def tensors_of(layer: str) -> set[str]:
        """Names of the tensors that a quantised layer may have, but for its bias."""
        return {f"{layer}._weight_{part}" for part in _PARTS}


@dataclass(frozen=True)
class _Weight:
    """A layer's weight: torchao's class of tensors, and its attributes."""

    kind: str
    attributes: Mapping[str, Any]

    def unpack(self, get: Mapping[str, Tensor], outputs: int, inputs: int) -> tuple[RowFormat, Fields]:
        """As :meth:`cats_ext.quantization.foreign.Scheme.unpack`; scales and zero points may be no float16 values."""
        one_of("its class of torchao", self.kind, _CLASSES)
        self._check_activations(get)
        parts = {part: get.get(f"_weight_{part}") for part in _PARTS}
        needed = ("qdata", "scale_and_zero") if self.kind == "Int4TilePackedTo4dTensor" else ("qdata", "scale")
        for part in needed:
            if parts[part] is None:
                raise ValueError(f"the checkpoint has no _weight_{part} for it")
        rows, columns = self._block(outputs, inputs)
        size = next((size for size in reversed(GROUP_SIZES) if columns % size == 0), None)
        if size is None:
            raise ValueError(f"block_size must be multiples of {GROUP_SIZES[0]} inputs, got {columns}")
        bits, q, scales, zeros = self._integers(parts, outputs, inputs, inputs // columns)
        check_shape("qdata", q, (outputs, inputs))
        for name, t in (("scale", scales), ("zero_point", zeros)):
            check_shape(name, t, (outputs // rows, inputs // columns))
        scales, zeros = (t.repeat_interleave(rows, 0).repeat_interleave(columns // size, 1) for t in (scales, zeros))
        if bits == 4:
            symmetric = bool((zeros == CENTRE).all())
            return RowFormat("int4", size, not symmetric), Fields(q, scales, None if symmetric else zeros)
        if zeros.any():
            raise ValueError(f"zero points of 8 bits must be 0, got {float(zeros[zeros != 0][0]):g}")
        return RowFormat("int8", size), Fields(q, scales)

    def _check_activations(self, get: Mapping[str, Tensor]) -> None:
        dtype = (self.attributes.get("activation_dtype") or {}).get("_data", "bfloat16")  # float8 if they are quantised
        changed = [name for name in ("act_quant_kwargs", "activation_quantization") if self.attributes.get(name)]
        changed += [f"activation_dtype {dtype}"] * (dtype != "bfloat16")
        changed += [name for name in ("act_pre_scale", "act_quant_scale") if f"_weight_{name}" in get]
        if changed:
            raise ValueError(f"its inputs must not be quantised or scaled, got {changed[0]}")

    def _block(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        block = self.attributes.get("block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(type(each) is int and each > 0 for each in block):
            raise ValueError(f"block_size must be two sizes, got {block!r:.50}")
        if outputs % block[0] or inputs % block[1]:
            raise ValueError(f"block_size must divide {[outputs, inputs]}, got {block}")
        return block[0], block[1]

    def _integers(
        self, parts: Mapping[str, Tensor | None], outputs: int, inputs: int, groups: int
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        """Bits, the integers ``[outputs, inputs]`` as rows have them, and float32 scales and zero points by block."""
        q = parts["qdata"]
        if self.kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            target = (self.attributes.get("target_dtype") or {}).get("_data", "int8")
            bits = {"int4": 4, "int8": 8}[one_of("target_dtype", target, ("int4", "int8"))]
            _check_dtype(q, torch.int8)
            scales, zeros = parts["scale"].float(), parts["zero_point"]
            zeros = torch.zeros_like(scales) if zeros is None else zeros.float()
            return (bits, q, scales, zeros) if bits == 8 else (bits, (q + CENTRE).view(torch.uint8), scales, zeros + 8)
        # Both compute (q - 8) * scale + zero, with a real number for zero.
        if self.kind == "Int4Tensor":
            _check_dtype(q, torch.int8, torch.uint8)
            q = q.view(torch.uint8)
            q = torch.stack((q & 15, q >> 4), -1).flatten(1) ^ 8  # of two's complement
            scales, zeros = parts["scale"].t(), parts["zero_point"]
            if zeros is None:
                raise ValueError("the checkpoint has no _weight_zero_point for it")
            zeros = zeros.t()
        else:
            q = _untiled(q)[:outputs, :inputs]  # padded to whole tiles
            scales, zeros = parts["scale_and_zero"][:groups, :outputs].permute(2, 1, 0)
        scales = scales.float()
        return 4, q, scales, CENTRE - zeros.float() / scales


def _untiled(packed: Tensor) -> Tensor:
    """The integers, ``[8 n, 128 k]``, in the tiles of CUDA's ``_weight_int4pack_mm``, int32 ``[n, k, 32, 4]``.

    Of the 32 lanes of a warp four share an output. A lane's word has inputs of two tensor core tiles of 16: of each
    tile four, two from either half, those with even numbers in the lower 16 bits.
    """
    _check_dtype(packed, torch.int32)
    if packed.dim() != 4 or packed.shape[2:] != (32, 4):
        raise ValueError(f"its qdata must be [outputs / 8, inputs / 128, 32, 4], got {list(packed.shape)}")
    nibbles = torch.stack([(packed >> shift & 15).to(torch.uint8) for shift in range(0, 32, 4)], -1)
    n, k = packed.shape[:2]
    by_place = nibbles.view(n, k, 8, 4, 4, 2, 2, 2)  # outputs; lane of four, word, odd, tile, half
    return by_place.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(8 * n, 128 * k)


def _check_dtype(q: Tensor, *allowed: torch.dtype) -> None:
    if q.dtype not in allowed:
        raise ValueError(f"its qdata must be {' or '.join(map(str, allowed))}, got {q.dtype}")
