"""How a sparsity is split between the up and the down projection."""

from __future__ import annotations

import pytest

from cats_ext.thresholds.rules import sparsity_split


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.5, 0.9, 0.99])
def test_both_rules_read_the_same_bytes(sparsity):
    up, down = sparsity_split(sparsity, "two_threshold")
    assert 0 <= up <= down < 1
    assert up + down == pytest.approx(2 * sparsity)
    assert sparsity_split(sparsity, "plain") == (sparsity, sparsity)


def test_explicit_down_sparsity():
    assert sparsity_split(0.5, "two_threshold", 0.7) == pytest.approx((0.3, 0.7))
    for down in (0.4, 0.95):
        with pytest.raises(ValueError, match=f"down_sparsity must be in .*0.45, 0.9.* got {down}"):
            sparsity_split(0.45, "two_threshold", down)
