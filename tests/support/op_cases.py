"""Operands, thresholds and tolerances that the tests of the ops share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from cats_ext.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = list(reference.ACTIVATIONS)

# Sums are taken in fp32 (atol: their values are of order one) and rounded once (rtol: the largest error of that).
TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=1.05 * 2**-11, atol=1e-5),
    torch.bfloat16: dict(rtol=1.05 * 2**-8, atol=1e-5),
}


def assert_close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    """``actual`` against an fp64 ``expected``, to the tolerance of ``actual``'s dtype."""
    tolerance = tolerance or TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected.cpu().double(), **tolerance, equal_nan=True)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def to_device(t: Tensor, device: torch.device | str) -> Tensor:
    """``t`` on ``device`` with its strides, which ``Tensor.to`` drops where they leave gaps."""
    storage = t.new_empty(0).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def clear_of(threshold: Tensor, values: Tensor, margin: float = 1e-5) -> Tensor:
    """``threshold`` ([] or [I]) raised until no ``values`` ([M, I]) are so near that rounding could change the mask."""
    threshold = threshold.double().clone()
    for _ in range(10_000):
        near = (values - threshold).abs() < margin
        near = near.any() if threshold.dim() == 0 else near.any(0)
        if not near.any():
            return threshold.float()
        threshold += near * 3 * margin
    raise AssertionError("no threshold is clear of the values")


@dataclass
class Case:
    """One call of ``sparse_mlp``: tensors of one dtype on one device, and fp64 copies on the CPU for the reference."""

    x: Tensor
    weights: list[Tensor]  # w_gate, w_up, w_down_t
    biases: list[Tensor | None]  # gate, up, down
    activation: str
    threshold: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    down_threshold: Tensor | None = None

    def args(self, **changed: Any) -> tuple:
        x, threshold, down_threshold = (
            changed.get(name, getattr(self, name)) for name in ("x", "threshold", "down_threshold")
        )
        on = lambda t: None if t is None else to_device(t, x.device)  # noqa: E731
        weights = changed.get("weights", self.weights)
        return x, *weights, on(threshold), on(down_threshold), self.activation, *self.biases

    def counted_args(self, counts: Tensor) -> tuple:
        args = self.args()
        return *args[:4], counts, *args[4:]

    def exact_args(self) -> tuple:
        exact = lambda t: t.cpu().double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        args = [exact(a) for a in Case.args(self)]
        args[4:6] = self.threshold.cpu(), None if self.down_threshold is None else self.down_threshold.cpu()
        return tuple(args)

    def expected(self) -> Tensor:
        return reference.sparse_mlp_ref(*self.exact_args(), compute_dtype=torch.float64)

    def values(self) -> tuple[Tensor, Tensor]:
        """|act(g)| and |h| of all neurons, in fp64, ``[M, I]``."""
        x, w_gate, w_up, _, _, _, activation, gate_bias, up_bias, _ = self.exact_args()
        v = reference.ACTIVATIONS[activation](torch.nn.functional.linear(x, w_gate, gate_bias))
        h = v * torch.nn.functional.linear(x, w_up, up_bias)
        return v.abs().reshape(-1, v.shape[-1]), h.abs().reshape(-1, v.shape[-1])


RULES = ["all kept", "scalar", "vector", "scalar, scalar", "vector, vector", "scalar, vector", "none kept"]


def make_case(
    tokens: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rule: str = "scalar, vector",
    activation: str = "silu",
    bias: bool = False,
    sparsity: float = 0.5,
    seed: int = 0,
) -> Case:
    """Random operands with g, u and y of order one, and thresholds by the words of ``rule``."""
    cast = lambda t: t.to(dtype).to(device)  # noqa: E731
    weights = [normal(intermediate, hidden, seed=seed + 1 + i, scale=hidden**-0.5) for i in range(2)]
    weights.append(normal(intermediate, hidden, seed=seed + 3, scale=intermediate**-0.5))
    sizes = (intermediate, intermediate, hidden)
    biases = [cast(normal(n, seed=seed + 4 + i, scale=0.3)) if bias else None for i, n in enumerate(sizes)]
    case = Case(cast(normal(tokens, hidden, seed=seed)), [cast(w) for w in weights], biases, activation)
    set_thresholds(case, rule, sparsity, seed)
    return case


def set_thresholds(case: Case, rule: str, sparsity: float, seed: int) -> None:
    """Thresholds by the words of ``rule``, clear of all values."""
    if rule == "all kept":
        return
    if rule == "none kept":
        case.threshold = torch.tensor(float("inf"))
        return

    def threshold(kind: str, values: Tensor, sparsity: float) -> Tensor:
        values_sorted = values.flatten().sort().values
        scalar = values_sorted[int(sparsity * len(values_sorted))]
        if kind == "vector":
            scalar = scalar * (0.5 + torch.rand(values.shape[1], generator=torch.Generator().manual_seed(seed)))
        return clear_of(scalar, values)

    v, h = case.values()
    first, _, second = rule.partition(", ")
    case.threshold = threshold(first, v, sparsity)
    if second:
        case.down_threshold = threshold(second, h, (1 + sparsity) / 2)
