"""The rules of calibration, and how each splits a sparsity between the projections.

A rule is a calibration method: "plain", "weighted", "two_threshold" or "three_threshold", see
:func:`cats_ext.calibrate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RULES = ("plain", "weighted", "two_threshold", "three_threshold")
IMPORTANCES = ("norm", "gradient")

# By default the two-threshold rule skips this much less of up_proj and this much more of down_proj than `sparsity`.
TWO_THRESHOLD_OFFSET = 0.125
# The three-threshold rule skips this share of `sparsity` of the gate's columns, and so much less of both other matrices
# that the bytes are the same; up and down then differ from their mean by the offset, or less near either end. At 0.5
# that is 0.30 of the gate, 0.25 of up and 0.45 of down. On SmolLM2 no split near it has a lower divergence, on Qwen
# some have: 0.041 to 0.045 for 0.050. More of down was chosen for the tasks of the development half
# (docs/quality-evidence.md, "Columns of the gate").
INPUT_SHARE, THREE_THRESHOLD_OFFSET = 0.6, 0.1
# Default exponents of the gate's weights, in all layers but the last, and in the last. Full weights in the last layer
# lose accuracy on rare words and improve little else (docs/quality-evidence.md; its sweep_last, text and tasks.csv).
DEFAULT_GATE_POWER = {"plain": 0.0, "weighted": 1.0, "two_threshold": 0.5, "three_threshold": 0.5}
LAST_GATE_POWER = {"plain": 0.0, "weighted": 1.0, "two_threshold": 0.0625, "three_threshold": 0.0625}


class Split(NamedTuple):
    """The shares of each matrix that a token skips."""

    up: float  # of the rows of up_proj
    down: float  # of the rows of down_proj, laid out by neuron
    input: float = 0.0  # of the columns of gate_proj


def has_down_threshold(rule: str) -> bool:
    """Whether neurons are tested again, by what they contribute."""
    return rule in ("two_threshold", "three_threshold")


def has_input_threshold(rule: str) -> bool:
    """Whether small inputs count as zero for the gate."""
    return rule == "three_threshold"


def bytes_share(up_sparsity: float, down_sparsity: float, input_sparsity: float = 0.0) -> float:
    """Share of the three equal matrices that one token reads."""
    return (3 - up_sparsity - down_sparsity - input_sparsity) / 3


def check_sparsity(name: str, value: float) -> None:
    """Raise unless ``value`` is a number in [0, 1)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raise unless ``value`` is True or False: a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: int, least: int = 0, most: int = 2**62) -> None:
    """Raise unless ``value`` is an int in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r:.50}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value!r:.50}")


def check_tensor(name: str, value: Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless ``value`` is a tensor of one of the dtypes and shapes; -1 is any size."""
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{name} must be a {kinds} tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if not any(
        len(shape) == value.dim() and all(n in (-1, size) for n, size in zip(shape, value.shape, strict=True))
        for shape in shapes
    ):
        expected = " or ".join(str(list(shape)).replace("-1", "any") for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")


def check_usable(name: str, value: Tensor) -> None:
    """Raise unless every element is finite and at least 0."""
    bad = value[~((value >= 0) & value.isfinite())]  # the negation catches NaN
    if len(bad):
        raise ValueError(f"{name} must be finite and >= 0, got {bad[0].item()}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def budget_of(sparsity: float) -> float:
    """Share of the MLP bytes that a token reads if ``sparsity`` of the up and of the down rows are skipped."""
    return bytes_share(sparsity, sparsity)


def sparsity_of(budget: float) -> float:
    """Inverse of :func:`budget_of`. Raises unless it is in (1/3, 1]: a sparsity of 1 leaves 1/3 of the bytes."""
    if not isinstance(budget, (int, float)) or isinstance(budget, bool):
        raise TypeError(f"budget must be a number in (1/3, 1], got {budget!r}")
    if not 1 / 3 < budget <= 1:
        raise ValueError(f"budget must be in (1/3, 1], as a sparsity of 1 leaves 1/3 of the bytes, got {budget}")
    return 1.5 * (1 - budget)


def check_weights(rule: str, gate_power: float, last_gate_power: float, importance: str) -> None:
    """Raise unless both powers are in [0, 1], 0 for the plain rule, and the importance is known."""
    for name, power in (("gate_power", gate_power), ("last_gate_power", last_gate_power)):
        if not isinstance(power, (int, float)) or isinstance(power, bool):
            raise TypeError(f"{name} must be a number in [0, 1], got {power!r}")
        if not 0 <= power <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {power}")
        if rule == "plain" and power:
            raise ValueError(f"{name} must be 0 for the rule 'plain', which has no weights, got {power}")
    check_choice("importance", importance, IMPORTANCES)


def sparsity_split(sparsity: float, rule: str, down_sparsity: float | None = None) -> Split:
    """The shares skipped of each matrix at which ``rule`` reads the bytes of the plain rule at ``sparsity``."""
    check_sparsity("sparsity", sparsity)
    check_choice("rule", rule, RULES)
    if down_sparsity is not None and rule != "two_threshold":
        raise ValueError(f"down_sparsity is for the rule 'two_threshold', got {down_sparsity} with '{rule}'")
    if rule == "three_threshold":
        mean = (1 - INPUT_SHARE / 2) * sparsity
        offset = min(THREE_THRESHOLD_OFFSET, mean, 0.4 * (1 - sparsity))
        return Split(mean - offset, mean + offset, INPUT_SHARE * sparsity)
    if rule != "two_threshold":
        return Split(sparsity, sparsity)
    if down_sparsity is None:
        offset = min(TWO_THRESHOLD_OFFSET, sparsity, (1 - sparsity) / 2)
        return Split(sparsity - offset, sparsity + offset)
    check_sparsity("down_sparsity", down_sparsity)
    up_sparsity = 2 * sparsity - down_sparsity
    if not 0 <= up_sparsity <= down_sparsity:
        raise ValueError(
            f"down_sparsity must be in [sparsity, 2 * sparsity] = [{sparsity}, {2 * sparsity}] and below 1, "
            f"got {down_sparsity}"
        )
    return Split(up_sparsity, down_sparsity)
