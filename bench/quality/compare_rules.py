"""Rules of quality.compare: thresholds of one layer as exact quantiles, and what stands in for the skipped neurons.

Everything here follows from the inputs of one MLP on the calibration text and the gradients at its output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_ext.thresholds.rules import bytes_share

_QUANTILE_VALUES = 1 << 23  # about as many are sorted for a quantile, of whole tokens
_RIDGE = 1e-2  # of the mean square of an input, added to the diagonal of a regression


@dataclass(frozen=True)
class Variant:
    """A rule for the MLPs, at a share ``budget`` of their bytes; ``None`` stands for a dense model.

    Attributes:
        gate, down: what weights the tests: none, norm, gradient; of the gate also mean (CHESS: E|u|).
        offset: half the difference between down and up sparsity; 0 is one threshold.
        compensation: of the skipped neurons: mean (a constant), means (one a neuron), all (means over all tokens),
            bias (the constant that changes the predictions least), shift (the mean of act(gate), times up: as a map of
            x), map (ridge regression on x), both (means, and a map of what remains).
        rank: of the map of x; None: full.
        centred: both tests measure the distance from the mean of what is skipped.
        sequential: calibrated on inputs that the sparse layers before it make; "residual" also corrects the mean of
            the residual stream.
        gain: scale the kept neurons' sum by the factor that changes the predictions least.
        allocation: uniform, gradient (the package's search), free (also the last layer), measured (by differences in KL
            around the uniform allocation).
        tuned: steps of training the constants and output gains on the divergence.
        inputs: by scope (attention, gate), the share of the inputs that is skipped there as WINA does; the rows of up
            and down are skipped less for it.
    """

    name: str
    budget: float = 2 / 3
    gate: str = "gradient"
    gate_power: float = 0.5
    last_power: float | None = 0.0625
    down: str = "gradient"
    offset: float = 0.125
    compensation: str = "none"
    rank: int | None = None
    centred: bool = False
    compensate_last: bool = True
    sequential: str = ""
    gain: bool = False
    allocation: str = "uniform"
    tuned: int = 0
    inputs: dict[str, float] = field(default_factory=dict)
    tasks: int = 0  # 0: none; else the order in which tasks are measured

    def extra(self, hidden: int, intermediate: int) -> float:
        """Bytes beside the rows, as a share of the MLP's."""
        vectors = {"none": 0, "mean": hidden, "bias": hidden}.get(self.compensation, hidden + intermediate)
        if self.compensation in ("shift", "map", "both"):
            rank = min(self.rank or hidden, hidden)
            vectors += hidden * hidden if rank * 2 >= hidden else 2 * rank * hidden
        return vectors / (3 * hidden * intermediate)

    def split(self, hidden: int, intermediate: int, saved: float = 0.0) -> tuple[float, float]:
        """Up and down sparsity of all layers alike, where the share ``saved`` is saved elsewhere."""
        sparsity = 1.5 * (1 - self.budget + self.extra(hidden, intermediate) - saved)
        offset = min(self.offset, (1 - sparsity) / 2)
        return sparsity - offset, sparsity + offset

    def power(self, last: bool) -> float:
        return self.gate_power if self.last_power is None or not last else self.last_power


