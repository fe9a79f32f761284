"""Right calls of ``torch.ops.cats.sparse_mlp_columns``, of its counted form and of its step, from a seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from support.columns_cases import make_columns_case
from support.op_cases import ACTIVATIONS, DTYPES, RULES, set_thresholds

from cats_ext import ops
from cats_ext.ops import reference


def arguments(r: random.Random, op: str) -> dict[str, Any]:
    """Of one call, by name; half of them fit a GPU."""
    unit = r.choice([1, 8])
    hidden = unit * -(-r.choice([1, r.randint(1, 120), 8 * r.randint(1, 30), r.choice([1024, 2048])]) // unit)
    intermediate = r.randint(1, 40) if hidden > 500 else r.choice([1, r.randint(1, 150), 8 * r.randint(1, 20)])
    intermediate = unit * -(-intermediate // unit)
    step, dtype = op.endswith("_step"), r.choice(DTYPES)
    tokens = 1 if step else r.choice([0, 1, 1, 2, r.randint(1, 20)])
    activation, bias, seed = r.choice(ACTIVATIONS), r.random() < 0.3, r.randint(0, 10**6)
    call = make_columns_case(
        max(tokens, 1), hidden, intermediate, dtype, "cpu", "all kept", activation, bias, r.random(), seed=seed
    )
    if r.random() < 0.3:
        call.input_threshold = torch.tensor(r.choice([0.0, float("inf"), float("nan"), -1.0]))
    norm: dict[str, Any] = {}
    row = call.x
    if step:
        norm = {"norm_weight": torch.rand(hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)}
        norm["norm_eps"] = r.choice([1e-6, 1e-5, 0.5])
        call.x = reference.rms_norm_ref(row, norm["norm_weight"], norm["norm_eps"])
    set_thresholds(call, r.choice(RULES), r.random(), seed)
    call.x = row[:tokens]
    call.x = r.choice([call.x, call.x[None], call.x[0] if tokens else call.x])
    gaps = [unit * r.choice([0, 0, 1, r.randint(1, 5)]) for _ in call.weights]
    call.weights = [
        torch.nn.functional.pad(w, (0, gap))[:, : w.shape[1]] for w, gap in zip(call.weights, gaps, strict=True)
    ]
    names = [p.name for p in ops.sparse_mlp_columns.default._schema.arguments]
    named = dict(zip(names, [*call.args(), r.random() < 0.5], strict=True))
    if step:
        rest = {name: value for name, value in named.items() if name not in ("x", "down_bias", "deterministic")}
        return {"x": named["x"]} | norm | rest | {"y_sum": torch.zeros(hidden + r.choice([1, 1, 5]))}
    return named | ({"counts": torch.tensor([r.randint(0, 5)] * 4)} if op.endswith("counted") else {})


def fits_gpu(given: dict[str, Any]) -> bool:
    """Whether the rows of a right call are multiples of 16 bytes, as the op asks for on CUDA."""
    weights = [given[name] for name in ("w_gate_t", "w_up", "w_down_t")]
    return all(size * w.element_size() % 16 == 0 for w in weights for size in (w.shape[1], w.stride(0)))
