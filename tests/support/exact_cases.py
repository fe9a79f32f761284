"""Calls of exact_mlp whose gates are sums of numbers of a few bits, which float32 adds without an error in any order.

So they are the same in all kernels, and so is which neurons are zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from support.op_cases import TOLERANCE, assert_close, normal, to_device
from torch import Tensor

from cats_ext import ops
from cats_ext.ops import reference

# By name: the activation, deviations of the cutoff, whether there is an up projection, and a ReLU of it.
FORMS = {
    "relu": ("relu", None, False, False),
    "relu2": ("relu2", None, False, False),
    "gated relu": ("relu", None, True, False),
    "gated relu2": ("relu2", None, True, False),
    "dReLU": ("relu", None, True, True),
    "cutoff": ("gelu_tanh", 1.640625, True, False),
    "cutoff without a gate": ("relu2", 0.5, False, False),
}


@dataclass
class Arguments:
    """One call: by the names of the op."""

    named: dict[str, Tensor | str | float | bool | None]

    def __call__(self, **changed: object) -> Tensor:
        return ops.exact_mlp(**(self.named | changed))

    def hidden(self, **changed: object) -> Tensor:
        """h in fp64, ``[..., I]``."""
        given = (self.named | changed).items()
        named = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in given}
        named = {n: t for n, t in named.items() if n not in ("w_down_t", "down_bias", "deterministic")}
        return reference.exact_hidden_ref(**named, compute_dtype=torch.float64)

    def expected(self, **changed: object) -> Tensor:
        given = self.named | changed
        bias = given.get("down_bias")
        return F.linear(
            self.hidden(**changed), given["w_down_t"].cpu().double().t(), None if bias is None else bias.cpu().double()
        )

    def tolerance(self, dtype: torch.dtype) -> dict[str, float]:
        found = TOLERANCE[dtype]
        if self.named["activation"] == "gelu_tanh" and dtype != torch.float32:  # a v may round to its neighbour
            found = found | dict(atol=10 * torch.finfo(dtype).eps / math.sqrt(self.named["w_gate"].shape[0]))
        return found

    def assert_close(self, y: Tensor, **changed: object) -> None:
        assert_close(y, self.expected(**changed), **self.tolerance(y.dtype))


def make(
    form: str,
    tokens: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    cut: float = 0.0,
    padding: int = 0,
    seed: int = 0,
) -> Arguments:
    """``cut``: a bias of all gates, which are of order one."""
    activation, deviations, gated, relu_up = FORMS[form]
    few_bits = lambda t, step: (t / step).round() * step  # noqa: E731
    scale = 2.0 ** -round(math.log2(hidden) / 2)

    def weight(s: int, scale: float = scale) -> Tensor:
        rows = few_bits(normal(intermediate, hidden + padding, seed=seed + s), 1 / 8) * scale
        return to_device(rows.to(dtype)[:, :hidden], device)

    vector = lambda n, s: few_bits(normal(n, seed=seed + s, scale=0.3), 1 / 16).to(dtype).to(device)  # noqa: E731
    named = {
        "x": few_bits(normal(tokens, hidden, seed=seed), 1 / 4).to(dtype).to(device),
        "w_gate": weight(1),
        "w_up": weight(2) if gated else None,
        "w_down_t": weight(3, intermediate**-0.5),
        "activation": activation,
        "deviations": deviations,
        "relu_up": relu_up,
    }
    if bias:
        named |= {"gate_bias": vector(intermediate, 4), "down_bias": vector(hidden, 6)}
        if gated:
            named["up_bias"] = vector(intermediate, 5)
    if cut:
        named["gate_bias"] = torch.full((intermediate,), cut, dtype=dtype, device=device)
    return Arguments(named)
