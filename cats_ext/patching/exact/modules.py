"""The modules that skip exact zeros: an MLP, and a down projection by itself.

An MLP of a known formula is one call of ``cats::exact_mlp``, which rounds where the dense model does. Otherwise the
activations are computed as the dense model computes them, by its own modules, and ``cats::activated_mlp`` reads the
rows of those that are not zero. Where neither is taken (many tokens, training, a replaced projection), the dense
model's own forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from cats_ext.ops.definitions import activated_mlp, exact_mlp
from cats_ext.ops.dispatch import activated_fits, deterministic, exact_fits, needs_grad
from cats_ext.patching.mlp import CatsState, PatchedMLP
from cats_ext.patching.projections import KINDS


@dataclass
class ExactState(CatsState):
    """What an exact module knows besides.

    Args:
        activation: what exact_mlp calls the module's own; None if that does not compute all of it.
        multipliers: of the standard deviation in :func:`gaussian_top_k`, by the gate's dtype; empty without it.
        relu_up: the up projection's output goes through a ReLU too (dReLU).
    """

    activation: str | None = None
    multipliers: dict[torch.dtype, float] = field(default_factory=dict)
    relu_up: bool = False


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
        """exact_mlp computes the module's own activation; another one is called, whichever it is."""
        own = self.forward_settings.own_activation
        known = own is not None and getattr(self, own) is self.cats.own_activation
        self.forward_settings = self.forward_settings._replace(activation=self.cats.activation if known else None)

    @torch.no_grad()
    def _count(self, h: Tensor, v: Tensor | None = None) -> None:
        """Count the neurons of which a down row is needed, by ``h``, and of which an up row is, by ``v`` if not all."""
        kept = (h != 0).sum()
        total = torch.full_like(kept, h.numel())
        self.counts += torch.stack([total, total if v is None else (v != 0).sum(), kept])


class ExactMLP(_ExactModule):
    """An MLP, gated or not, whose zeros are not read: neither their up rows nor their down rows.

    Where its formula is known and ``exact_fits``, it is one call. Otherwise the activations are computed first, also to
    count them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        settings, children, cats = self.forward_settings, self._modules, self.cats
        projections = KINDS[settings.projections]
        operands = None
        if activated_fits(x, settings.hidden_size, settings.hidden_size):
            operands = projections.operands(children)
        if operands is None or needs_grad(x, *operands[0], *operands[1]):
            if settings.tracking:
                gate, up = projections.gate_up(children, x)
                v = self.activations(gate)
                self._count(v * relu(up) if cats.relu_up else v, None if up is None else v)
            return cats.original_class.forward(self, x)
        (w_gate, w_up, w_down_t), (gate_bias, up_bias, down_bias) = operands
        known = settings.activation is not None and not settings.tracking
        if known and exact_fits(x, settings.hidden_size, bool(cats.multipliers)):
            module = children.get(settings.own_activation)
            if module is None or not (module._forward_hooks or module._forward_pre_hooks):
                return exact_mlp(
                    x,
                    w_gate,
                    w_up,
                    w_down_t,
                    settings.activation,
                    cats.multipliers.get(x.dtype),
                    cats.relu_up,
                    gate_bias,
                    up_bias,
                    down_bias,
                    deterministic(),
                )
        v = self.activations(linear(x, w_gate, gate_bias))
        h = v * relu(linear(x, w_up, up_bias)) if cats.relu_up else v
        if settings.tracking:
            self._count(h, None if w_up is None else v)
        if w_up is None or cats.relu_up:
            return activated_mlp(h, w_down_t, down_bias, deterministic=deterministic())
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
    def down_name(cls, name: str, projections: str) -> str:
        return name

    def forward(self, h: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., H]``."""
        settings, parameters = self.forward_settings, self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        if settings.tracking:
            self._count(h)
        if (
            activated_fits(h, h.shape[-1], settings.hidden_size)
            and weight.stride(0) == 1
            and not needs_grad(h, weight, bias)
        ):
            return activated_mlp(h, weight.t(), bias, deterministic=deterministic())
        return self.cats.original_class.forward(self, h)
