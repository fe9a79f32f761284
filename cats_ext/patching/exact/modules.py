"""The modules that skip exact zeros: an MLP from its activations on, and a down projection by itself.

The activations are computed as the dense model computes them, by its own modules, so which neurons are zero is decided
by the same numbers. ``cats::activated_mlp`` then reads the rows of the others. Where it is not taken (many tokens,
training, a replaced projection), the dense model's own forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from cats_ext.ops.definitions import activated_mlp
from cats_ext.ops.dispatch import activated_fits, deterministic, needs_grad
from cats_ext.patching.mlp import CatsState, PatchedMLP
from cats_ext.patching.projections import KINDS


@dataclass
class ExactState(CatsState):
    """``multipliers``: of the standard deviation in :func:`gaussian_top_k`, by the gate's dtype; empty without it."""

    multipliers: dict[torch.dtype, float] = field(default_factory=dict)


def gaussian_multipliers(sparsity: float, device: torch.device) -> dict[torch.dtype, float]:
    """The quantile of the normal distribution, by dtype: computed in float32 on ``device``, then rounded."""
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(sparsity, dtype=torch.float32, device=device))
    return {dtype: quantile.to(dtype).item() for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def gaussian_top_k(gate: Tensor, multiplier: float) -> Tensor:
    """What is above mean + multiplier * deviation of each token, less that cutoff, and 0 elsewhere (Gemma 3n).

    Operation by operation as transformers computes it, so that both round alike.
    """
    mean = torch.mean(gate, dim=-1, keepdim=True)
    deviation = torch.std(gate, dim=-1, keepdim=True, unbiased=False)
    return relu(gate - (mean + deviation * multiplier))


class _ExactModule(PatchedMLP):
    cats: ExactState

    def read_activation(self) -> None:
        """The module's own activation is called, whichever it is."""

    def _count(self, activations: Tensor, up_rows: bool) -> None:
        with torch.no_grad():
            kept = (activations != 0).sum()
            total = torch.full_like(kept, activations.numel())
            self.counts += torch.stack([total, kept if up_rows else total, kept])


class ExactMLP(_ExactModule):
    """A gated MLP whose activations are computed first; up and down rows of zeros are not read."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        settings, projections = self.forward_settings, KINDS[self.forward_settings.projections]
        operands = None
        if activated_fits(x, settings.hidden_size, settings.hidden_size):
            operands = projections.operands(self._modules)
        if operands is None or needs_grad(x, *operands[0], *operands[1]):
            if settings.tracking:
                self._count(self.activations(projections.gate_up(self._modules, x)[0]), up_rows=True)
            return self.cats.original_class.forward(self, x)
        (w_gate, w_up, w_down_t), (gate_bias, up_bias, down_bias) = operands
        v = self.activations(linear(x, w_gate, gate_bias))
        if settings.tracking:
            self._count(v, up_rows=True)
        return activated_mlp(v, w_down_t, down_bias, x, w_up, up_bias, deterministic())

    def activations(self, gate: Tensor) -> Tensor:
        """What is multiplied by the up projection's output."""
        multipliers = self.cats.multipliers
        if multipliers:
            gate = gaussian_top_k(gate, multipliers[gate.dtype])
        return getattr(self, self.forward_settings.own_activation)(gate)


class ExactDown(_ExactModule):
    """A down projection, an ``nn.Linear``, of which only the rows of neurons that are not zero are read."""

    @classmethod
    def down_name(cls, name: str) -> str:
        return name

    def forward(self, h: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., H]``."""
        settings, parameters = self.forward_settings, self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if settings.tracking:
            self._count(h, up_rows=False)
        if (
            activated_fits(h, h.shape[-1], settings.hidden_size)
            and weight.stride(0) == 1
            and not needs_grad(h, weight, bias)
        ):
            return activated_mlp(h, weight.t(), bias, deterministic=deterministic())
        return self.cats.original_class.forward(self, h)
