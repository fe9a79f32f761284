"""Quantiles of the histogram against exact order statistics, on distributions chosen to be hard for buckets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_strategies

from cats_ext.thresholds.histogram import Histogram


def exact_quantile(values: torch.Tensor, q: float) -> float:
    ordered = values.float().abs().flatten().sort().values
    return float(ordered[int(q * len(ordered))])


def check_bounds(values: torch.Tensor, q: float, mantissa_bits: int = 9) -> None:
    histogram = Histogram(mantissa_bits)
    histogram.add(values)
    got, exact = histogram.quantile(q), exact_quantile(values, q)
    assert abs(got - exact) <= max(2.0**-mantissa_bits * exact, 2.0 ** -(126 + mantissa_bits))
    magnitudes = values.float().abs()
    bits = lambda x: torch.as_tensor(x).view(torch.int32) >> (23 - mantissa_bits)  # noqa: E731
    bucket = (bits(magnitudes) == bits(torch.tensor(exact))).float().mean().item()
    missed = (magnitudes < got).double().mean().item() - q
    last = bits(torch.tensor(exact)) == bits(torch.tensor(torch.finfo(torch.float32).max))  # its upper edge is infinite
    if bucket > 1 / 16 or last:
        assert -bucket - 1e-6 <= missed <= 1e-6
    else:
        assert abs(missed) <= bucket / 2 + 1e-6


generator = torch.Generator().manual_seed(0)
normal = torch.randn(20011, generator=generator)
DISTRIBUTIONS = {
    "normal": normal,
    "silu": torch.nn.functional.silu(normal),
    "all equal": torch.full((1000,), 0.3),
    "two values": torch.tensor([0.1, 7.0]).repeat(501),
    "mostly zeros": torch.where(torch.rand(20011, generator=generator) < 0.9, 0.0, normal),
    "all zeros": torch.zeros(100),
    "heavy tails": normal / torch.rand(20011, generator=generator) ** 6,
    "denormals": normal * 1e-39,
    "smallest denormals": torch.arange(200) * 2.0**-149,
    "across the smallest normal": torch.linspace(0, 1e-37, 3001),
    "huge": normal.clamp(-4, 4) * 8e37,
    "one value": torch.tensor([-2.5]),
    "two samples": torch.tensor([1.0, -3.0]),
    "bfloat16": normal.bfloat16(),
    "float16": normal.half(),
    "shape": normal[:20000].view(10, 40, 50),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("q", [0.0, 0.001, 0.1, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("mantissa_bits", [4, 9])
def test_quantile_is_in_the_bucket_of_the_exact_one(name, q, mantissa_bits):
    check_bounds(DISTRIBUTIONS[name], q, mantissa_bits)


@settings(max_examples=200, deadline=None)
@given(
    np_strategies.arrays(
        "float32", st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_quantile_bounds_on_any_values(values, q):
    check_bounds(torch.from_numpy(values), q)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
def test_a_value_that_occurs_often_is_kept(q):
    histogram = Histogram()
    histogram.add(torch.full((1000,), 0.3))
    assert histogram.quantile(q) <= 0.3


def test_where_silu_turns_back_many_values_share_a_bucket():
    # |silu| has a maximum of 0.27846 among negative arguments, and an unbounded density just below it.
    values = torch.nn.functional.silu(-0.5 + 1.2 * torch.randn(200_000, generator=generator)).abs()
    histogram = Histogram()
    histogram.add(values)
    most = histogram.counts.max().item() / len(values)
    assert 0.01 < most < 0.04
    for q in torch.linspace(0.4, 0.9, 101).tolist():
        assert (values < histogram.quantile(q)).float().mean().item() == pytest.approx(q, abs=most / 2)


def test_order_and_chunks_do_not_matter():
    values = DISTRIBUTIONS["heavy tails"]
    whole, pieces = Histogram(), Histogram()
    whole.add(values)
    for piece in values[torch.randperm(len(values))].split(997):
        pieces.add(piece)
    assert whole == pieces
    assert whole.total == len(values)


def test_non_contiguous_values():
    values = torch.randn(40, 30)
    a, b = Histogram(), Histogram()
    a.add(values.t()[::2])
    b.add(values.t()[::2].contiguous())
    assert a == b


def test_memory_and_counts_beyond_int32():
    histogram = Histogram()
    assert histogram.counts.numel() * histogram.counts.element_size() < 2 * 2**20
    histogram.add(torch.tensor([1.0]))
    histogram.counts *= 2**40
    assert histogram.total == 2**40
    assert histogram.quantile(0.5) == 1.0


def test_share_below():
    histogram = Histogram()
    histogram.add(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert [histogram.share_below(t) for t in (0.0, 0.25, 0.3, 0.5, 2.0)] == [0, 0.25, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("name", ["normal", "mostly zeros", "one value", "denormals"])
def test_trimming_round_trip(name):
    histogram = Histogram()
    histogram.add(DISTRIBUTIONS[name])
    first, counts = histogram.trimmed()
    assert counts[0] > 0 and counts[-1] > 0
    assert Histogram.from_trimmed(first, counts, 9) == histogram
    first, counts = histogram.trimmed(start=1)
    assert first > 0 and Histogram.from_trimmed(first, counts, 9, zeros=histogram.zeros) == histogram
    assert Histogram.from_trimmed(*Histogram().trimmed(), 9) == Histogram()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_not_finite_is_an_error(bad):
    histogram = Histogram()
    with pytest.raises(ValueError, match="1 of 3 values are NaN or infinite"):
        histogram.add(torch.tensor([1.0, bad, 2.0]))
    assert histogram.total == 0


def test_errors():
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\), got 1.5"):
        Histogram().quantile(1.5)
    with pytest.raises(ValueError, match="empty"):
        Histogram().quantile(0.5)
    with pytest.raises(ValueError, match="mantissa_bits must be in"):
        Histogram(17)
    with pytest.raises(ValueError, match=r"first must be in \[0, 130558\]"):
        Histogram.from_trimmed((255 << 9) - 1, torch.ones(2, dtype=torch.int64), 9)
