"""The thresholds of a CATS checkpoint, as vLLM names the checkpoint, and what vLLM cannot serve of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.exact import EXACT
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, read_json, thresholds_file

INDEX = "model.safetensors.index.json"
ENTRIES = {"quant_method", "rule", "sparsity", "bytes_share", "activation"}  # of quantization_config in config.json


def read_checkpoint(model: str, revision: str | None) -> tuple[CatsConfig, str]:
    """The config of a directory or of a repository of the hub, and a digest of its files.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or the config is one that vLLM cannot serve.
    """
    directory, on_hub = Path(model), not Path(model).is_dir()
    if on_hub:
        from transformers.utils.hub import cached_file

        directory = Path(cached_file(model, "config.json", revision=revision)).parent
    if (directory / "config.json").is_file():
        model_config = read_json(directory / "config.json")
        check_entry((isinstance(model_config, dict) and model_config.get("quantization_config")) or {})
    if on_hub:
        path = Path(cached_file(model, CONFIG_FILE, revision=revision))
        cached_file(model, thresholds_file(path), revision=revision)
    config = CatsConfig.from_pretrained(directory)
    check_servable(config, directory)
    return config, hashlib.sha256((directory / CONFIG_FILE).read_bytes()).hexdigest()


def check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError for a ``quantization_config`` in ``config.json`` that vLLM cannot serve. Needs no vLLM."""
    if entry.get("rule") == EXACT:
        raise ValueError(
            'rule "exact" in quantization_config, of a model that is sparse by itself, is not supported under vLLM: '
            "without quantization_config in config.json it is served densely, with the same outputs"
        )
    if "rows" in entry:
        raise ValueError(
            "rows in quantization_config, the packed weights of cats_ext.quantize, are not supported under vLLM: serve "
            "the model as it was before"
        )
    unknown = sorted(entry.keys() - ENTRIES)
    if unknown:
        raise ValueError(f"quantization_config must have no entries but {sorted(ENTRIES)}, got {unknown}")


def check_servable(config: CatsConfig, directory: Path) -> None:
    """Raise ValueError for what is refused under vLLM. Needs no vLLM."""
    experts = next((name for name, layer in config.layers.items() if layer.experts), None)
    if experts is not None:
        raise ValueError(f"{directory} has thresholds of experts ({experts}), which are not supported under vLLM")
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
