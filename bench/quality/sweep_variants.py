"""Variants of quality.sweep: thresholds as exact quantiles of a text's activations, and the losses of options.

Everything here follows from what the dense model does on one calibration text; nothing runs the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

GRID = [round(0.05 * i, 2) for i in range(19)]  # of up and of down sparsity


@dataclass
class Variant:
    """Per-neuron weights of the two tests, and the sparsity of every layer."""

    name: str
    up: float = 0.5
    down: float = 0.5
    gate_weight: str = "none"  # a name of GATE_WEIGHTS
    gate_power: float = 1.0
    last_power: float | None = None  # gate_power of the last layer
    last: tuple[float, float] | None = None  # its up and down sparsity
    down_weight: str = "norm"  # none, norm, fisher; no second threshold if down == up
    clip: float | None = None  # gate weights no further than this factor from their median
    text: str = "wikitext"  # calibrated on: wikitext, c4, mixed (half of each), short (mixed, windows of 128)
    correct: bool = False  # add the mean of what is dropped to the MLP's output
    correct_last: bool = True  # also in the last layer
    skip: int = 0  # first tokens of a window left out of calibration
    dense_first: int = 0  # first positions computed densely in evaluation
    rounds: int = 1  # 2: thresholds again on the inputs that the sparse model makes
    allocation: str = "uniform"  # error, relative, fisher, kl
    budget: float | None = None
    within: float = 1.0  # of an allocation: how far a layer's sparsities may be from `up` and `down`
    sets: list[str] = field(default_factory=lambda: ["wikitext", "c4", "lambada", "words"])

    def of_layer(self, index: int, layers: int) -> Variant:
        if index < layers - 1:
            return self
        up, down = self.last or (self.up, self.down)
        power = self.gate_power if self.last_power is None else self.last_power
        return replace(self, gate_power=power, up=up, down=down)

    def options(self) -> list[tuple[float, float]]:
        """Up and down sparsities that an allocation chooses from."""
        offset, near = self.down - self.up, self.within + 1e-6
        if self.allocation == "kl":
            some = [(s - offset / 2, s + offset / 2) for s in (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
        else:
            some = [(a, b) for a in GRID for b in GRID if a <= b <= a + 0.4]
        return [(a, b) for a, b in some if abs(a - self.up) <= near and abs(b - self.down) <= near]


def moment(values: Tensor, power: int = 2) -> Tensor:
    """The ``power``-th root of each neuron's mean ``power``-th power."""
    return values.abs().pow(power).mean((0, 1)) ** (1 / power)


# From v, u, the row gradients Wd_j . g (each [windows, window, I]) and norm(Wd_j): what a gate value of 1 is worth.
GATE_WEIGHTS = {
    "none": lambda v, u, r, norm: None,
    "rms": lambda v, u, r, norm: moment(u) * norm,
    "u": lambda v, u, r, norm: moment(u),
    "norm": lambda v, u, r, norm: norm,
    "mean": lambda v, u, r, norm: moment(u, 1) * norm,
    "fourth": lambda v, u, r, norm: moment(u, 4) * norm,
    "largest": lambda v, u, r, norm: u.abs().amax((0, 1)) * norm,
    "active": lambda v, u, r, norm: moment(v * u) / moment(v) * norm,  # rms of u where the gate is large
    "fisher": lambda v, u, r, norm: moment(u * r),
    "fisher_mean": lambda v, u, r, norm: moment(u * r, 1),
    "fisher_fourth": lambda v, u, r, norm: moment(u * r, 4),
    "fisher_active": lambda v, u, r, norm: moment(v * u * r) / moment(v),
    "fisher_apart": lambda v, u, r, norm: moment(u) * moment(r),
}


class Sample:
    """One layer on one calibration text.

    Attributes:
        v, u: ``[windows, window, I]``, act(x Wg) and x Wu of the dense model.
        rows: ``[windows, window, I]``, ``Wd_j . g`` with g the gradient of log p(y) at the layer's output.
        down: ``[H, I]``, the down projection's weight.
    """

    def __init__(self, v: Tensor, u: Tensor, rows: Tensor, down: Tensor) -> None:
        self.v, self.u, self.rows, self.down = v, u, rows, down
        self.norm = down.norm(dim=0)

    def weights(self, variant: Variant) -> tuple[Tensor | None, Tensor | None]:
        v, u, r = (t[:, variant.skip :] for t in (self.v, self.u, self.rows))
        gate = GATE_WEIGHTS[variant.gate_weight](v, u, r, self.norm)
        down = {"none": None, "norm": self.norm, "fisher": moment(r)}[variant.down_weight]
        if gate is not None:
            gate = gate**variant.gate_power
            gate = gate / gate.median()
            if variant.clip:
                gate = gate.clamp(1 / variant.clip, variant.clip)
        return gate, down

    def thresholds(
        self, variant: Variant, up: float, down: float, v: Tensor, u: Tensor, stride: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Of the gate and of the contribution, from every ``stride``-th token of ``v`` and ``u``."""
        gate_weight, down_weight = self.weights(variant)
        v, u = (t[:, variant.skip :: stride] for t in (v, u))
        a = v.abs() if gate_weight is None else v.abs() * gate_weight
        threshold = quantile(a, up)
        threshold = threshold if gate_weight is None else threshold / gate_weight
        if down <= up:
            return threshold, None
        b = (v * u).abs() if down_weight is None else (v * u).abs() * down_weight
        cut = quantile(torch.where(v.abs() >= threshold, b, 0), down)
        return threshold, cut if down_weight is None else cut / down_weight

    def mean_dropped(self, threshold: Tensor, down_threshold: Tensor | None) -> Tensor:
        h = self.v * self.u
        kept = self.v.abs() >= threshold
        if down_threshold is not None:
            kept &= h.abs() >= down_threshold
        return torch.where(kept, 0, h).mean((0, 1)) @ self.down.T

    def losses(self, variant: Variant, options: list[tuple[float, float]]) -> list[float]:
        """What each option's dropped neurons do to this layer's output, or, with "fisher", to the predictions."""
        half = max(1, len(self.v) // 2)
        v, u, r = (t[:half, variant.skip :] for t in (self.v, self.u, self.rows))
        gate_weight, down_weight = self.weights(variant)
        h, a = v * u, v.abs() if gate_weight is None else v.abs() * gate_weight
        b = h.abs() if down_weight is None else h.abs() * down_weight
        whole = (h @ self.down.T).square().sum(-1)
        a_sorted, losses = a.flatten().sort().values, {}
        for up in sorted({up for up, _ in options}):
            passed = a >= a_sorted[int(up * len(a_sorted))]
            b_passed = torch.where(passed, b, 0)
            b_sorted = b_passed.flatten().sort().values
            for option in options:
                if option[0] != up:
                    continue
                dropped = torch.where(b_passed >= b_sorted[int(option[1] * len(b_sorted))], 0, h)
                if option[1] <= up:
                    dropped = torch.where(passed, 0, h)
                if variant.allocation == "fisher":
                    loss = (dropped * r).sum(-1).square() / 2
                else:
                    loss = (dropped @ self.down.T).square().sum(-1)
                    if variant.allocation == "relative":
                        loss = loss / whole
                losses[option] = loss.mean()
        return torch.stack([losses[option] for option in options]).tolist()


def quantile(values: Tensor, q: float) -> Tensor:
    flat = values.flatten()
    if q <= 0:
        return flat.new_zeros(())
    rank = int(q * flat.numel())
    return flat.kthvalue(rank + 1).values if flat.device.type == "cpu" else flat.sort().values[rank]
