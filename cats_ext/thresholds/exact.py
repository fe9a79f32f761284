"""ExactConfig: what a patched model has in place of thresholds where it is sparse by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cats_ext.thresholds.config import CatsConfig, LayerConfig
from cats_ext.thresholds.statistics import SMALLEST

EXACT = "exact"


@dataclass(eq=False)
class ExactConfig(CatsConfig):
    """Of :func:`cats_ext.apply_exact`. Nothing is calibrated and nothing saved: the layers are found again."""

    rule: str = EXACT

    @classmethod
    def of(cls, layers: Iterable[tuple[str, LayerConfig]], model_type: str | None) -> ExactConfig:
        """For the modules of these names, whose layers have no target."""
        named = dict(layers)
        thresholds = {name: torch.tensor(SMALLEST) for name in named}
        return cls(thresholds=thresholds, layers=named, model_type=model_type, sparsity=0.0)

    def validate(self) -> None:
        """It has no rule that calibration knows."""

    def at_sparsity(self, sparsity: float, *, down_sparsity: float | None = None) -> CatsConfig:
        raise ValueError(
            f"sparsity of a model that is sparse by itself cannot be set, got {sparsity}: call remove_cats, calibrate "
            "and apply_cats for thresholds"
        )

    def to_files(self) -> dict[str, bytes]:
        return {}
