"""The arguments of ``packed_linear_step`` for ``op_calls``: right ones, what they give in fp64, and wrong ones."""

from __future__ import annotations

import random
from typing import Any

import torch
from support.op_cases import DTYPES
from torch import Tensor
from torch.nn.functional import pad

from cats_ext.ops import reference
from cats_ext.rows import FORMATS, quantize_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of the whole row
REQUIRED = ("x", "y", "largest", "total")  # of the tensors
_SPOILT_ROWS = (lambda w: w[:, :-1], lambda w: w[0], lambda w: w[:0], lambda w: w.float(), lambda w: w.mT)
_WRONG_DTYPES = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.float64)


def make(r: random.Random, g: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    dtype, merged = r.choice(DTYPES), r.random() < 0.3
    splits, heads, head_dim = r.randint(1, 6), r.randint(1, 5), 8 * r.randint(1, 12)
    inputs = heads * head_dim if merged else r.choice([1, r.randint(1, 300), 32 * r.randint(1, 20)])
    outputs = [r.choice([1, r.randint(1, 80)]) for _ in range(1 if merged else r.randint(1, 3))]
    form = FORMATS[r.choice([k for k, f in FORMATS.items() if not f.group_size or inputs % f.group_size == 0])]
    weights = []
    for n in outputs:
        rows, gap = quantize_rows(normal(n, inputs) * inputs**-0.5, form), 16 * r.choice([0, 0, 1, 3])
        weights.append(pad(rows, (0, gap))[:, : rows.shape[1]])
    made: dict[str, Any] = dict.fromkeys(("delta", "norm_weight", "residual", "largest", "total", "x_new"))
    made["x"] = normal(inputs, dtype=dtype)
    if merged:
        made |= {"x": normal(splits, heads, head_dim), "largest": normal(splits, heads)}
        made["total"] = normal(splits, heads).abs() + 1
    elif r.random() < 0.5:
        made["delta"] = normal(inputs, dtype=r.choice([dtype, torch.float32]))
        made["x_new"] = r.choice([None, torch.zeros(inputs, dtype=dtype)])
    if r.random() < 0.5:
        made["norm_weight"] = normal(inputs, dtype=dtype)
    if merged or (len(outputs) == 1 and r.random() < 0.5):
        made["residual"] = normal(outputs[0], dtype=dtype)
    biases = [normal(n, dtype=dtype) for n in outputs] if r.random() < 0.3 else []
    made |= {"norm_eps": r.choice([1e-6, 1e-5, 0.5]), "weights": weights, "row_format": form.name, "biases": biases}
    return made | {"y": torch.zeros(sum(outputs), dtype=dtype)}


def expected(a: dict[str, Any]) -> Tensor:
    dtype, row = a["y"].dtype, a["x"]
    if a["largest"] is not None:
        row = reference.merged_attention_ref(*(a[k].double() for k in ("x", "largest", "total"))).to(dtype)
    if a["delta"] is not None:
        row = row + a["delta"].to(dtype)
    if a["norm_weight"] is not None:
        row = reference.rms_norm_ref(row, a["norm_weight"], a["norm_eps"])
    form = FORMATS[a["row_format"]]
    y = torch.cat([form.unpack(w, row.numel()).double() @ row.double() for w in a["weights"]])
    for added in (torch.cat(a["biases"]) if a["biases"] else None, a["residual"]):
        y = y if added is None else y + added.double()
    return y


def difference(arguments: dict[str, Any], y: Tensor) -> str:
    """What is wrong with the result ``y`` of right arguments; empty if nothing is."""
    right = expected({k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    error = float((y.cpu().double() - right).norm() / right.norm().clamp(min=len(y) ** 0.5))
    return "" if error <= TOLERANCE[y.dtype] else f"relative error {error:.1e}"


def spoil(r: random.Random, a: dict[str, Any]) -> str:
    """Makes an argument wrong that other ops do not have. Says which."""
    weights, biases = a["weights"], [torch.zeros(1 + len(w), dtype=a["y"].dtype) for w in a["weights"]]
    wrong = {
        "weights": [[], weights * 4, *([spoilt(w) for w in weights] for spoilt in _SPOILT_ROWS)],
        "biases": [biases, [torch.zeros(len(weights[0]), dtype=a["y"].dtype)] * (len(weights) + 1)],
        "row_format": ["", "int4", "int5_g128", "INT4_G128", "int4_g128 ", "x" * 200, "int8_g128\0"],
        "delta": [torch.zeros_like(a["y"], dtype=r.choice(_WRONG_DTYPES))],
    }
    name = r.choice(sorted(wrong))
    a[name] = r.choice(wrong[name])
    return f"with a wrong {name}"
