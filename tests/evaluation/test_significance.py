"""McNemar's test and paired accuracies against simulation and against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from cats_ext.evaluation.significance import mcnemar, mean_accuracy, paired_accuracy


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    dense = [True] * (both + lost) + [False] * (gained + neither)
    sparse = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return dense, sparse


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (2, 8, 112 / 1024)],
)
def test_mcnemar_by_hand(lost, gained, p):
    assert mcnemar(*answers(30, lost, gained, 7)) == pytest.approx(p)


def test_mcnemar_with_thousands_of_items():
    assert mcnemar(*answers(9000, 3000, 2000, 9000)) < 1e-40
    assert 0.9 < mcnemar(*answers(0, 2500, 2501, 0)) <= 1


def test_p_values_of_equal_models_are_uniform_or_larger():
    draw = random.Random(0)
    values = [
        mcnemar([draw.random() < 0.5 for _ in range(200)], [draw.random() < 0.5 for _ in range(200)])
        for _ in range(400)
    ]
    for level in (0.05, 0.2, 0.5):
        assert sum(p <= level for p in values) / 400 < level + 0.06


def test_paired_accuracy():
    got = paired_accuracy("piqa", *answers(50, 12, 8, 30))
    assert (got.items, got.lost, got.gained) == (100, 12, 8)
    assert got.dense == pytest.approx(0.62) and got.sparse == pytest.approx(0.58)
    differences = [-1] * 12 + [1] * 8 + [0] * 80
    variance = sum((d + 0.04) ** 2 for d in differences) / 99
    assert got.difference == pytest.approx(-0.04) and got.difference_se == pytest.approx(math.sqrt(variance / 100))
    assert got.dense_se == pytest.approx(math.sqrt(0.62 * 0.38 / 99))


def test_mean_over_tasks_weighs_them_equally():
    a, b = paired_accuracy("a", *answers(50, 12, 8, 30)), paired_accuracy("b", *answers(3, 1, 0, 6))
    mean = mean_accuracy({"a": a, "b": b})
    assert mean.items == 110 and mean.dense == pytest.approx((0.62 + 0.4) / 2)
    assert mean.difference == pytest.approx((-0.04 - 0.1) / 2)
    assert mean.difference_se == pytest.approx(math.hypot(a.difference_se, b.difference_se) / 2)
    assert 0 < mean.p_value < 1
    same = paired_accuracy("c", *answers(5, 0, 0, 5))
    assert mean_accuracy({"c": same}).p_value == 1


def test_errors():
    with pytest.raises(ValueError, match="same items, got 1 and 2"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="task piqa has no items"):
        paired_accuracy("piqa", [], [])
    with pytest.raises(ValueError, match="tasks must not be empty"):
        mean_accuracy({})