@dataclass
class Rule:
    """One sparse layer: ``y = gain * sum over kept (h_j - mean_j) Wd_j + constant + map(x)``."""

    threshold: Tensor
    down_threshold: Tensor | None = None
    centre: Tensor | float = 0.0  # of the gate's test
    down_centre: Tensor | float = 0.0
    shift: Tensor | float = 0.0  # h = (v - shift) u
    mean: Tensor | float = 0.0
    constant: Tensor | float = 0.0
    into: Tensor | None = None  # [r, H]; the whole map if there is no out
    out: Tensor | None = None
    gain: Tensor | float = 1.0
    seen: list = field(default_factory=lambda: [0, 0, 0])  # neurons, passed the gate, kept

    def kept(self, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contributions ``h``, which pass the gate, and which are kept."""
        passed, h = (v - self.centre).abs() >= self.threshold, (v - self.shift) * u
        if self.down_threshold is None:
            return h, passed, passed
        return h, passed, passed & ((h - self.down_centre).abs() >= self.down_threshold)

    def __call__(self, mlp: nn.Module, x: Tensor) -> Tensor:
        v, u = F.silu(mlp.gate_proj(x)), mlp.up_proj(x)
        h, passed, kept = self.kept(v, u)
        for i, count in enumerate((v.numel(), passed.sum(), kept.sum())):
            self.seen[i] = self.seen[i] + count
        y = mlp.down_proj(torch.where(kept, h - self.mean, 0)) * self.gain + self.constant
        if self.into is not None:
            inside = x @ self.into.T
            y = y + (inside if self.out is None else inside @ self.out.T)
        return y


def quantile(values: Tensor, q: float) -> Tensor:
    flat = values[:: max(1, values.numel() // _QUANTILE_VALUES)].flatten()
    return flat.sort().values[min(int(q * flat.numel()), flat.numel() - 1)] if q > 0 else flat.new_zeros(())


class Layer:
    """One MLP on the calibration text: its inputs ``x`` and the gradients ``g`` at its output, ``[N, H]``."""

    def __init__(self, mlp: nn.Module, x: Tensor, g: Tensor, last: bool) -> None:
        self.mlp, self.x, self.g, self.last = mlp, x, g, last
        self.down = mlp.down_proj.weight.detach()  # [H, I]
        u, r = mlp.up_proj(x), g @ self.down
        self.weights = {
            "none": torch.ones_like(self.down[0]),
            "norm": u.square().mean(0).sqrt() * self.down.norm(dim=0),
            "mean": u.abs().mean(0),
            "gradient": (u * r).square().mean(0).sqrt(),
            "down norm": self.down.norm(dim=0),
            "down gradient": r.square().mean(0).sqrt(),
        }

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(self.mlp.gate_proj(x)), self.mlp.up_proj(x)

    @torch.no_grad()
    def fit(self, variant: Variant, split: tuple[float, float], x: Tensor | None = None) -> Rule:
        """The rule at an up and a down sparsity, on the inputs ``x`` or on the dense model's."""
        x = self.x if x is None else x
        v, u = self.activations(x)
        weight = self.weights[variant.gate] ** variant.power(self.last)
        down_weight = self.weights[{"none": "none"}.get(variant.down, f"down {variant.down}")]
        compensation = variant.compensation if variant.compensate_last or not self.last else "none"
        up, down = split
        rule = Rule(quantile(v.abs() * weight, up) / weight)
        if compensation == "shift":
            rule.centre = rule.shift = v.mean(0)
            for _ in range(4):
                apart = (v - rule.centre).abs()
                rule.centre = rule.shift = mean_where(apart < quantile(apart * weight, up) / weight, v)
            rule.threshold = quantile((v - rule.centre).abs() * weight, up) / weight
        for _ in range(3 if variant.centred else 1):
            h, passed, kept = rule.kept(v, u)
            if down > up:
                some = torch.where(passed, (h - rule.down_centre).abs() * down_weight, 0)
                rule.down_threshold = quantile(some, down) / down_weight
                kept = passed & ((h - rule.down_centre).abs() >= rule.down_threshold)
            if variant.centred:
                rule.down_centre = mean_where(~kept, h)
        if compensation == "shift":
            self._map(rule, x, (self.down * rule.shift) @ self.mlp.up_proj.weight.detach(), variant.rank)
        self._compensate(rule, variant, compensation, x, h, kept)
        return rule

    def _compensate(self, rule: Rule, variant: Variant, compensation: str, x: Tensor, h: Tensor, kept: Tensor) -> None:
        if compensation in ("means", "both", "shift"):
            rule.mean = mean_where(~kept, h)
        elif compensation == "all":
            rule.mean = h.mean(0)
        base = h.sub(rule.mean) if compensation in ("means", "both", "shift", "all") else h
        skipped = torch.where(kept, 0, base)
        if compensation in ("means", "both", "shift", "all"):
            rule.constant = rule.constant + self.down @ rule.mean
        if compensation == "mean":
            rule.constant = self.down @ skipped.mean(0)
        if compensation == "bias":
            s = skipped @ self.down.T
            metric = self._metric()
            rule.constant = torch.linalg.solve(metric, (self.g * (self.g * s).sum(-1, keepdim=True)).mean(0))
        if compensation in ("map", "both"):
            s, centre = skipped @ self.down.T, x.mean(0)
            near = x - centre
            square = near.T @ near / len(x)
            square += _RIDGE * square.diagonal().mean() * torch.eye(len(square), device=x.device)
            whole = torch.linalg.solve(square, near.T @ (s - s.mean(0)) / len(x)).T
            rule.constant = rule.constant + s.mean(0)
            self._map(rule, x, whole, variant.rank)
        if variant.gain:
            full, sparse = (
                (self.g * (h @ self.down.T)).sum(-1),
                (self.g * (torch.where(kept, h, 0) @ self.down.T)).sum(-1),
            )
            rule.gain = (full * sparse).mean() / sparse.square().mean()

    def _metric(self) -> Tensor:
        """Second moments of the gradients, made regular."""
        found = self.g.T @ self.g / len(self.g)
        return found + 0.1 * found.diagonal().mean() * torch.eye(len(found), device=found.device)

    def _map(self, rule: Rule, x: Tensor, whole: Tensor, rank: int | None) -> None:
        """Add a map of x, cut to ``rank`` where that changes the predictions least; at E[x] it adds nothing."""
        centre = x.mean(0)
        before = whole @ centre
        if rank is not None and 2 * rank < len(whole):
            near = x - centre
            square = near.T @ near / len(x)
            square += 1e-4 * square.diagonal().mean() * torch.eye(len(square), device=x.device)
            out, inner = (torch.linalg.cholesky(matrix) for matrix in (self._metric(), square))
            product = out.T @ whole @ inner
            basis = torch.linalg.eigh(product @ product.T).eigenvectors[:, -rank:]
            rule.out = torch.linalg.solve_triangular(out.T, basis, upper=True)
            rule.into = basis.T @ out.T @ whole
            mapped = rule.out @ (rule.into @ centre)
        else:
            rule.into, mapped = whole, before
        # regressions are on x - E[x]; the shift's map is of x itself
        rule.constant = rule.constant - mapped + (before if isinstance(rule.shift, Tensor) else 0)

    @torch.no_grad()
    def losses(self, variant: Variant, options: list[tuple[float, float]], stride: int = 8) -> list[float]:
        """To second order, the divergence that each option's dropped neurons cause."""
        x, g = self.x[::stride], self.g[::stride]
        (v, u), r, found = self.activations(x), g @ self.down, []
        for option in options:
            rule = self.fit(variant, option, x)
            h, _, kept = rule.kept(v, u)
            change = (torch.where(kept, 0, h - rule.mean) * r).sum(-1)
            if not isinstance(rule.mean, Tensor):
                change = change - g @ (rule.constant + torch.zeros_like(g[0]))
            found.append(float(change.square().mean() / 2))
        return found


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(0) / mask.sum(0).clamp(min=1)


def search_options() -> list[tuple[float, float]]:
    """Up and down sparsities that a search chooses from."""
    levels = [(i / 20, offset) for i in range(1, 20) for offset in (0.05, 0.125, 0.2) if i % 2 == 0 or offset == 0.125]
    return [(max(s - o, 0.0), min(s + o, 0.98)) for s, o in levels]


def cost(split: tuple[float, float]) -> float:
    return bytes_share(*split)
