"""MLPs with random weights, and thresholds that are exact quantiles of what they make of one x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def random_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``[rows, columns]``, of a variance at which projections of a normal x are normal."""
    return (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def kth_threshold(values: Tensor, sparsity: float) -> Tensor:
    """A threshold that ``sparsity`` of the ``values`` (absolute) are below, midway between two: rounding flips none."""
    by_size = values.flatten().sort().values
    return by_size[round(sparsity * len(by_size)) - 1 :][:2].mean() if sparsity else by_size.new_zeros(())


@dataclass
class Layer:
    """Weights as both paths store them, and the activations of one x."""

    x: Tensor  # [M, H]
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I], as nn.Linear stores it
    down_t: Tensor  # [I, H], as the op reads it
    value: Tensor  # |act(gate)|, [M, I]
    h: Tensor  # |act(gate) * up|, [M, I]

    @classmethod
    def random(cls, x: Tensor, intermediate: int) -> Layer:
        gate, up, down_t = (random_rows(intermediate, x.shape[-1], x.dtype, x.device) for _ in range(3))
        value = F.silu(F.linear(x.float(), gate.float()))
        h = value * F.linear(x.float(), up.float())
        return cls(x, gate, up, down_t.t().contiguous(), down_t, value.abs(), h.abs())

    def threshold(self, sparsity: float) -> Tensor:
        return kth_threshold(self.value, sparsity)

    def rows_kept(self, sparsity: float) -> float:
        """Share of neurons that some token keeps."""
        return float((self.value >= self.threshold(sparsity)).any(0).float().mean())
