"""The arguments of ``unpack_rows`` for ``op_calls``: right ones, what they give, and wrong ones."""

from __future__ import annotations

import random
from typing import Any

import torch
from support.op_cases import DTYPES
from support.packed_rows import random_rows
from torch import Tensor

from cats_ext.ops import reference
from cats_ext.rows import FORMATS


def make(r: random.Random, g: torch.Generator) -> dict[str, Any]:
    columns = r.choice([1, r.randint(1, 300), 32 * r.randint(1, 40), 128 * r.randint(1, 20)])
    form = FORMATS[r.choice([k for k, f in FORMATS.items() if not f.group_size or columns % f.group_size == 0])]
    rows = random_rows(form, r.choice([1, r.randint(1, 60)]), columns, 1.0, g)
    gap = 16 * r.choice([0, 0, 1, 3])
    rows = torch.nn.functional.pad(rows, (0, gap))[r.choice([0, 0, 1]) :, : rows.shape[1]]
    return {"rows": rows, "row_format": form.name, "columns": columns, "dtype": r.choice(DTYPES)}


def expected(arguments: dict[str, Any]) -> Tensor:
    return reference.unpack_rows_ref(arguments["rows"].cpu(), *list(arguments.values())[1:])


def spoil(r: random.Random, arguments: dict[str, Any]) -> str:
    """Make one argument wrong. Returns what."""
    rows, columns = arguments["rows"], arguments["columns"]
    wrong = {
        "rows": [
            rows[:, :-1], torch.cat([rows, rows], 1), rows[None], rows[:0, 0], rows.int(), rows.view(torch.int8),
            rows.to_sparse(), torch.stack([rows, rows], -1)[..., 0], 1, "x", [rows],
        ],
        "row_format": ["", "int3", "int4", "INT4_G128", "int4_g128 ", "int4_g\x00128", "x" * 200, None, 4],
        "columns": [0, -1, -128, columns + 128, 2**32 + columns, 2**40, 1.5, "x", None],
        "dtype": [torch.float64, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64, "float32", None],
    }  # fmt: skip
    name = r.choice(list(wrong))
    arguments[name] = r.choice(wrong[name])
    return f"with a wrong {name}"
