"""The second door: CATS as a quantization method of transformers, so that checkpoints carry their thresholds.

A CATS checkpoint is the dense checkpoint with two more files (``cats_config.json`` and ``cats_thresholds.safetensors``,
see config.py) and an entry ``quantization_config`` in ``config.json`` that says so. Where cats_ext has not been
imported, transformers warns of an unknown method and loads the dense model.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cats_ext.patching.apply import apply_cats, current_config, remove_cats
from cats_ext.thresholds.config import CONFIG_FILE, THRESHOLDS_FILE, CatsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = CatsConfig.quant_method


@register_quantization_config(METHOD)
class CatsCheckpointConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a checkpoint's ``config.json``: what was done, without the thresholds."""

    def __init__(
        self, rule: str | None = None, sparsity: float | None = None, bytes_share: float | None = None, **_: Any
    ) -> None:
        if rule is None or sparsity is None or bytes_share is None:
            raise ValueError(
                "quantization_config must be a cats_ext.CatsConfig, or the entry of a saved CATS checkpoint with rule, "
                f"sparsity and bytes_share, got rule={rule}, sparsity={sparsity}, bytes_share={bytes_share}"
            )
        self.quant_method = METHOD
        self.rule, self.sparsity, self.bytes_share = rule, sparsity, bytes_share


@register_quantizer(METHOD)
class CatsQuantizer(HfQuantizer):
    """Patches a model when transformers has loaded its weights, and writes the thresholds when it saves them."""

    requires_calibration = False

    def __init__(self, quantization_config: CatsConfig | CatsCheckpointConfig, **kwargs: Any) -> None:
        self.thresholds = quantization_config if isinstance(quantization_config, CatsConfig) else None
        self.saving: tuple[str | os.PathLike | None, dict[str, Tensor] | None] = (None, None)
        super().__init__(_entry(quantization_config), **kwargs)
        # Early versions would leave weights that they rename while loading, such as experts, in the file's dtype.
        self.pre_quantized = self.pre_quantized and hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.thresholds is None:
            self.thresholds = CatsConfig.from_pretrained(_checkpoint_directory(model.config, checkpoint_files))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # Marks of a quantised model, for which transformers refuses half(), float() and training. This one is dense.
        del model.is_quantized, model.quantization_method
        for module in model.modules():
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)
        del model.hf_quantizer, model.config.quantization_config
        thresholds, self.thresholds = self.thresholds, None
        return apply_cats(model, thresholds)

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Tensor] | None, dict]:
        # The one call that transformers makes here while it saves: after it has listed which files of the directory
        # are old, hence not to be uploaded by push_to_hub. The state dict that it returns replaces the caller's.
        save_directory, state_dict = self.saving
        if save_directory is not None:
            current_config(model).save_pretrained(save_directory)
        return state_dict, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return remove_cats(model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: PreTrainedModel, config: CatsConfig) -> None:
    """Make ``model.save_pretrained`` write a CATS checkpoint. Undone by :func:`detach`, also if interrupted."""
    model.hf_quantizer = CatsQuantizer(config)
    model.hf_quantizer.thresholds = None  # those of the patched modules count
    model.save_pretrained = partial(_save_pretrained, model)


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`; nothing if there is nothing to undo."""
    vars(model).pop("save_pretrained", None)
    if isinstance(getattr(model, "hf_quantizer", None), CatsQuantizer):
        del model.hf_quantizer


def check_not_quantised(model: PreTrainedModel) -> None:
    """Raise ValueError if another quantization method has been at work."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, CatsQuantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"model of class {type(model).__name__} is quantised with {getattr(method, 'value', method)}, which is not "
            "supported: load it without quantization_config, or dequantize it first"
        )


def _entry(config: CatsConfig | CatsCheckpointConfig) -> CatsCheckpointConfig:
    return CatsCheckpointConfig(config.rule, config.sparsity, config.bytes_share)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *arguments: Any,
    **named: Any,
) -> None:
    """transformers' own ``save_pretrained``, with a directory for the quantizer to write the thresholds into.

    The model's config has the entry for that time only: it may be shared with a dense model, or be part of a larger
    one's, whose checkpoints have no thresholds.
    """
    adapter_only = getattr(model, "_hf_peft_config_loaded", False)
    quantizer, entry = model.hf_quantizer, _entry(current_config(model))
    try:
        quantizer.saving = save_directory if is_main_process and not adapter_only else None, state_dict
        model.config.quantization_config = entry
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *arguments, **named)
    finally:
        quantizer.saving = (None, None)
        vars(model.config).pop("quantization_config", None)


def _checkpoint_directory(config: PreTrainedConfig, checkpoint_files: list[str] | None) -> Path:
    """Where a checkpoint's threshold files are: beside its weights, fetched from the hub if need be."""
    names = (CONFIG_FILE, THRESHOLDS_FILE)
    source, place = config._name_or_path, {}
    if checkpoint_files:
        beside = Path(checkpoint_files[0]).parent
        if all((beside / name).is_file() for name in names):
            return beside
        place = _place_in_cache(beside)
        source = source if place else str(beside)
    try:
        paths = [cached_file(source, name, **place) for name in names]
    except OSError as error:
        raise OSError(
            f"the checkpoint's config.json has a quantization_config of method {METHOD}, but its thresholds are not to "
            f"be had; without that entry it loads as the dense model. {error}"
        ) from error
    return Path(paths[0]).parent


def _place_in_cache(directory: Path) -> dict[str, str]:
    """What ``cached_file`` needs to put a file into ``directory``: CACHE/models--NAME/snapshots/REVISION[/SUBFOLDER].

    transformers does not tell a quantizer where it was asked to load from, and newer ones not which commit it took.
    """
    for snapshots in (directory, *directory.parents):
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            revision, *folders = directory.relative_to(snapshots).parts
            return {"cache_dir": str(repository.parent), "revision": revision, "subfolder": "/".join(folders)}
    return {}
