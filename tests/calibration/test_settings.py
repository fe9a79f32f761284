"""CalibrationSettings: the defaults of each rule and model, and a budget as the sparsity that reads as many bytes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict

import pytest
from support.models import keeps_experts_together, tiny_model

from cats_ext.calibration.settings import CalibrationSettings
from cats_ext.patching.detection import find_gated_mlps


def resolved(family: str = "llama", **given) -> CalibrationSettings:
    model = tiny_model(family)
    return CalibrationSettings(**given).for_model(model, find_gated_mlps(model))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("gradient", "uniform", [0.5, 0.5, 0.0625])),
        ({"sparsity": 0.5}, ("gradient", "uniform", [0.5, 0.5, 0.0625])),
        ({"budget": 0.6}, ("gradient", "uniform", [0.5, 0.5, 0.0625])),
        ({"importance": "norm"}, ("norm", "uniform", [0.5, 0.5, 0.0625])),
        ({"gate_power": 0}, ("gradient", "uniform", [0, 0, 0])),
        ({"allocation": "search"}, ("gradient", "search", [0.5, 0.5, 0.0625])),
        ({"rule": "plain"}, ("norm", "uniform", [0, 0, 0])),
        ({"rule": "weighted"}, ("norm", "uniform", [1, 1, 1])),
        ({"rule": "three_threshold"}, ("gradient", "uniform", [0.5, 0.5, 0.0625])),
    ],
)
def test_defaults_of_the_rules(given, expected):
    settings = resolved(**given)
    assert (settings.importance, settings.allocation, settings.gate_powers(3)) == expected


def test_a_mixture_of_experts_has_no_weights():
    if not keeps_experts_together(tiny_model("qwen3-moe")):
        pytest.skip("this transformers has lists of experts")
    settings = resolved("qwen3-moe", budget=0.6)
    assert (settings.importance, settings.allocation, settings.gate_powers(3)) == ("norm", "uniform", [0, 0, 0])


def test_a_budget_becomes_a_sparsity():
    settings = resolved(budget=0.6)
    assert settings.budget is None and settings.sparsity == pytest.approx(0.6)
    assert asdict(settings) == asdict(resolved(sparsity=settings.sparsity))


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        CalibrationSettings().rule = "plain"
