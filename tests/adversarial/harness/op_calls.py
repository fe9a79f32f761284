"""Calls of ``torch.ops.cats.*`` with right and with wrong arguments, from a seed.

A right call is compared with the fp64 reference. A wrong one has one argument spoilt, and must raise a sentence that
says so. Case n of a seed is the same whatever runs before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from adversarial.harness import columns_calls, exact_calls, matmul_calls, packed_linear_calls, right_calls, unpack_calls
from adversarial.harness.record import is_clear
from adversarial.harness.right_calls import Call
from adversarial.harness.wrong_calls import spoil
from support.op_cases import TOLERANCE
from torch import Tensor

from cats_ext.ops import reference
from cats_ext.ops.definitions import SCHEMAS
from cats_ext.rows import FORMATS

OPS = sorted(SCHEMAS)
LARGEST = 1 << 23  # bytes of an argument
RIGHT, REFUSED = "right", "refused clearly"
Place = Callable[[Tensor, bool], Tensor]


def make_call(number: int, seed: int, place: Place) -> Call:
    """Call ``number`` of ``seed``, with every tensor put where ``place`` puts it."""
    r = random.Random(f"{seed}:{number}")
    g = torch.Generator().manual_seed(r.getrandbits(48))
    op = r.choice(OPS)
    if op == "packed_linear_step":
        call = Call(op, packed_linear_calls.make(r, g))
    elif op == "exact_mlp":
        call = Call(op, exact_calls.arguments(r))
    elif op.startswith("sparse_mlp_columns"):
        call = Call(op, columns_calls.arguments(r, op))
    elif op == "unpack_rows":
        call = Call(op, unpack_calls.make(r, g))
    elif op == "packed_matmul":
        call = Call(op, matmul_calls.make(r, g))
    else:
        others = {"gated": right_calls.elementwise, "activated": right_calls.activated}
        make = others.get(op.partition("_")[0], right_calls.mlp)
        call = make(r, op, g)
    if r.random() < 0.5:
        while not spoil(r, call):
            pass

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(part) for part in value]
        here = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
        exists = here and (value.untyped_storage().nbytes() or not value.numel())
        return place(value, r.random() < 0.7) if exists else value

    call.arguments |= {name: placed(value) for name, value in call.arguments.items()}
    return call


def _expected(call: Call) -> list[Tensor]:
    """The outputs in fp64, and what is added to; computed on the CPU."""
    if call.op == "unpack_rows":
        return [unpack_calls.expected(call.arguments)]
    cpu = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in call.arguments.items()}
    cpu.pop("deterministic", None)
    y_sum, counts = cpu.pop("y_sum", None), cpu.pop("counts", None)
    for name, rows in (("gate", "w_gate"), ("up", "w_up"), ("down", "w_down_t")):
        if form := cpu.pop(f"{name}_format", None):
            cpu[rows] = FORMATS[form].unpack(cpu[rows], cpu["x"].shape[-1])
    exact = {k: v.double() if isinstance(v, Tensor) and "threshold" not in k else v for k, v in cpu.items()}
    if call.op == "gated_threshold_backward":
        return list(reference.gated_threshold_backward_ref(**exact, compute_dtype=torch.float64))
    if call.op.startswith("gated"):
        h = reference.gated_threshold_ref(**exact, compute_dtype=torch.float64)
        return [h] if counts is None else [h, counts + reference.gated_threshold_counts_ref(**exact)]
    if call.op == "activated_mlp":
        return [reference.activated_mlp_ref(**exact, compute_dtype=torch.float64)]
    if y_sum is not None:
        eps, weight = exact.pop("norm_eps"), exact.pop("norm_weight")
        exact["x"] = reference.rms_norm_ref(cpu["x"], weight.to(cpu["x"].dtype), eps).double()
    counted = None if counts is None else torch.zeros_like(counts)
    formula = reference.sparse_mlp_columns_ref if "w_gate_t" in exact else reference.sparse_mlp_ref
    y = formula(**exact, compute_dtype=torch.float64, counts=counted)
    return [y if y_sum is None else y.flatten(), *([] if counts is None else [counts + counted])]


def _bits(t: Tensor) -> Tensor:
    return t.cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _difference(call: Call, before: dict[str, Tensor]) -> str:
    """What is wrong with the result of a right call; empty if nothing is."""
    if call.op == "packed_linear_step":
        call.run()
        for name, value in before.items():
            if name not in ("y", "x_new") and not torch.equal(_bits(call.arguments[name]), _bits(value)):
                return f"{name} was written to"
        return packed_linear_calls.difference(call.arguments, call.arguments["y"])
    if call.op == "packed_matmul":
        y = call.run()
        for name, value in before.items():
            if not torch.equal(_bits(call.arguments[name]), _bits(value)):
                return f"{name} was written to"
        return matmul_calls.difference(call.arguments, y)
    tolerance = None
    if call.op == "exact_mlp":
        y, tolerance = exact_calls.expected(call.arguments)
        expected = [y]
    else:
        expected = _expected(call)
    out = call.run()
    actual = list(out) if isinstance(out, tuple) else [] if out is None else [out]
    if "y_sum" in call.arguments:
        actual.append(call.arguments["y_sum"][: before["x"].numel()])
    if "counts" in call.arguments:
        actual.append(call.arguments["counts"])
    for name, value in before.items():
        if name not in ("y_sum", "counts") and not torch.equal(_bits(call.arguments[name]), _bits(value)):
            return f"{name} was written to"
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return f"shape {list(a.shape)}, expected {list(e.shape)}"
        tolerance = tolerance or TOLERANCE.get(a.dtype, dict(rtol=0, atol=0))
        if call.op.endswith("_step"):  # what is summed has been normalised in the dtype of x
            tolerance = TOLERANCE[torch.float32]
        if not torch.allclose(a.cpu().double(), e.double(), **tolerance, equal_nan=True):
            return f"off by {float((a.cpu().double() - e.double()).abs().max()):.3g}"
    return ""


def run_case(number: int, seed: int, place: Place) -> tuple[str, str]:
    """The outcome of call ``number``, and the call with what went wrong."""
    call = make_call(number, seed, place)
    if not call.spoilt:
        before = {k: v.clone() for k, v in call.arguments.items() if isinstance(v, Tensor)}
        try:
            wrong = _difference(call, before)
        except Exception as error:
            wrong = f"raised {type(error).__name__}: {str(error)[:300]!r}"
        return ("wrong", f"{call}: {wrong}") if wrong else (RIGHT, "")
    try:
        call.run()
    except (RuntimeError, TypeError, ValueError) as error:
        if is_clear_op_error(str(error), call.op):
            return REFUSED, ""
        return "refused obscurely", f"{call}: {type(error).__name__}: {str(error)[:300]!r}"
    except Exception as error:
        return "refused obscurely", f"{call}: {type(error).__name__}: {str(error)[:300]!r}"
    return "accepted", str(call)


def is_clear_op_error(message: str, op: str) -> bool:
    """A sentence of the op that begins with its name, or torch's own on a value that no schema of this kind takes."""
    own = ("Expected a value of type", "is missing value")
    by_torch = message.startswith(f"cats::{op}() ") and any(part in message for part in own)
    families = {"gated": "gated_threshold", "packed": op, "activated": op, "exact": op, "unpack": op}
    family = families.get(op.partition("_")[0], "sparse_mlp")
    return by_torch or (message.startswith(family) and is_clear(message, (family,)))
