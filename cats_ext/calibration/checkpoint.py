"""The checkpoint of a calibration: its counts and the place it has reached, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cats_ext._inputs import weights_digest
from cats_ext._outputs import cannot_be_written, check_writable
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.thresholds.files import write_together

_SECONDS = 60.0  # at least, between two writes


class Checkpoint:
    """The file ``path``; if it exists, its counts are loaded into ``layers``.

    Args:
        path: None keeps nothing.
        identity: settings that must be equal to continue.
        model: some of its weights must be equal too.
        windows: token ids; all of them must be equal.
        layers: what is saved and loaded, by name of the MLP.

    Attributes:
        step, batch: the next pass, and the next batch in it.

    Raises:
        OSError: the file cannot be written or read.
        ValueError: the file is of a calibration with other arguments, text, model or version, or is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        identity: dict[str, Any],
        model: nn.Module,
        windows: list[Tensor],
        layers: dict[str, LayerAccumulator],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.layers, self.step, self.batch = layers, 0, 0
        self.written = time.monotonic()
        if self.path is None:
            return
        check_writable("checkpoint", self.path, directory=False)
        digest = hashlib.sha256(torch.cat(windows).long().numpy().tobytes()).hexdigest()
        shapes = [(layer.mlp.name, layer.mlp.hidden_size, layer.mlp.intermediate_size) for layer in layers.values()]
        facts = {"windows": [len(w) for w in windows], "text": digest, "layers": shapes}
        self.run = json.dumps(identity | facts | {"weights": weights_digest(model)})
        if self.path.exists():
            self._read()

    def save(self, step: int, batch: int) -> None:
        """As :meth:`write`, if the last time was a minute ago or earlier."""
        if time.monotonic() - self.written >= _SECONDS:
            self.write(step, batch)

    def write(self, step: int, batch: int) -> None:
        """Write the counts after ``batch`` batches of pass ``step``; warn if that fails, and leave the earlier file."""
        if self.path is None:
            return
        tensors = {
            f"{name}/{key}": tensor.cpu().contiguous()
            for name, layer in self.layers.items()
            for key, tensor in layer.state().items()
        }
        place = {"run": self.run, "step": str(step), "batch": str(batch)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_together({self.path: save(tensors, metadata=place | {"sha256": _digest(place, tensors)})})
        except OSError as error:
            warnings.warn(f"{cannot_be_written('checkpoint', self.path, error)}", RuntimeWarning, stacklevel=2)
        self.written = time.monotonic()

    def _read(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                place = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"checkpoint '{self.path}' is damaged: {error}") from error
        except OSError as error:
            raise OSError(f"checkpoint '{self.path}' cannot be read: {error}") from error
        if place.get("run") != self.run:
            raise ValueError(
                f"checkpoint '{self.path}' is of a calibration with other arguments, text, model or version: remove "
                "it, or call with those arguments"
            )
        if place.pop("sha256", None) != _digest(place, tensors):
            raise ValueError(f"checkpoint '{self.path}' is damaged: it is not what was written there")
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        for key, tensor in tensors.items():
            name, part = key.rsplit("/", 1)
            states[name][part] = tensor
        for name, state in states.items():
            self.layers[name].load(state)
        self.step, self.batch = int(place["step"]), int(place["batch"])


def _digest(place: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds: counts with one altered bit are refused."""
    digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
