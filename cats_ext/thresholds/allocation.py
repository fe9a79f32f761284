"""How a budget of bytes is spread over layers: one option a layer, with the smallest sum of measured losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cats_ext.thresholds.rules import Split, bytes_share, check_tensor, check_usable

ALLOCATIONS = ("uniform", "search")
_UP_SPARSITIES = (*(i / 20 for i in range(20)), 0.99)
_DOWN_OFFSETS = (0.0, 0.15, 0.25, 0.35)  # of the down sparsity over the up sparsity


def search_options(rule: str) -> list[tuple[float, float]]:
    """The up and down sparsities that a search chooses from."""
    if rule != "two_threshold":
        return [(up, up) for up in _UP_SPARSITIES]
    return sorted(
        {(up, min(round(up + more, 2), _UP_SPARSITIES[-1])) for up in _UP_SPARSITIES for more in _DOWN_OFFSETS}
    )


@dataclass(eq=False)
class LossTable:
    """The measured loss of each layer at each option; the allocation of any budget follows from it.

    Attributes:
        options: float64 ``[P, 2]``, up and down sparsity.
        losses: float64 ``[L, P]``, an estimate of the Kullback-Leibler divergence from the dense model, in nats a
            position, if this layer alone is sparse.
        spread: largest difference between a layer's sparsities and those of the uniform allocation.
    """

    options: Tensor
    losses: Tensor
    spread: float = 1.0

    def pack(self) -> dict[str, Tensor]:
        """Tensors for a file."""
        return {
            "options": self.options.contiguous(),
            "losses": self.losses.contiguous(),
            "spread": torch.tensor(self.spread, dtype=torch.float64),
        }

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], layers: int) -> LossTable:
        """Inverse of :meth:`pack`, for a number of layers; removes what it uses from ``tensors``.

        Raises:
            KeyError, TypeError, ValueError: something is missing, out of its range, or does not fit.
        """
        options, losses = tensors.pop("options"), tensors.pop("losses")
        spread = tensors.pop("spread", torch.tensor(1.0, dtype=torch.float64))  # not in early files
        check_tensor("options", options, (torch.float64,), [(-1, 2)])
        check_tensor("losses", losses, (torch.float64,), [(layers, len(options))])
        check_tensor("spread", spread, (torch.float64,), [()])
        for name, tensor in (("options", options), ("losses", losses), ("spread", spread)):
            check_usable(name, tensor)
        if not len(options) or options.max() >= 1 or not 0 < spread <= 1:
            raise ValueError(
                f"options must be sparsities in [0, 1) and spread in (0, 1], got {options.tolist()!r:.60} and {spread}"
            )
        return cls(options, losses, float(spread))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LossTable)
            and torch.equal(self.options, other.options)
            and torch.equal(self.losses, other.losses)
            and self.spread == other.spread
        )

    def targets(self, budget: float, sizes: Sequence[int], uniform: Split) -> list[Split]:
        """Up and down sparsity of each layer with the smallest sum of losses; the last layer keeps the uniform ones.

        The last layer is left out because its MLP changes the logits directly. Masking it raises the average divergence
        but keeps the accuracy on rare words (LAMBADA), and the losses measure only the divergence
        (docs/quality-evidence.md).

        Args:
            budget: share of all MLP bytes that a token may read.
            sizes: of the layers, in any unit.
            uniform: meets the budget if every layer has it.

        Raises:
            ValueError: no option is within ``spread`` of ``uniform``, or the cheapest options exceed the budget.
        """
        rows = uniform.up, uniform.down
        near = (self.options - torch.tensor(rows, dtype=torch.float64)).abs().amax(1) <= self.spread + 1e-9
        options, losses = self.options[near], self.losses[:-1, near]
        if len(sizes) == 1:
            return [uniform]
        if not len(options):
            raise ValueError(f"no sparsity that was tried is within {self.spread} of {rows}: a wider spread is needed")
        shares = torch.tensor([bytes_share(up, down) for up, down in options.tolist()], dtype=torch.float64)
        weight = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        if budget < (1 - 1e-6) * float(shares.min()):
            raise ValueError(f"budget must be at least {float(shares.min()):.4g} for a search, got {budget:.4g}")
        choice = allocate(losses, weight[:-1, None] * shares, budget - float(weight[-1]) * bytes_share(*uniform))
        return [*(Split(*options[option].tolist()) for option in choice), uniform]


def allocate(losses: Tensor, costs: Tensor, budget: float) -> list[int]:
    """One option per layer with the smallest sum of losses that a total cost of ``budget`` affords.

    The losses of layers are assumed to add up. A Lagrange multiplier, found by bisection, gives the exact solution on
    each layer's lower convex hull of loss over cost. The rest of the budget is spent greedily: each step takes the
    option that reduces the loss most for a unit of cost.

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
