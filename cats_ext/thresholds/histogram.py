"""Quantiles of magnitudes in bounded memory: a histogram over the upper bits of the float32 pattern.

The bits of a non-negative float32 sort like its value, so dropping the low mantissa bits gives log-spaced buckets for
free: every power of two is cut into ``2**mantissa_bits`` equal parts. Counts are integers, so the result does not
depend on the order of the data.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from cats_ext.thresholds.rules import check_count

_MANTISSA = 23  # stored mantissa bits of float32
MANTISSA_BITS = 9  # of a bucket: relative width 0.2 %
_MOST_BITS = 16
_CHUNK = 1 << 20  # values bucketed at a time: temporaries of some 20 MB


def bucket_edge(bucket: int, mantissa_bits: int) -> float:
    """Smallest magnitude that falls into ``bucket``."""
    return struct.unpack("<f", struct.pack("<I", bucket << (_MANTISSA - mantissa_bits)))[0]


def buckets_of(values: Tensor, mantissa_bits: int) -> Tensor:
    """The bucket of each ``|value|``, computed as float32: int32, flat."""
    magnitudes = values.detach().reshape(-1).float().abs()
    return magnitudes.view(torch.int32).bitwise_right_shift_(_MANTISSA - mantissa_bits)


def check_counts(name: str, counts: Tensor) -> None:
    """Raise ValueError unless no count is negative and their sum is in [1, 2**62]."""
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"{name} must have no negative count, got {int(counts.min())}")
    total = float(counts.double().sum())
    if not 1 <= total <= 2**62:
        raise ValueError(f"{name} must count between 1 and 2**62 values, got {total:.6g}")


class Histogram:
    """Distribution of ``|value|`` for float32 values, in ``256 * 2**mantissa_bits`` int64 counts (1 MiB by default).

    A bucket of normal numbers has the relative width ``2**-mantissa_bits`` (0.2 % by default); below the smallest
    normal number 2**-126 the width is the constant ``2**-(126 + mantissa_bits)``.
    """

    def __init__(self, mantissa_bits: int = MANTISSA_BITS, device: torch.device | str = "cpu") -> None:
        check_count("mantissa_bits", mantissa_bits, 0, _MOST_BITS)
        self.mantissa_bits = mantissa_bits
        self.counts = torch.zeros(256 << mantissa_bits, dtype=torch.int64, device=device)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and self.mantissa_bits == other.mantissa_bits
            and torch.equal(self.counts.cpu(), other.counts.cpu())
        )

    def add(self, values: Tensor) -> None:
        """Count ``|values|`` (any shape, computed as float32).

        Raises:
            ValueError: a value is NaN or infinite. Nothing is counted then beyond earlier chunks of ``values``.
        """
        for chunk in values.reshape(-1).split(_CHUNK):
            counts = torch.bincount(buckets_of(chunk, self.mantissa_bits), minlength=len(self.counts))
            not_finite = int(counts[255 << self.mantissa_bits :].sum())
            if not_finite:
                raise ValueError(f"{not_finite} of {len(chunk)} values are NaN or infinite")
            self.counts += counts

    def cpu(self) -> Histogram:
        """The same counts on the CPU."""
        copied = Histogram(self.mantissa_bits)
        copied.counts = self.counts.cpu()
        return copied

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """Number of values in the first bucket: zeros, and denormals below ``2**-(126 + mantissa_bits)``."""
        return int(self.counts[0])

    def quantile(self, q: float) -> float:
        """A threshold below which the share ``q`` of the values lies.

        With n values in ascending order, the exact quantile is value number ``floor(q * n)``, counted from 0. The
        result is an edge of that value's bucket, so its relative error is at most ``2**-mantissa_bits`` (the absolute
        one ``2**-(126 + mantissa_bits)`` below 2**-126). It is the edge that comes closer to the share q, and misses it
        by at most half the bucket's share. Two kinds of bucket give their lower edge always and miss by at most their
        share: one with more than 1/16 of all values, which holds one value many times (a zero, say) that is not to be
        dropped whole, and the last one, whose upper edge is infinite.

        Raises:
            ValueError: ``q`` outside [0, 1), or no value has been counted.
        """
        if not 0 <= q < 1:
            raise ValueError(f"q must be in [0, 1), got {q}")
        total = self.total
        if total == 0:
            raise ValueError("the histogram is empty")
        rank, up_to = q * total, self.counts.cumsum(0)
        bucket = int(torch.searchsorted(up_to, int(rank), right=True))
        through, inside = int(up_to[bucket]), int(self.counts[bucket])
        last = (255 << self.mantissa_bits) - 1
        if 16 * inside <= total and through - rank < rank - (through - inside) and bucket < last:
            bucket += 1
        return bucket_edge(bucket, self.mantissa_bits)

    def share_below(self, threshold: float) -> float:
        """Share of the values in buckets that end at or below ``threshold``."""
        bits = struct.unpack("<I", struct.pack("<f", abs(threshold)))[0]
        return int(self.counts[: bits >> (_MANTISSA - self.mantissa_bits)].sum()) / self.total

    def trimmed(self, start: int = 0) -> tuple[int, Tensor]:
        """First occupied bucket from ``start`` on, and the counts from there to the last occupied one."""
        occupied = self.counts[start:].nonzero().flatten() + start
        if len(occupied) == 0:
            return start, self.counts[:0].cpu()
        first, last = int(occupied[0]), int(occupied[-1])
        return first, self.counts[first : last + 1].cpu()

    @classmethod
    def from_trimmed(cls, first: int, counts: Tensor, mantissa_bits: int, zeros: int = 0) -> Histogram:
        """Inverse of ``trimmed()``, or of ``zeros`` and ``trimmed(start=1)``."""
        check_count("mantissa_bits", mantissa_bits, 0, _MOST_BITS)
        check_count("first", first, 0, (255 << mantissa_bits) - len(counts))
        histogram = cls(mantissa_bits)
        histogram.counts[first : first + len(counts)] = counts
        histogram.counts[0] += zeros
        return histogram
