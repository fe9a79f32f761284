"""The checkpoint of a calibration: its counts and the place it has reached, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.thresholds.files import write_together

_SECONDS = 60.0  # at least, between two writes


class Checkpoint:
    """The file ``path``; if it exists, its counts are loaded into ``layers``.

    Args:
        path: None keeps nothing.
        identity: settings that must be equal to continue.
        windows: token ids; they must be equal too.
        layers: what is saved and loaded, by name of the MLP.

    Attributes:
        step, batch: the next pass, and the next batch in it.

    Raises:
        ValueError: the file is of a calibration with other arguments, text, model or version, or is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        identity: dict[str, Any],
        windows: list[Tensor],
        layers: dict[str, LayerAccumulator],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.layers, self.step, self.batch = layers, 0, 0
        self.written = time.monotonic()
        digest = hashlib.sha256(torch.cat(windows).long().numpy().tobytes()).hexdigest()
        shapes = [(layer.mlp.name, layer.mlp.hidden_size, layer.mlp.intermediate_size) for layer in layers.values()]
        self.run = json.dumps(identity | {"windows": [len(w) for w in windows], "text": digest, "layers": shapes})
        if self.path is not None and self.path.exists():
            self._read()

    def save(self, step: int, batch: int) -> None:
        """Write the counts after ``batch`` batches of pass ``step``, if the last write was a minute ago or earlier."""
        if self.path is None or time.monotonic() - self.written < _SECONDS:
            return
        tensors = {
            f"{name}/{key}": tensor.cpu().contiguous()
            for name, layer in self.layers.items()
            for key, tensor in layer.state().items()
        }
        place = {"run": self.run, "step": str(step), "batch": str(batch)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_together({self.path: save(tensors, metadata=place)})
        self.written = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        try:
            with safe_open(self.path, framework="pt") as file:
                place = file.metadata() or {}
                if place.get("run") != self.run:
                    raise ValueError(
                        f"checkpoint {self.path} is of a calibration with other arguments, text, model or version: "
                        "remove it, or call with those arguments"
                    )
                for key in file.keys():
                    name, part = key.rsplit("/", 1)
                    states[name][part] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"checkpoint {self.path} is damaged: {error}") from error
        for name, state in states.items():
            self.layers[name].load(state)
        self.step, self.batch = int(place["step"]), int(place["batch"])
