"""CATS as a quantization method of transformers, so that checkpoints carry their thresholds.

A CATS checkpoint is the dense checkpoint with two more files (``cats_config.json`` and ``cats_thresholds.safetensors``,
see config.py) and an entry ``quantization_config`` in ``config.json`` that says so. Where cats_ext has not been
imported, transformers warns of an unknown method and loads the dense model. A ReLUfied model's ``config.json`` names
ReLU as its activation, so that it is loaded as such in both cases.

Patching does not know of this module: it registers itself as a listener when it is imported, which
``integrations/__init__.py`` arranges for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cats_ext.patching.apply import (
    apply_cats,
    current_config,
    patch_with_relu,
    remove_cats,
    replaced_activation,
    sparse_mlps,
)
from cats_ext.patching.listeners import PatchListener, add_listener
from cats_ext.thresholds.config import CONFIG_FILE, THRESHOLDS_FILE, CatsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = CatsConfig.quant_method
# What configs of transformers' models call the activation of their MLPs.
ACTIVATION_ENTRIES = ("hidden_act", "hidden_activation")


@register_quantization_config(METHOD)
class CatsCheckpointConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a checkpoint's ``config.json``: what was done, without the thresholds.

    Args:
        rule, sparsity, bytes_share: as in :class:`cats_ext.CatsConfig`.
        activation: ``relu`` for a ReLUfied model, whose MLPs compute it instead of their own.
    """

    activation: str | None = None  # in the file only where it is given

    def __init__(
        self,
        rule: str | None = None,
        sparsity: float | None = None,
        bytes_share: float | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> None:
        if rule is None or sparsity is None or bytes_share is None:
            raise ValueError(
                "quantization_config must be a cats_ext.CatsConfig, or the entry of a saved CATS checkpoint with rule, "
                f"sparsity and bytes_share, got rule={rule}, sparsity={sparsity}, bytes_share={bytes_share}"
            )
        if activation not in (None, "relu"):
            raise ValueError(f"activation in quantization_config must be relu or missing, got {activation!r}")
        self.quant_method = METHOD
        self.rule, self.sparsity, self.bytes_share = rule, sparsity, bytes_share
        if activation is not None:
            self.activation = activation


@register_quantizer(METHOD)
class CatsQuantizer(HfQuantizer):
    """Patches a model when transformers has loaded its weights, and writes the thresholds when it saves them."""

    requires_calibration = False

    def __init__(self, quantization_config: CatsConfig | CatsCheckpointConfig, **kwargs: Any) -> None:
        self.thresholds = quantization_config if isinstance(quantization_config, CatsConfig) else None
        self.saving: tuple[str | os.PathLike | None, dict[str, Tensor] | None] = (None, None)
        super().__init__(_entry(quantization_config, getattr(quantization_config, "activation", None)), **kwargs)
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
        if self.quantization_config.activation == "relu":
            return patch_with_relu(model, thresholds)
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


def check_not_quantised(model: nn.Module) -> None:
    """Raise ValueError if another quantization method has been at work."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, CatsQuantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"model of class {type(model).__name__} is quantised with {getattr(method, 'value', method)}, which is not "
            "supported: load it without quantization_config, or dequantize it first"
        )


def attach(model: nn.Module, config: CatsConfig) -> None:
    """Make ``save_pretrained`` of a transformers model write a CATS checkpoint. Undone by :func:`detach`."""
    from transformers.modeling_utils import PreTrainedModel  # not above: it is what imports this module

    if not isinstance(model, PreTrainedModel):
        return
    model.hf_quantizer = CatsQuantizer(config)
    model.hf_quantizer.thresholds = None  # those of the patched modules count
    model.save_pretrained = partial(_save_pretrained, model)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`, whole or half done, of the model or of a part of it."""
    for part in model.modules():
        save = vars(part).get("save_pretrained")
        if isinstance(save, partial) and save.func is _save_pretrained:
            del part.save_pretrained
        if isinstance(getattr(part, "hf_quantizer", None), CatsQuantizer):
            del part.hf_quantizer


add_listener(PatchListener(check=check_not_quantised, patched=attach, removing=detach))


def _entry(config: CatsConfig | CatsCheckpointConfig, activation: str | None) -> CatsCheckpointConfig:
    return CatsCheckpointConfig(config.rule, config.sparsity, config.bytes_share, activation)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *arguments: Any,
    **named: Any,
) -> None:
    """transformers' own ``save_pretrained``, with a directory for the quantizer to write the thresholds into.

    The model's config has the entry, and the activation of a ReLUfied model, for that time only: it may be shared with
    a dense model, or be part of a larger one's, whose checkpoints have no thresholds.
    """
    if not sparse_mlps(model):  # remove_cats has been called with the part that has the MLPs
        detach(model)
        return model.save_pretrained(save_directory, is_main_process, state_dict, *arguments, **named)
    adapter_only = getattr(model, "_hf_peft_config_loaded", False)
    quantizer, activation = model.hf_quantizer, replaced_activation(model)
    entry = _entry(current_config(model), activation)
    try:
        quantizer.saving = save_directory if is_main_process and not adapter_only else None, state_dict
        model.config.quantization_config = entry
        with _activation_in_config(model, activation):
            type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *arguments, **named)
    finally:
        quantizer.saving = (None, None)
        vars(model.config).pop("quantization_config", None)


@contextmanager
def _activation_in_config(model: PreTrainedModel, activation: str | None) -> Iterator[None]:
    """Inside, the model's config names ``activation``, if that replaces the MLPs' own."""
    before = {name: getattr(model.config, name, None) for name in ACTIVATION_ENTRIES if activation is not None}
    before = {name: value for name, value in before.items() if value is not None}
    if activation is not None and not before:
        warnings.warn(
            f"the config of {type(model).__name__} has none of {', '.join(ACTIVATION_ENTRIES)}: without cats_ext this "
            f"checkpoint loads with its own activation instead of {activation}, and computes something else",
            UserWarning,
            stacklevel=4,
        )
    try:
        for name in before:
            setattr(model.config, name, activation)
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


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
            f"the checkpoint's config.json has a quantization_config of method {METHOD}, but its thresholds cannot be "
            f"read; without that entry it loads as the dense model. {error}"
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
