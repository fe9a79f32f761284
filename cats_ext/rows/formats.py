"""The formats of packed rows, as ``csrc/row_format.h`` defines them: names, sizes, packing and unpacking.

A packed matrix is uint8 ``[I, bytes]``: in each row the scales of a tile stand before the tile's data. Groups run along
H in all three matrices of an MLP, so that a neuron's row needs nothing outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
PADDED_TO = 128  # columns: kPackedColumns
ROW_ALIGNMENT = 16  # bytes: kChunkBytes
TILE_BYTES = 512  # of data, kTileChunks * kChunkBytes
STORED = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # what `q` is, one element a weight
CENTRE = 8  # what the zero point is in int4 without zero points


class Fields(NamedTuple):
    """What a packed matrix holds: ``w = (q - zeros) * scales``, with a scale for each group of columns."""

    q: Tensor  # [I, H]: uint8 of 0 to 15, int8 or float8_e4m3fn
    scales: Tensor  # [I, H / group_size], float16; of fp8 [I, 1], float32
    zeros: Tensor | None = None  # as scales: int4 with zero points; 8 in int4 without, 0 in the others


@dataclass(frozen=True)
class RowFormat:
    """How rows are packed. ``RowFormat.parse("int4_g128_zp")`` and ``RowFormat("int4", 128, True)`` are the same.

    Attributes:
        type: int4, int8 or fp8 (e4m3).
        group_size: columns that share a scale: 32, 64 or 128; 0 for fp8, which has one scale a row.
        zero_points: whether each group of int4 has a zero point too.

    Raises:
        ValueError: there is no such format.
    """

    type: str
    group_size: int = 0
    zero_points: bool = False

    def __post_init__(self) -> None:
        if self.type not in STORED:
            raise ValueError(f"type must be one of {', '.join(STORED)}, got {self.type!r}")
        sizes = (0,) if self.type == "fp8" else GROUP_SIZES
        if self.group_size not in sizes:
            allowed = ", ".join(map(str, sizes))
            raise ValueError(f"group_size of {self.type} must be one of {allowed}, got {self.group_size!r}")
        if self.zero_points and self.type != "int4":
            raise ValueError(f"zero_points must be False for {self.type}, got {self.zero_points!r}")

    @classmethod
    def parse(cls, name: str) -> RowFormat:
        """The format called ``name``. Raises ``ValueError`` if there is none."""
        if name not in FORMATS:
            raise ValueError(f"row format must be one of {', '.join(FORMATS)}, got {name!r}")
        return FORMATS[name]

    @property
    def name(self) -> str:
        if self.type == "fp8":
            return "fp8_e4m3"
        return f"{self.type}_g{self.group_size}" + ("_zp" if self.zero_points else "")

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales before each tile, filled up to a multiple of 16."""
        return -(-self._tile_scales // 16) * 16

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` columns."""
        data = self._data_bytes(columns)
        return data + -(-data // TILE_BYTES) * self.scale_bytes

    def groups(self, columns: int) -> int:
        """Scales of a row. Raises ``ValueError`` unless ``columns`` is a positive multiple of the group size."""
        if columns <= 0 or (self.group_size and columns % self.group_size):
            multiple = f" multiple of the group size of {self.name}" if self.group_size else " number"
            raise ValueError(f"columns must be a positive{multiple}, got {columns}")
        return columns // self.group_size if self.group_size else 1

    def pack(self, q: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """The rows of ``w = (q - zeros) * scales``: uint8 ``[I, row_bytes(H)]``, contiguous, on the device of ``q``.

        Args:
            q, scales, zeros: as in :class:`Fields`.

        Raises:
            ValueError: an argument has a wrong shape, dtype or device, ``q`` is out of range or NaN, or ``scales`` or
                ``zeros`` are not finite.
        """
        if q.dim() != 2 or q.dtype != STORED[self.type]:
            raise ValueError(f"q must be {STORED[self.type]} [I, H] for {self.name}, got {q.dtype} {list(q.shape)}")
        rows, columns = q.shape
        groups = self.groups(columns)
        self._check_per_group("scales", scales, (rows, groups), q.device)
        if self.zero_points != (zeros is not None):
            wanted = "given" if self.zero_points else "None"
            raise ValueError(f"zeros must be {wanted} for {self.name}, got {None if zeros is None else zeros.dtype}")
        if zeros is not None:
            self._check_per_group("zeros", zeros, (rows, groups), q.device)
        if self.type == "int4" and q.numel() and q.max() > 15:
            raise ValueError(f"q must be 0 to 15 for {self.name}, got {int(q.max())}")
        if self.type == "fp8" and q.float().isnan().any():
            raise ValueError(f"q must not be NaN for {self.name}")

        data = q.view(torch.uint8)
        if self.type == "int4":
            data = data[:, ::2] | data[:, 1::2] << 4
        per_group = scales if zeros is None else torch.stack((scales, zeros), -1).flatten(1)
        scale_data = per_group.contiguous().view(torch.uint8)
        packed = q.new_zeros(rows, self.row_bytes(columns), dtype=torch.uint8)
        for tile_scales, tile_data, of_scales, of_data in self._tiles(columns):
            packed[:, tile_scales] = scale_data[:, of_scales]
            packed[:, tile_data] = data[:, of_data]
        return packed

    def fields(self, packed: Tensor, columns: int) -> Fields:
        """What ``pack`` was given. Raises ``ValueError`` unless ``packed`` is uint8 ``[I, row_bytes(columns)]``."""
        self._check_packed(packed, columns)
        groups = self.groups(columns)
        tiles = list(self._tiles(columns))
        data = torch.cat([packed[:, tile_data] for _, tile_data, _, _ in tiles], 1)
        per_group = torch.cat([packed[:, tile_scales] for tile_scales, *_ in tiles], 1)
        if self.type == "int4":
            data = torch.stack((data & 15, data >> 4), -1).flatten(1)
        per_group = per_group.view(torch.float32 if self.type == "fp8" else torch.float16)
        scales, zeros = per_group.view(-1, groups, 2).unbind(2) if self.zero_points else (per_group[:, :groups], None)
        return Fields(data.view(STORED[self.type]), scales, zeros)

    def unpack(self, packed: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights ``[I, columns]``, computed in float32 and rounded to ``dtype``.

        Raises as :meth:`fields`, and on CUDA ``RuntimeError`` unless rows start at multiples of 16 bytes.
        """
        self._check_packed(packed, columns)
        if packed.stride(1) != 1:
            packed = packed.contiguous()
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return self.unpack(packed, columns).to(dtype)
        return torch.ops.cats.unpack_rows(packed, self.name, columns, dtype)

    def decode(self, q: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """``(q - zeros) * scales`` in float32, of ``q`` by groups: ``[I, groups, columns]``."""
        values = q.float()  # a copy: q is no float32
        if self.type == "int4":
            values.sub_(CENTRE if zeros is None else zeros.float().unsqueeze(2))
        return values.mul_(scales.float().unsqueeze(2))

    def _data_bytes(self, columns: int) -> int:
        padded = -(-columns // PADDED_TO) * PADDED_TO
        return padded // 2 if self.type == "int4" else padded

    def _check_packed(self, packed: Tensor, columns: int) -> None:
        self.groups(columns)
        row_bytes = self.row_bytes(columns)
        if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes:
            raise ValueError(
                f"packed must be torch.uint8 [I, {row_bytes}] for {columns} columns in {self.name}, "
                f"got {packed.dtype} {list(packed.shape)}"
            )

    def _check_per_group(self, name: str, t: Tensor, shape: tuple[int, int], device: torch.device) -> None:
        dtype = torch.float32 if self.type == "fp8" else torch.float16
        if t.dtype != dtype or tuple(t.shape) != shape or t.device != device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {device} for {self.name}, "
                f"got {t.dtype} {list(t.shape)} on {t.device}"
            )
        if not t.isfinite().all():
            raise ValueError(f"{name} must be finite, got {float(t[~t.isfinite()][0])}")

    @property
    def _scale_size(self) -> int:
        """Bytes of a scale, with its zero point."""
        return 4 if self.zero_points or self.type == "fp8" else 2

    @property
    def _tile_scales(self) -> int:
        """Bytes of the scales that a whole tile uses."""
        tile_columns = TILE_BYTES * (2 if self.type == "int4" else 1)
        return self._scale_size * (tile_columns // self.group_size if self.group_size else 1)

    def _tiles(self, columns: int) -> Iterator[tuple[slice, slice, slice, slice]]:
        """For each tile: where its scales and its data are in a row, and in all scales and all data, in bytes.

        Without the padding, which is zeros.
        """
        data = columns // 2 if self.type == "int4" else columns
        all_scales = self.groups(columns) * self._scale_size
        for tile, first in enumerate(range(0, data, TILE_BYTES)):
            begin = tile * (self.scale_bytes + TILE_BYTES)
            first_scale = tile * self._tile_scales if self.group_size else 0  # fp8 repeats its one scale
            scales = min(self._tile_scales, all_scales - first_scale)
            length = min(TILE_BYTES, data - first)
            yield (
                slice(begin, begin + scales),
                slice(begin + self.scale_bytes, begin + self.scale_bytes + length),
                slice(first_scale, first_scale + scales),
                slice(first, first + length),
            )


FORMATS: dict[str, RowFormat] = {
    form.name: form
    for form in (
        *(RowFormat("int4", size, zero_points) for zero_points in (False, True) for size in GROUP_SIZES),
        *(RowFormat("int8", size) for size in GROUP_SIZES),
        RowFormat("fp8"),
    )
}
