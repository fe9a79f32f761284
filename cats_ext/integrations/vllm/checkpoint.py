"""The thresholds of a CATS checkpoint, as vLLM names the checkpoint, and what vLLM cannot serve of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.files import CONFIG_FILE, OLD_FILES, thresholds_file

INDEX = "model.safetensors.index.json"


def read_checkpoint(model: str, revision: str | None) -> tuple[CatsConfig, str]:
    """The config of a directory or of a repository of the hub, and a digest of its files.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or the config is one that vLLM cannot serve.
    """
    directory = Path(model)
    if not directory.is_dir():
        from transformers.utils.hub import cached_file

        path = Path(cached_file(model, CONFIG_FILE, revision=revision))
        cached_file(model, thresholds_file(path), revision=revision)
        directory = path.parent
    config = CatsConfig.from_pretrained(directory)
    check_servable(config, directory)
    return config, hashlib.sha256((directory / CONFIG_FILE).read_bytes()).hexdigest()


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
