"""Random packed rows, and cases of ``sparse_mlp_packed`` made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from support.op_cases import Case, set_thresholds
from torch import Tensor

from cats_ext.rows import FORMATS, RowFormat

# hidden sizes that a group size divides: tiny, not a multiple of 128, with a short last tile
HIDDEN = {0: [1, 6, 123, 1000], 32: [32, 160, 1056], 64: [64, 576, 1088], 128: [128, 1152, 4096]}


def random_rows(row_format: RowFormat, rows: int, hidden: int, scale: float, generator: torch.Generator) -> Tensor:
    """Every code of the format, with scales of either sign, so that the weights have a spread of about ``scale``."""
    on = dict(generator=generator, device=generator.device)
    size, per_group = (rows, hidden), (rows, row_format.groups(hidden))
    scales = scale * (0.5 + torch.rand(per_group, **on)) * (1 - 2 * torch.randint(2, per_group, **on))
    if row_format.type == "fp8":
        q = torch.randn(size, **on).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return row_format.pack(q, scales / 100)
    if row_format.type == "int8":
        return row_format.pack(torch.randint(-128, 128, size, **on).to(torch.int8), (scales / 74).half())
    q = torch.randint(16, size, **on).to(torch.uint8)
    zeros = (6 + 3 * torch.rand(per_group, **on)).half() if row_format.zero_points else None
    return row_format.pack(q, (scales / 4.6).half(), zeros)


@dataclass
class PackedCase(Case):
    """One call of ``sparse_mlp_packed``; ``weights`` are those that the rows stand for."""

    rows: list[Tensor] = field(default_factory=list)
    formats: tuple[str, str, str] = ("", "", "")

    def args(self, **changed: Any) -> tuple:
        x, *_, threshold, down_threshold, activation, gate_bias, up_bias, down_bias = super().args(**changed)
        rule = (threshold, down_threshold, activation)
        return x, *changed.get("rows", self.rows), *self.formats, *rule, gate_bias, up_bias, down_bias


def make_packed_case(
    tokens: int,
    hidden: int,
    intermediate: int,
    formats: str | tuple[str, str, str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rule: str = "scalar, vector",
    activation: str = "silu",
    bias: bool = False,
    sparsity: float = 0.5,
    seed: int = 0,
) -> PackedCase:
    """As ``make_case``, of packed rows in one format or one for each matrix."""
    formats = (formats,) * 3 if isinstance(formats, str) else formats
    generator = torch.Generator().manual_seed(seed)
    normal = lambda n, scale: (torch.randn(n, generator=generator) * scale).to(dtype).to(device)  # noqa: E731
    rows = [
        random_rows(FORMATS[name], intermediate, hidden, scale, generator)
        for name, scale in zip(formats, (hidden**-0.5, hidden**-0.5, intermediate**-0.5), strict=True)
    ]
    weights = [FORMATS[name].unpack(w, hidden).to(device) for name, w in zip(formats, rows, strict=True)]
    rows = [w.to(device) for w in rows]
    biases = [normal(n, 0.3) if bias else None for n in (intermediate, intermediate, hidden)]
    x = normal(tokens * hidden, 1.0).view(tokens, hidden)
    case = PackedCase(x, weights, biases, activation, rows=rows, formats=formats)
    set_thresholds(case, rule, sparsity, seed)
    return case


def matmul_difference(
    x: Tensor, rows: Tensor, row_format: str, columns: int, input_rows: bool, bias: Tensor | None, y: Tensor
) -> str:
    """What is wrong with ``y``, the result of packed_matmul, against float64; empty if nothing is.

    Weights are rounded to the dtype of ``x``; with zero points the kernel rounds some to the number next to that. Sums
    are rounded to float32 and once to the dtype.
    """
    weight = FORMATS[row_format].unpack(rows, columns, x.dtype).double()
    weight = weight if input_rows else weight.t()
    wide = x.double()
    expected = wide @ weight + (0 if bias is None else bias.double())
    if y.shape != expected.shape or y.dtype != x.dtype:
        return f"{y.dtype} of shape {list(y.shape)}, expected {x.dtype} of shape {list(expected.shape)}"
    step = 2.0 ** (-8 if x.dtype == torch.bfloat16 else -11)
    norms = wide.norm(dim=-1, keepdim=True) * weight.norm(dim=0)  # of what is summed up
    allowed = 1.05 * step * expected.abs() + 2e-6 * norms + 1e-7
    if FORMATS[row_format].zero_points:
        allowed += step / 4 * norms + 2 * step * wide.abs().amax(-1, keepdim=True) * weight.abs().amax(0)
    off = (y.double() - expected).abs() - allowed
    wrong = (off > 0) | (y.isnan() != expected.isnan())
    return f"off by {float(off.max()):.3g} more than allowed, {int(wrong.sum())} values" if wrong.any() else ""
