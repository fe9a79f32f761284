"""Whether a difference between two models on the same items is significant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test on two models' right answers to the same items.

    The hypothesis is that, of the items which only one model got right, each model got half.

    Raises:
        ValueError: the sequences differ in length.
    """
    first, second = _discordant(one, other)
    n, fewer = first + second, min(first, second)
    # Integers, since 2**-n underflows for thousands of items; divided last.
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, (2 * tail) / (1 << n))


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models on the items of one task, accuracies as shares.

    Attributes:
        dense_se, sparse_se: standard errors of the accuracies.
        difference, difference_se: sparse minus dense, and the standard error of the paired difference.
        lost, gained: items that only the dense, or only the sparse model got right.
        p_value: of :func:`mcnemar`.
    """

    task: str
    items: int
    dense: float
    dense_se: float
    sparse: float
    sparse_se: float
    difference: float
    difference_se: float
    lost: int
    gained: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def paired_accuracy(task: str, dense: Sequence[bool], sparse: Sequence[bool]) -> PairedAccuracy:
    """Compare two models on the same items. Raises ValueError for no items, or a different number of them."""
    lost, gained = _discordant(dense, sparse)
    n = len(dense)
    if n == 0:
        raise ValueError(f"task {task} has no items")
    a, b = sum(map(bool, dense)) / n, sum(map(bool, sparse)) / n
    spread = (lost + gained) / n - (b - a) ** 2
    return PairedAccuracy(
        task, n, a, _se(a * (1 - a), n), b, _se(b * (1 - b), n), b - a, _se(spread, n), lost, gained,
        mcnemar(dense, sparse),
    )  # fmt: skip


def mean_accuracy(tasks: Mapping[str, PairedAccuracy]) -> PairedAccuracy:
    """The unweighted mean over tasks; its p-value is that of a normal test of the mean difference."""
    if not tasks:
        raise ValueError("tasks must not be empty")
    each = list(tasks.values())

    def mean(name: str) -> float:
        return sum(getattr(task, name) for task in each) / len(each)

    def mean_se(name: str) -> float:
        return math.sqrt(sum(getattr(task, name) ** 2 for task in each)) / len(each)

    difference, difference_se = mean("difference"), mean_se("difference_se")
    z = abs(difference) / difference_se if difference_se > 0 else (0.0 if difference == 0 else math.inf)
    return PairedAccuracy(
        "mean", sum(task.items for task in each), mean("dense"), mean_se("dense_se"), mean("sparse"),
        mean_se("sparse_se"), difference, difference_se, sum(task.lost for task in each),
        sum(task.gained for task in each), math.erfc(z / math.sqrt(2)),
    )  # fmt: skip


def _discordant(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int]:
    if len(one) != len(other):
        raise ValueError(f"both models must have answered the same items, got {len(one)} and {len(other)}")
    pairs = [(bool(a), bool(b)) for a, b in zip(one, other, strict=True)]
    return pairs.count((True, False)), pairs.count((False, True))


def _se(variance: float, n: int) -> float:
    """Standard error of a mean of n values of this (population) variance; NaN for one value."""
    return math.sqrt(max(variance, 0.0) / (n - 1)) if n > 1 else math.nan
