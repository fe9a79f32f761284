"""What a CATS checkpoint says about its MLPs and packed rows, and what vLLM cannot serve of it. Needs no vLLM."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats_ext.integrations.saving import ACTIVATION_ENTRIES
from cats_ext.patching.detection import recognise_activation
from cats_ext.quantization.layout import Rows, check_rows
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.exact import EXACT
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, read_json, thresholds_file
from cats_ext.thresholds.rules import has_input_threshold

INDEX = "model.safetensors.index.json"
ENTRIES = {"quant_method", "rule", "sparsity", "bytes_share", "activation", "rows"}  # of quantization_config

NOT_EXACT = (
    "which is not supported under vLLM: without quantization_config in config.json it is served densely, with the same "
    "outputs"
)


@dataclass(frozen=True)
class Checkpoint:
    """What is to be known of a checkpoint beside its weights."""

    config: CatsConfig | None  # None if only zeros are skipped: it is sparse by itself, or has packed rows alone
    rows: Rows  # as in its config.json; empty if all weights are dense
    activation: str | None  # of its MLPs, if there is no config
    digest: str


def read_checkpoint(model: str, revision: str | None) -> Checkpoint:
    """Of a directory, or of a repository of the hub.

    In one thread: vLLM forks its engine off the process that reads, and OpenMP's threads would be missing there.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or vLLM cannot serve the checkpoint.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _read(model, revision)
    finally:
        torch.set_num_threads(threads)


def _read(model: str, revision: str | None) -> Checkpoint:
    directory, on_hub = Path(model), not Path(model).is_dir()
    if on_hub:
        from transformers.utils.hub import cached_file

        directory = Path(cached_file(model, "config.json", revision=revision)).parent
    model_config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    entry = (isinstance(model_config, dict) and model_config.get("quantization_config")) or {}
    check_entry(entry)
    rows, digest = entry.get("rows", {}), hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    if entry.get("rule") == EXACT or (rows and "rule" not in entry):
        activation = _activation(directory)
        if entry.get("rule") == EXACT and activation != "relu":
            raise ValueError(f"{directory} is sparse by itself, but not by a gated ReLU, {NOT_EXACT}")
        if activation is None:
            raise ValueError(f"{directory} has MLPs with an activation that cats_ext does not know")
        return Checkpoint(None, rows, activation, digest.hexdigest())
    if on_hub:
        path = Path(cached_file(model, CONFIG_FILE, revision=revision))
        cached_file(model, thresholds_file(path), revision=revision)
    config = CatsConfig.from_pretrained(directory)
    check_servable(config, directory)
    digest.update((directory / CONFIG_FILE).read_bytes())
    return Checkpoint(config, rows, None, digest.hexdigest())


def _activation(directory: Path) -> str | None:
    """The activation of a model's MLPs, by its config.json."""
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    config = AutoConfig.from_pretrained(directory).get_text_config()
    name = next((found for entry in ACTIVATION_ENTRIES if (found := getattr(config, entry, None)) is not None), None)
    return recognise_activation(ACT2FN[name]) if name in ACT2FN else None


def check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError for a ``quantization_config`` in ``config.json`` that vLLM cannot serve."""
    unknown = sorted(entry.keys() - ENTRIES)
    if unknown:
        raise ValueError(f"quantization_config must have no entries but {sorted(ENTRIES)}, got {unknown}")
    if "rows" in entry:
        check_rows(entry["rows"])


def check_servable(config: CatsConfig, directory: Path) -> None:
    """Raise ValueError for thresholds that are refused under vLLM."""
    experts = next((name for name, layer in config.layers.items() if layer.experts), None)
    if experts is not None:
        raise ValueError(f"{directory} has thresholds of experts ({experts}), which are not supported under vLLM")
    if has_input_threshold(config.rule):
        raise ValueError(f"{directory} has thresholds of rule {config.rule!r}, which is not supported under vLLM")
    if not config.sparse_prefill:
        raise ValueError(
            f"{directory} has sparse_prefill=False, which is not supported under vLLM: it computes prompts and new "
            "tokens together; load it with transformers, apply its config with sparse_prefill=True and save it again"
        )
    name = thresholds_file(directory / CONFIG_FILE)
    if name in OLD_FILES and not (directory / INDEX).is_file():
        raise ValueError(
            f"{directory / name} is of an earlier version, which vLLM takes for weights: load the checkpoint with "
            "transformers and save it again"
        )
