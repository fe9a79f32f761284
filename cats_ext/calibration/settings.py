"""What a calibration does: the arguments of :func:`cats_ext.calibrate`, checked, with their defaults filled in.

The command line makes the same object before it loads a model, the checkpoint is compared by :meth:`identity`, and the
config keeps :meth:`record`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext._inputs import LARGEST_SEED, check_integer
from cats_ext._version import __version__
from cats_ext.calibration.passes import has_gradients
from cats_ext.patching.detection import GatedMLP
from cats_ext.patching.surgery import check_rule
from cats_ext.thresholds.allocation import ALLOCATIONS, LossTable, search_options
from cats_ext.thresholds.rules import (
    DEFAULT_GATE_POWER,
    LAST_GATE_POWER,
    Split,
    budget_of,
    check_choice,
    check_weights,
    has_down_threshold,
    has_input_threshold,
    sparsity_of,
    sparsity_split,
)


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration, as :func:`cats_ext.calibrate` documents them; they are checked when they are made.

    None stands for a default that depends on other settings or on the model. :meth:`for_model` replaces it.

    Raises:
        TypeError, ValueError: a setting is out of its range or does not go with another.
    """

    sparsity: float | None = None
    budget: float | None = None
    rule: str = "two_threshold"
    down_sparsity: float | None = None
    gate_power: float | None = None
    last_gate_power: float | None = None
    importance: str | None = None
    allocation: str = "uniform"
    spread: float = 1.0
    max_tokens: int = 32768
    sequence_length: int = 1024
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sparsity is not None and self.budget is not None:
            raise ValueError(f"give sparsity or budget, not both, got {self.sparsity} and {self.budget}")
        check_choice("allocation", self.allocation, ALLOCATIONS)
        if self.down_sparsity is not None and self.allocation == "search":
            raise ValueError(f"down_sparsity is for uniform allocation, got {self.down_sparsity} with a search")
        _ = self.split  # raises for a rule or a sparsity that is not possible
        if has_input_threshold(self.rule) and self.allocation != "uniform":
            raise ValueError(f"allocation must be 'uniform' for the rule {self.rule!r}, got {self.allocation!r}")
        if not isinstance(self.spread, (int, float)) or isinstance(self.spread, bool) or not 0 < self.spread <= 1:
            raise ValueError(f"spread must be a number in (0, 1], got {self.spread!r}")
        for name in ("max_tokens", "sequence_length", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0, LARGEST_SEED)
        powers = (0 if power is None else power for power in (self.gate_power, self.last_gate_power))
        check_weights(self.rule, *powers, "norm" if self.importance is None else self.importance)

    @property
    def target(self) -> float:
        """The sparsity, also where a budget was given; 0.5 without either."""
        if self.budget is not None:
            return sparsity_of(self.budget)
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def split(self) -> Split:
        """Of every layer in the uniform allocation."""
        return sparsity_split(self.target, self.rule, self.down_sparsity)

    def for_model(self, model: nn.Module, mlps: Sequence[GatedMLP]) -> CalibrationSettings:
        """These settings for ``model`` and its dense MLPs, with a sparsity for a budget and the defaults filled in.

        Raises:
            ValueError: the model does not allow them.
        """
        check_rule(self.rule, mlps)
        has_experts, gradients = any(mlp.experts for mlp in mlps), has_gradients(model)
        importance, tests_down = self.importance, has_down_threshold(self.rule)
        if importance is None:
            importance = "gradient" if tests_down and gradients and not has_experts else "norm"
        gate_power, last_gate_power = self.gate_power, self.last_gate_power
        if gate_power is None:
            gate_power = 0.0 if has_experts and tests_down else DEFAULT_GATE_POWER[self.rule]
        if last_gate_power is None:
            last_gate_power = min(gate_power, LAST_GATE_POWER[self.rule])
        if (importance == "gradient" or self.allocation == "search") and not gradients:
            raise ValueError(
                "importance must be 'norm' and allocation 'uniform' for a model without an output layer or made in "
                f"inference mode, got {importance!r} and {self.allocation!r}"
            )
        if has_experts:
            _check_for_experts(max(gate_power, last_gate_power), importance, self.allocation)
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        settings = replace(
            self,
            sparsity=self.target,
            budget=None,
            gate_power=gate_power,
            last_gate_power=last_gate_power,
            importance=importance,
            sequence_length=self.sequence_length if longest is None else min(self.sequence_length, longest),
        )
        if self.allocation == "search":  # a budget that cannot be met is refused now, not after all passes
            losses = settings.loss_table(torch.zeros(len(mlps), len(search_options(self.rule))))
            sizes = [mlp.hidden_size * mlp.intermediate_size for mlp in mlps]
            losses.targets(budget_of(settings.target), sizes, settings.split)
        return settings

    def loss_table(self, losses: Tensor) -> LossTable:
        """The table that a search chooses from, for the ``losses`` ``[L, P]`` of every option in every layer."""
        return LossTable(torch.tensor(search_options(self.rule), dtype=torch.float64), losses, self.spread)

    def gate_powers(self, layers: int) -> list[float]:
        """The exponent of the gate's weights in each of so many layers."""
        return [self.gate_power] * (layers - 1) + [self.last_gate_power]

    def identity(self, layers: int) -> dict[str, Any]:
        """What the counts depend on, as JSON types: an interrupted calibration is continued only if it is equal."""
        facts = {"rule": self.rule, "gate_power": self.gate_powers(layers), "importance": self.importance}
        facts |= {"allocation": self.allocation, "seed": self.seed, "batch_size": self.batch_size}
        return facts | {"cats_ext_version": __version__}

    def record(self, windows: Sequence[Tensor]) -> dict[str, Any]:
        """The entry ``calibration`` of the config, for the ``windows`` of token ids that were used."""
        facts = {"tokens": sum(map(len, windows)), "windows": len(windows), "sequence_length": self.sequence_length}
        return facts | {"seed": self.seed, "cats_ext_version": __version__}


def _check_for_experts(gate_power: float, importance: str, allocation: str) -> None:
    """Raise for settings that need sums over each neuron's tokens: too few tokens reach each expert."""
    for name, value, possible in (
        ("allocation", allocation, "uniform"),
        ("gate_power (by default 1 with the rule 'weighted')", gate_power, 0),
        ("importance", importance, "norm"),
    ):
        if value != possible:
            raise ValueError(f"{name} must be {possible!r} for mixtures of experts, got {value!r}")
