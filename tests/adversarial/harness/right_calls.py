"""Right calls of ``torch.ops.cats.*``, from random numbers: all but those of packed_linear_calls."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from support.op_cases import ACTIVATIONS, DTYPES, clear_of
from torch import Tensor

from cats_ext.ops import reference
from cats_ext.rows import FORMATS, quantize_rows


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


def elementwise(r: random.Random, op: str, g: torch.Generator) -> Call:
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
    if op.endswith("counted"):
        arguments["counts"] = torch.randint(0, 99, (3,), generator=g)
    thresholds = {"threshold": _threshold(r, v), "down_threshold": r.choice([None, _threshold(r, h)])}
    for name, t in thresholds.items():
        if t is not None and t.dim() and t.shape[0] != shape[-1]:
            thresholds[name] = t[0]
    return Call(op, arguments | {"gate": gate, "up": up} | thresholds | {"activation": activation})


def mlp(r: random.Random, op: str, g: torch.Generator) -> Call:
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


def activated(r: random.Random, op: str, g: torch.Generator) -> Call:
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
