"""What a fine-tuning is: its settings, and the comparison with those of a tuning that was interrupted."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats_ext._inputs import LARGEST_SEED, check_integer, weights_digest
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.files import write_together
from cats_ext.thresholds.rules import check_choice, check_sparsity

METHODS = ("cats", "relufication", "dense")


@dataclass(frozen=True)
class FinetuneSettings:
    """What a fine-tuning does. A tuning that was interrupted is continued with equal settings only.

    Attributes:
        method: "cats" masks by thresholds, "relufication" replaces the activation by ReLU, "dense" changes nothing.
        sparsity: share of neurons to skip, in [0, 1), where the thresholds are calibrated; unused with other methods.
        steps: optimizer steps.
        lora_rank: rank of the adapters; 0 tunes all weights.
        lora_alpha: adapters are scaled by ``lora_alpha / lora_rank``.
        lora_targets: names of linear modules; None for all but the output layer.
        learning_rate: the highest, after a warm-up over a twentieth of the steps; then it follows a cosine to 0.
        batch_size: windows in a step.
        sequence_length: tokens in a window.
        gradient_checkpointing: recompute activations in the backward pass; less memory, a third more time.
        seed: of the order of windows and of the adapters' initial weights.

    Raises:
        TypeError, ValueError: a setting is out of its range.
    """

    method: str = "cats"
    sparsity: float = 0.5
    steps: int = 400
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] | None = None
    learning_rate: float = 2e-4
    batch_size: int = 4
    sequence_length: int = 512
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_sparsity("sparsity", self.sparsity)
        for name in ("steps", "lora_rank", "batch_size", "sequence_length"):
            check_integer(name, getattr(self, name), 0 if name == "lora_rank" else 1)
        check_integer("seed", self.seed, 0, LARGEST_SEED)
        for name in ("learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")


def facts_of(
    model: nn.Module, train: list[Tensor], held_out: list[Tensor], settings: FinetuneSettings, config: CatsConfig | None
) -> dict[str, Any]:
    """What has to be equal for a tuning to be continued, as JSON types: settings, model, data and thresholds."""
    thresholds = []
    if config is not None:
        for of_layers in (config.thresholds, config.down_thresholds, config.input_thresholds):
            thresholds += of_layers.values()
    facts = asdict(settings) | {
        "model": weights_digest(model),
        "dtype": str(model.dtype),
        "data": _digest(*train, *held_out),
        "thresholds": _digest(*thresholds) if thresholds else "calibrated",
    }
    return json.loads(json.dumps(facts))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_continues(training: Path, facts: dict[str, Any]) -> None:
    """Compare ``facts`` with those of the tuning that ``training`` holds, or write them there for a new one.

    Raises:
        ValueError: the directory has a tuning with other facts, or something else.
    """
    path = training / "settings.json"
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in facts if stored[name] != facts[name]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not what finetune wrote: {error!r}. Choose another output directory"
            ) from error
        if different:
            name = "method" if "method" in different else different[0]
            raise ValueError(
                f"{training} holds a tuning with {name} {stored[name]!r}, got {name} {facts[name]!r}: choose another "
                "output directory, or give the same arguments to continue it"
            )
        return
    if (training.parent / "config.json").exists():
        raise ValueError(f"{training.parent} holds a model, which would be overwritten: choose another directory")
    if training.exists() and any(training.iterdir()):
        raise ValueError(f"{training} is not empty and holds no tuning: choose another output directory")
    training.mkdir(parents=True, exist_ok=True)
    write_together({path: (json.dumps(facts, indent=2) + "\n").encode()})
