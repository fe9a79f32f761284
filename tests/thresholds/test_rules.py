"""How a sparsity is split between the projections."""

from __future__ import annotations

import pytest

from cats_ext.thresholds.rules import RULES, Split, bytes_share, sparsity_split


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rule", RULES)
def test_all_rules_read_the_same_bytes(rule, sparsity):
    split = sparsity_split(sparsity, rule)
    assert 0 <= split.up <= split.down < 1 and 0 <= split.input < 1
    assert bytes_share(*split) == pytest.approx(1 - 2 / 3 * sparsity)
    assert (split.input > 0) == (rule == "three_threshold" and sparsity > 0)
    if rule in ("plain", "weighted"):
        assert split == Split(sparsity, sparsity)


@pytest.mark.parametrize(("sparsity", "measured"), [(0.5, (0.25, 0.45, 0.30)), (0.675, (0.37, 0.57, 0.41))])
def test_three_thresholds_skip_what_was_measured_best(sparsity, measured):
    assert sparsity_split(sparsity, "three_threshold") == pytest.approx(measured, abs=0.01)


def test_explicit_down_sparsity():
    assert sparsity_split(0.5, "two_threshold", 0.7) == pytest.approx(Split(0.3, 0.7))
    with pytest.raises(ValueError, match=r"is for the rule 'two_threshold', got 0\.7 with 'three_threshold'"):
        sparsity_split(0.5, "three_threshold", 0.7)
    for down in (0.4, 0.95):
        with pytest.raises(ValueError, match=f"down_sparsity must be in .*0.45, 0.9.* got {down}"):
            sparsity_split(0.45, "two_threshold", down)
