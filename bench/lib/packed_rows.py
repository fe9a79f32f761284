"""Random packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from cats_ext.rows import RowFormat


def random_packed(form: RowFormat, rows: int, hidden: int, device: torch.device | str = "cuda") -> Tensor:
    """Rows of about unit norm. Rounding real weights would take longer than all measurements."""
    like = {"device": device}
    q = {
        # Of mean 0, as trained weights are: 8 stands for 0 without zero points.
        "int4": lambda: torch.randint(0 if form.zero_points else 1, 16, (rows, hidden), dtype=torch.uint8, **like),
        "int8": lambda: torch.randint(-127, 128, (rows, hidden), dtype=torch.int8, **like),
        "fp8": lambda: (torch.randn(rows, hidden, **like) * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
    }[form.type]()
    spread = {"int4": 4.6 if form.zero_points else 4.3, "int8": 73.3, "fp8": 100.0}[form.type]
    scales = (0.75 + 0.5 * torch.rand(rows, form.groups(hidden), **like)) / (spread * hidden**0.5)
    zeros = torch.full_like(scales, 7.5).half() if form.zero_points else None
    return form.pack(q, scales.to(torch.float32 if form.type == "fp8" else torch.float16), zeros)
