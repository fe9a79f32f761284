"""How a budget is spread over layers, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from cats_ext.thresholds.allocation import LossTable, allocate, search_options
from cats_ext.thresholds.rules import Split

HALF = Split(0.5, 0.5)


def brute_force(losses, costs, budget):
    best = min(
        (
            sum(losses[i][p] for i, p in enumerate(choice))
            for choice in itertools.product(range(len(losses[0])), repeat=len(losses))
            if sum(costs[i][p] for i, p in enumerate(choice)) <= budget + 1e-9
        ),
    )
    return best


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_close_to_the_best_there_is(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.linspace(1, 0.4, 6, dtype=torch.float64).expand(4, -1)
    scale = torch.rand(4, 1, generator=generator, dtype=torch.float64) * 10
    losses = scale * (1 - costs) ** 2 * (1 + 0.1 * torch.rand(4, 6, generator=generator, dtype=torch.float64))
    for budget in (1.7, 2.3, 3.1, 3.9, 4.0):
        choice = allocate(losses, costs, budget)
        total = sum(float(losses[i, p]) for i, p in enumerate(choice))
        assert sum(float(costs[i, p]) for i, p in enumerate(choice)) <= budget * (1 + 2e-6)
        assert total <= 1.15 * brute_force(losses.tolist(), costs.tolist(), budget) + 1e-12


def test_layers_that_lose_nothing_give_all():
    losses = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    costs = torch.tensor([[1.0, 0.6, 0.4]]).expand(2, -1)
    assert allocate(losses, costs, 1.4)[1] == 0
    assert allocate(losses, costs, 2.0)[1] == 0


def test_allocation_errors():
    costs = torch.tensor([[1.0, 0.5]]).expand(2, -1)
    with pytest.raises(ValueError, match=r"budget must be at least 1, the cost of the cheapest options, got 0.9"):
        allocate(torch.zeros(2, 2), costs, 0.9)
    with pytest.raises(ValueError, match=r"losses must be finite, got \[0.0, nan\] for layer 1"):
        allocate(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), costs, 2)


def test_a_table_weighs_layers_by_their_size():
    table = LossTable(torch.tensor([[0.0, 0.0], [0.6, 0.6]], dtype=torch.float64), torch.tensor([[0.0, 1.0]] * 3))
    # 0.6 of the small layer's rows saves 0.4 of a tenth of all bytes; only the large one affords the budget
    assert table.targets(0.65, [1, 8, 1], HALF) == [Split(0.0, 0.0), Split(0.6, 0.6), HALF]


def test_no_layer_is_further_from_the_uniform_allocation_than_the_spread():
    options = torch.tensor([[i / 10, i / 10] for i in range(9)], dtype=torch.float64)
    losses = torch.stack([torch.arange(9.0), 100 * torch.arange(9.0), torch.zeros(9)])
    for spread, first in ((1.0, (0.8, 0.2)), (0.2, (0.7, 0.3))):
        expected = [*(Split(share, share) for share in first), HALF]
        assert LossTable(options, losses, spread).targets(2 / 3, [1] * 3, HALF) == expected
    assert LossTable(options, losses[:1]).targets(2 / 3, [1], HALF) == [HALF]
    with pytest.raises(ValueError, match=r"within 0.01 of \(0.55, 0.55\): a wider spread"):
        LossTable(options, losses, 0.01).targets(0.64, [1] * 3, Split(0.55, 0.55))


def test_options_are_sparsities():
    for rule in ("plain", "weighted", "two_threshold"):
        assert all(0 <= up <= down < 1 for up, down in search_options(rule))
        assert (0.0, 0.0) in search_options(rule)
    assert all(up == down for up, down in search_options("weighted"))
