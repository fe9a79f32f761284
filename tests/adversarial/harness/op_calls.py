"""Calls of ``torch.ops.cats.*`` with right and with wrong arguments, from a seed.

A right call is compared with the fp64 reference. A wrong one has one argument spoilt, and must raise a sentence that
says so. Case n of a seed is the same whatever runs before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from adversarial.harness import exact_calls, packed_linear_calls
from adversarial.harness.record import is_clear
from support.op_cases import ACTIVATIONS, DTYPES, TOLERANCE, clear_of
from torch import Tensor

from cats_ext.ops import reference
from cats_ext.ops.definitions import SCHEMAS
from cats_ext.rows import FORMATS, quantize_rows

OPS = sorted(SCHEMAS)
LARGEST = 1 << 20  # bytes of an argument
RIGHT, REFUSED = "right", "refused clearly"
Place = Callable[[Tensor, bool], Tensor]


@dataclass
class Call:
    """One call: its arguments by name, and what was spoilt; an empty ``spoilt`` is a right call."""

    op: str
    arguments: dict[str, Any]
    spoilt: str = ""

    def __str__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, list):
                return f"[{', '.join(map(show, value))}]"
            if not isinstance(value, Tensor):
                return repr(value)
            return f"{str(value.dtype)[6:]}{list(value.shape)}/{list(value.stride())}"

        return f"{self.op}({', '.join(f'{k}={show(v)}' for k, v in self.arguments.items())}) {self.spoilt}"

    def run(self) -> Any:
        return getattr(torch.ops.cats, self.op)(**self.arguments)


# --- right calls ------------------------------------------------------------------------------------------------------


def _normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def _rows(r: random.Random, t: Tensor) -> Tensor:
    """``t`` [I, H] as it is, or with other elements between its rows."""
    gap = r.choice([0, 0, 0, 1, 8, r.randint(1, 40)])
    return torch.nn.functional.pad(t, (0, gap))[:, : t.shape[1]]


def _packed(r: random.Random, weights: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """Packs ``weights`` into ``arguments``, each in a format of its own, and returns what the rows stand for."""
    exact, hidden = [], weights[0].shape[1]
    for name, weight in zip(("gate", "up", "down"), weights, strict=True):
        fitting = [key for key, form in FORMATS.items() if not form.group_size or hidden % form.group_size == 0]
        form = FORMATS[r.choice(fitting)]
        rows = quantize_rows(weight.float(), form)
        gap = 16 * r.choice([0, 0, 1, 3])
        arguments["w_down_t" if name == "down" else f"w_{name}"] = torch.nn.functional.pad(rows, (0, gap))[
            :, : rows.shape[1]
        ]
        arguments[f"{name}_format"] = form.name
        exact.append(form.unpack(rows, hidden))
    return exact


def _threshold(r: random.Random, values: Tensor) -> Tensor | None:
    """float32 [] or [I], clear of ``values`` [M, I]."""
    kind = r.choice(["zero", "scalar", "scalar", "vector", "vector", "infinite", "nan"])
    if kind in ("zero", "infinite", "nan"):
        return torch.tensor({"zero": 0.0, "infinite": float("inf"), "nan": float("nan")}[kind])
    if not values.numel():
        return torch.tensor(0.1)
    scalar = values.flatten().kthvalue(max(1, int(r.random() * values.numel()))).values
    if kind == "vector":
        scalar = scalar * (
            0.5 + torch.rand(values.shape[1], generator=torch.Generator().manual_seed(r.getrandbits(32)))
        )
    chosen = clear_of(scalar, values)
    return chosen if kind == "scalar" or r.random() < 0.7 else torch.stack([chosen, chosen], 1)[:, 0]


def _values(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """|act(g)| and |h| in fp64, [M, I]."""
    v = reference.ACTIVATIONS[activation](gate.double())
    return tuple(t.abs().reshape(gate.shape[:-1].numel(), gate.shape[-1]) for t in (v, v * up.double()))


def _elementwise(r: random.Random, op: str, g: torch.Generator) -> Call:
    dtype, activation = r.choice([*DTYPES, torch.float64]), r.choice(ACTIVATIONS)
    size = r.choice([1, r.randint(1, 70), 8 * r.randint(1, 40)])
    shape = r.choice([(size,), (0, size), (r.randint(1, 9), size), (2, 3, size), (3, 1, size), (4, 0)])

    def operand(*shape: int) -> Tensor:
        if len(shape) > 1 and r.random() < 0.1:  # one row for all
            return _normal(g, shape[-1]).to(dtype).expand(shape)
        if len(shape) > 1 and r.random() < 0.3:  # half of a merged projection's output, or a transposed batch
            if r.random() < 0.5 or len(shape) == 2:
                return _normal(g, *shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
            return _normal(g, shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
        return _normal(g, *shape).to(dtype)

    gate, up = operand(*shape), operand(*shape)
    v, h = _values(gate, up, activation)
    arguments: dict[str, Any] = {"grad_h": operand(*shape)} if op.endswith("backward") else {}
    thresholds = {"threshold": _threshold(r, v), "down_threshold": r.choice([None, _threshold(r, h)])}
    for name, t in thresholds.items():
        if t is not None and t.dim() and t.shape[0] != shape[-1]:
            thresholds[name] = t[0]
    return Call(op, arguments | {"gate": gate, "up": up} | thresholds | {"activation": activation})


def _mlp(r: random.Random, op: str, g: torch.Generator) -> Call:
    dtype, activation = r.choice(DTYPES), r.choice(ACTIVATIONS)
    hidden = r.choice([1, r.randint(1, 120), 8 * r.randint(1, 30), r.choice([1024, 2048])])
    intermediate = r.randint(1, 40) if hidden > 500 else r.choice([1, r.randint(1, 150), 8 * r.randint(1, 20)])
    step, packed = op.endswith("_step"), "packed" in op
    if packed:
        hidden = r.choice([1, hidden, 32 * r.randint(1, 8), 128 * r.randint(1, 6)])
    shape = (
        (1, hidden)
        if step
        else r.choice([(hidden,), (1, hidden), (r.randint(0, 20), hidden), (2, r.randint(1, 4), hidden)])
    )
    x = _normal(g, *shape).to(dtype)
    if not step and len(shape) == 2 and r.random() < 0.2:
        x = _normal(g, shape[0], hidden + 8).to(dtype)[:, 3 : 3 + hidden]
    weights = [_normal(g, intermediate, hidden, scale=n**-0.5).to(dtype) for n in (hidden, hidden, intermediate)]
    rows: dict[str, Any] = {}
    if packed:
        w_gate, w_up, _ = _packed(r, weights, rows)
    else:
        w_gate, w_up, w_down_t = (_rows(r, w) for w in weights)
        rows = {"w_gate": w_gate, "w_up": w_up, "w_down_t": w_down_t}
    sizes = {"gate_bias": intermediate, "up_bias": intermediate} | ({} if step else {"down_bias": hidden})
    biases = {k: _normal(g, n, scale=0.3).to(dtype) if r.random() < 0.3 else None for k, n in sizes.items()}
    arguments: dict[str, Any] = {"x": x}
    exact_x = x.double()
    if step:
        arguments |= {"norm_weight": _normal(g, hidden).to(dtype), "norm_eps": r.choice([1e-6, 1e-5, 0.5])}
        exact_x = reference.rms_norm_ref(x, arguments["norm_weight"], arguments["norm_eps"]).double()
    linear = torch.nn.functional.linear
    bias = lambda name: None if biases[name] is None else biases[name].double()  # noqa: E731
    gate = linear(exact_x, w_gate.double(), bias("gate_bias"))
    v, h = _values(gate, linear(exact_x, w_up.double(), bias("up_bias")), activation)
    arguments |= rows
    if step:
        arguments["y_sum"] = torch.zeros(hidden + r.choice([1, 1, 5]))
    if op.endswith("counted"):
        arguments["counts"] = torch.tensor([r.randint(0, 5)] * 3)
    arguments |= {"threshold": _threshold(r, v), "down_threshold": r.choice([None, _threshold(r, h)])}
    arguments |= {"activation": activation} | biases
    return Call(op, arguments | ({} if step else {"deterministic": r.random() < 0.5}))


def _activated(r: random.Random, op: str, g: torch.Generator) -> Call:
    dtype, gated = r.choice(DTYPES), r.random() < 0.6
    hidden = r.choice([1, r.randint(1, 120), 8 * r.randint(1, 30), r.choice([1024, 2048])])
    intermediate = r.randint(1, 40) if hidden > 500 else r.choice([1, r.randint(1, 150), 8 * r.randint(1, 20)])
    shape = r.choice([(), (1,), (r.randint(0, 20),), (2, r.randint(1, 4))])
    v = _normal(g, *shape, intermediate)
    v = torch.where(torch.rand(v.shape, generator=g) < r.choice([0, 0.5, 0.95, 1]), 0, v).to(dtype)
    if len(shape) == 1 and r.random() < 0.2:
        v = torch.nn.functional.pad(v, (3, 5))[:, 3 : 3 + intermediate]
    bias = lambda n: _normal(g, n, scale=0.3).to(dtype) if r.random() < 0.3 else None  # noqa: E731
    weight = lambda n: _rows(r, _normal(g, intermediate, hidden, scale=n**-0.5).to(dtype))  # noqa: E731
    arguments: dict[str, Any] = {"v": v, "w_down_t": weight(intermediate), "down_bias": bias(hidden)}
    if gated:
        arguments |= {"x": _normal(g, *shape, hidden).to(dtype), "w_up": weight(hidden), "up_bias": bias(intermediate)}
    return Call(op, arguments | {"deterministic": r.random() < 0.5})


# --- wrong calls ------------------------------------------------------------------------------------------------------


def _wrong_shape(r: random.Random, name: str, t: Tensor) -> Tensor:
    """Never a shape that the argument may have: a batch dimension more or less of x, gate or up is right."""
    if name == "y_sum":  # a longer one is right
        return r.choice([t[:-6] if len(t) > 6 else t[:0], t[None]])
    wrong = [t[..., None].expand(*t.shape, 2), torch.cat([t, t], -1) if t.dim() else t.expand(3, 2)]
    if t.dim() and t.shape[-1] > 1:
        wrong.append(t[..., :-1])
    if t.dim() == 2 and name.startswith("w_"):
        wrong += [t[None], t[:, 0], t[:0], torch.cat([t, t])]
    if t.dim() == 1 and name not in ("x", "gate", "up", "grad_h", "threshold", "down_threshold"):
        wrong.append(t[None])
    return r.choice(wrong)


def _wrong_strides(name: str, t: Tensor) -> Tensor | None:
    """The same values with a stride that the op does not take; None if it takes all that there are."""
    if name.startswith("w_") and t.shape[1] > 1:
        return t.mT.contiguous().mT if t.shape[0] > 1 else torch.stack([t, t], -1)[..., 0]
    if (name.endswith("bias") or name in ("norm_weight", "counts", "y_sum", "delta", "x_new")) and len(t) > 1:
        return torch.stack([t, t], 1)[:, 0]
    return None


_OTHER_DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.float64]
_ACTIVATIONS = ["", "SiLU", "silu ", "swish", "x" * 200, "gelu_new", "si\0lu", "relu\0", "\u0440elu", "%s%n"]


def spoil(r: random.Random, call: Call) -> bool:
    """Make one argument wrong. Returns whether there was a way to."""
    tensors = {name: t for name, t in call.arguments.items() if isinstance(t, Tensor)}
    linear = call.op == "packed_linear_step"
    if linear and r.random() < 0.3:
        call.spoilt = packed_linear_calls.spoil(r, call.arguments)
        return True
    name, t = r.choice(sorted(tensors.items(), key=lambda item: item[0]))
    kinds = [
        "dtype",
        "dtype",
        "shape",
        "shape",
        "strides",
        "device",
        "missing",
        "activation",
        "kind",
        "layout",
        "memory",
    ]
    how = r.choice(kinds)
    if how == "dtype":
        dtype = r.choice([d for d in [*_OTHER_DTYPES, *DTYPES] if d != t.dtype])
        if len({u.dtype for n, u in tensors.items() if n in ("gate", "up", "grad_h")} | {dtype}) == 1:
            return False
        if linear and name == "delta" and dtype == torch.float32:
            return False
        wrong = t.to(dtype)
    elif how == "shape":
        wrong = _wrong_shape(r, name, t)
        if name == "x" and "packed" in call.op and -(-wrong.shape[-1] // 128) == -(-t.shape[-1] // 128):
            return False  # rows are padded: x alone says how many of their columns there are
        neurons = 0 if linear else tensors["gate"].shape[-1] if "gate" in tensors else len(tensors["w_down_t"])
        if call.op == "activated_mlp" and "x" not in tensors:  # then nothing says how many dimensions or columns
            if name == "v" and wrong.shape[-1] == neurons:
                return False
            if name == "w_down_t" and wrong.dim() == 2 and len(wrong) == neurons and "down_bias" not in tensors:
                return False
        if wrong.shape == t.shape or ("threshold" in name and wrong.shape == (neurons,)):
            return False
    elif how == "strides":
        wrong = _wrong_strides(name, t)
    elif how == "layout":
        wrong = t.to_sparse() if t.dim() else None
    elif how == "memory":  # freed, as FSDP frees what it has sharded
        if not t.numel() or call.op.endswith("_step"):  # on the CPU that is torch's own ops
            return False
        wrong = t.clone()
        wrong.untyped_storage().resize_(0)
    elif how == "device":
        wrong = t.to("meta")
    elif how == "missing":
        required = [n for n in tensors if "bias" not in n and n != "down_threshold"]
        if call.op == "exact_mlp":
            required = [n for n in tensors if n not in exact_calls.MAY_BE_MISSING]
        if linear:
            required = [n for n in tensors if n in packed_linear_calls.REQUIRED]
        name, wrong = r.choice(required), None
        if r.random() < 0.3:
            del call.arguments[name]
            call.spoilt = f"without {name}"
            return True
    elif how == "activation":
        if linear:
            return False
        name, wrong = "activation", r.choice(_ACTIVATIONS)
        if name not in call.arguments:
            return False
    else:
        wrong = r.choice([1, 0.5, "x", [], [t], object(), True])
    if how not in ("missing",) and wrong is None:
        return False
    call.arguments[name] = wrong
    call.spoilt = f"with a wrong {how} of {name}"
    return True


# --- a case -----------------------------------------------------------------------------------------------------------


def make_call(number: int, seed: int, place: Place) -> Call:
    """Call ``number`` of ``seed``, with every tensor put where ``place`` puts it."""
    r = random.Random(f"{seed}:{number}")
    g = torch.Generator().manual_seed(r.getrandbits(48))
    op = r.choice(OPS)
    if op == "packed_linear_step":
        call = Call(op, packed_linear_calls.make(r, g))
    elif op == "exact_mlp":
        call = Call(op, exact_calls.arguments(r))
    else:
        make = _elementwise if op.startswith("gated") else _activated if op == "activated_mlp" else _mlp
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
        return [reference.gated_threshold_ref(**exact, compute_dtype=torch.float64)]
    if call.op == "activated_mlp":
        return [reference.activated_mlp_ref(**exact, compute_dtype=torch.float64)]
    if y_sum is not None:
        eps, weight = exact.pop("norm_eps"), exact.pop("norm_weight")
        exact["x"] = reference.rms_norm_ref(cpu["x"], weight.to(cpu["x"].dtype), eps).double()
    counted = None if counts is None else torch.zeros(3, dtype=torch.int64)
    y = reference.sparse_mlp_ref(**exact, compute_dtype=torch.float64, counts=counted)
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
    families = {"gated": "gated_threshold", "packed": op, "activated": op, "exact": op}
    family = families.get(op.partition("_")[0], "sparse_mlp")
    return by_torch or (message.startswith(family) and is_clear(message, (family,)))
