"""The arguments of ``packed_matmul`` for ``op_calls``: right ones, what they give, and wrong ones."""

from __future__ import annotations

import random
from typing import Any

import torch
from support.packed_rows import matmul_difference, random_rows
from torch import Tensor

from cats_ext.rows import FORMATS


def make(r: random.Random, g: torch.Generator) -> dict[str, Any]:
    """Of what the kernel on a GPU takes, too: 16 bits, and multiples of 8."""
    columns = r.choice([8 * r.randint(1, 40), 32 * r.randint(1, 40), 128 * r.randint(1, 20)])
    form = FORMATS[r.choice([k for k, f in FORMATS.items() if not f.group_size or columns % f.group_size == 0])]
    count, input_rows = 8 * r.choice([1, r.randint(1, 60)]), r.random() < 0.5
    rows = random_rows(form, count, columns, 1.0, g)
    gap = 16 * r.choice([0, 0, 1, 3])
    rows = torch.nn.functional.pad(rows, (0, gap))[:, : rows.shape[1]]
    inputs, outputs = (count, columns) if input_rows else (columns, count)
    dtype = r.choice([torch.float16, torch.bfloat16])
    shape = r.choice([(r.randint(0, 200),), (r.randint(0, 3), r.randint(0, 40)), ()])
    x = torch.randn(*shape, inputs, generator=g).to(dtype)
    if len(shape) == 2 and r.random() < 0.3:
        x = x.transpose(0, 1)
    bias = torch.randn(outputs, generator=g).to(dtype) if r.random() < 0.5 else None
    return {
        "x": x, "rows": rows, "row_format": form.name, "columns": columns, "input_rows": input_rows, "bias": bias,
    }  # fmt: skip


def difference(arguments: dict[str, Any], y: Tensor) -> str:
    """What is wrong with the result; empty if nothing is."""
    return matmul_difference(*arguments.values(), y)


def spoil(r: random.Random, arguments: dict[str, Any]) -> str:
    """Make one argument wrong. Returns what."""
    x, rows, columns = arguments["x"], arguments["rows"], arguments["columns"]
    outputs = columns if arguments["input_rows"] else len(rows)
    wrong = {
        "x": [x[..., :-1], x.double(), x.int(), torch.cat([x, x], -1), x.new_zeros(()), x.to_sparse(), 1, [x], None],
        "rows": [
            rows[:, :-1], torch.cat([rows, rows], 1), rows[None], rows[:0], rows.int(), rows.view(torch.int8),
            rows.to_sparse(), torch.stack([rows, rows], -1)[..., 0], 1, "x", None,
        ],
        "row_format": ["", "int3", "int4", "INT4_G128", "int4_g128 ", "int4_g\x00128", "x" * 200, None, 4],
        "columns": [0, -1, -128, columns + 128, 2**32 + columns, 2**40, 1.5, "x", None],
        "bias": [
            x.new_zeros(outputs + 1), x.new_zeros(1, outputs), x.new_zeros(outputs).double(),
            x.new_zeros(2 * outputs)[::2], 1, "x",
        ],
    }  # fmt: skip
    name = r.choice(list(wrong))
    arguments[name] = r.choice(wrong[name])
    return f"with a wrong {name}"
