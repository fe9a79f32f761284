"""How a budget of bytes is spread over layers: the choice per layer that minimises the sum of measured losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cats_ext.thresholds.rules import bytes_share


@dataclass(eq=False)
class LossTable:
    """What each layer loses at each option, measured; any budget's allocation follows from it.

    Attributes:
        options: float64 ``[P, 2]``, up and down sparsity.
        losses: float64 ``[L, P]``, an estimate of the Kullback-Leibler divergence from the dense model, in nats a
            position, if this layer alone is sparse.
        spread: how far a layer's sparsities may be from those that all layers would have without a search.
    """

    options: Tensor
    losses: Tensor
    spread: float = 1.0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LossTable)
            and torch.equal(self.options, other.options)
            and torch.equal(self.losses, other.losses)
            and self.spread == other.spread
        )

    __hash__ = None

    def targets(self, budget: float, sizes: Sequence[int], uniform: tuple[float, float]) -> list[tuple[float, float]]:
        """Up and down sparsity of each layer, with the least loss in all; the last layer's are the uniform ones.

        What the last layer drops changes the logits at once, for the worse on average and for the better where a rare
        word is wanted. The losses show only the first (docs/quality.md).

        Args:
            budget: share of all MLP bytes that a token may read.
            sizes: of the layers, in any unit.
            uniform: up and down sparsity at which all layers alike meet the budget.

        Raises:
            ValueError: the budget is out of what the options allow.
        """
        near = (self.options - torch.tensor(uniform, dtype=torch.float64)).abs().amax(1) <= self.spread + 1e-9
        options, losses = self.options[near], self.losses[:-1, near]
        if len(sizes) == 1:
            return [uniform]
        if not len(options):
            raise ValueError(
                f"no sparsity that was tried is within {self.spread} of {uniform}: a wider spread is needed"
            )
        shares = torch.tensor([bytes_share(up, down) for up, down in options.tolist()], dtype=torch.float64)
        weight = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        if budget < (1 - 1e-6) * float(shares.min()):
            raise ValueError(f"budget must be at least {float(shares.min()):.4g} for a search, got {budget:.4g}")
        choice = allocate(losses, weight[:-1, None] * shares, budget - float(weight[-1]) * bytes_share(*uniform))
        return [*(tuple(options[option].tolist()) for option in choice), uniform]


def allocate(losses: Tensor, costs: Tensor, budget: float) -> list[int]:
    """One option per layer with the smallest sum of losses that a total cost of ``budget`` affords.

    The losses of layers are taken to add up. Solved by a Lagrange multiplier found by bisection, which is exact on each
    layer's lower convex hull of loss over cost; what then is left of the budget goes, step by step, where a unit of
    cost buys the largest loss.

    Args:
        losses: ``[L, P]``, loss of option p in layer l.
        costs: ``[L, P]``, its cost.
        budget: what the chosen costs may add up to.

    Returns:
        ``L`` indices into the P options.

    Raises:
        ValueError: a loss is not finite, or even the cheapest options exceed the budget.
    """
    losses, costs = losses.double().cpu(), costs.double().cpu()
    if not torch.isfinite(losses).all():
        layer = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        raise ValueError(f"losses must be finite, got {losses[layer].tolist()} for layer {layer}")
    cheapest = float(costs.min(1).values.sum())
    asked, budget = budget, budget * (1 + 1e-6)  # room for rounding
    if cheapest > budget:
        raise ValueError(f"budget must be at least {cheapest:.4g}, the cost of the cheapest options, got {asked:.4g}")

    def best(price: float) -> Tensor:
        return (losses + price * costs).argmin(1)

    def cost(choice: Tensor) -> float:
        return float(costs.gather(1, choice[:, None]).sum())

    low, high = 0.0, 1.0
    while cost(best(high)) > budget and high < 1e30:
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(best(middle)) <= budget else (middle, high)
    choice = best(high)
    if cost(choice) > budget:  # options of equal loss: the price never mattered
        choice = costs.argmin(1)
    return _spend_rest(losses, costs, choice, budget)


def _spend_rest(losses: Tensor, costs: Tensor, choice: Tensor, budget: float) -> list[int]:
    while True:
        now_loss, now_cost = losses.gather(1, choice[:, None]), costs.gather(1, choice[:, None])
        gain, extra = now_loss - losses, costs - now_cost
        room = budget - float(now_cost.sum())
        rate = torch.where((gain > 0) & (extra <= room), gain / extra.clamp(min=1e-12), 0)
        where = int(rate.argmax())
        if rate.flatten()[where] <= 0:
            return choice.tolist()
        choice[where // losses.shape[1]] = where % losses.shape[1]
