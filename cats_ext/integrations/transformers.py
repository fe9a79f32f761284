"""CATS as a quantization method of transformers, so that checkpoints carry their thresholds and packed rows.

A CATS checkpoint is the dense checkpoint with two more files (``cats_config.json`` and ``cats_thresholds.cats``, see
thresholds/files.py) and an entry ``quantization_config`` in ``config.json`` that says so; saving.py writes it. Where
cats_ext has not been imported, transformers warns of an unknown method and loads the dense model. A ReLUfied model's
``config.json`` names ReLU as its activation, so that it is loaded as such in both cases.

A quantised model's checkpoint, with thresholds or without, has its packed rows under the names of the dense weights,
and their formats in that entry (quantization/layout.py). Without cats_ext it is refused, since the shapes are others.

Patching does not know of this module: it registers itself as a listener when it is imported, which
``integrations/__init__.py`` arranges for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cats_ext.integrations import saving
from cats_ext.parallel.sharding import check_on_one_rank
from cats_ext.patching.apply import apply_cats, patch_with_relu, remove_cats, sparse_mlps
from cats_ext.patching.exact.apply import apply_exact
from cats_ext.patching.listeners import PatchListener, add_listener
from cats_ext.quantization import QuantizationConfig, quantized_linears
from cats_ext.quantization.foreign import METHODS
from cats_ext.quantization.layout import Rows, check_rows, describe, prepare
from cats_ext.quantization.run import quantize_as
from cats_ext.rows.formats import ROW_ALIGNMENT
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.exact import EXACT
from cats_ext.thresholds.files import CONFIG_FILE, thresholds_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = CatsConfig.quant_method
# What transformers sets on a quantised model and its configs, for which it refuses half(), float() and training.
_MARKS = ("is_quantized", "quantization_method", "quantization_config", "_is_quantized", "hf_quantizer")


@register_quantization_config(METHOD)
class CatsCheckpointConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of a checkpoint's ``config.json``: what was done, without the thresholds.

    Args:
        rule, sparsity, bytes_share: as in :class:`cats_ext.CatsConfig`; ``rule="exact"`` alone, for
            :func:`cats_ext.apply_exact`; None of a checkpoint without thresholds.
        activation: ``relu`` for a ReLUfied model, whose MLPs compute it instead of their own.
        rows: the formats of packed rows, as :func:`cats_ext.quantization.layout.describe` gives them.
    """

    # In the file only where they are given.
    rule: str | None = None
    activation: str | None = None
    rows: Rows | None = None

    def __init__(
        self,
        /,
        rule: str | None = None,
        sparsity: float | None = None,
        bytes_share: float | None = None,
        activation: str | None = None,
        rows: Rows | None = None,
        **_: Any,
    ) -> None:
        thresholds = {"rule": rule, "sparsity": sparsity, "bytes_share": bytes_share}
        nothing = all(value is None for value in thresholds.values())
        if None in thresholds.values() and rule != EXACT and (rows is None or not nothing):
            raise ValueError(
                "quantization_config must be a cats_ext.CatsConfig, or the entry of a saved CATS checkpoint with rule, "
                f"sparsity and bytes_share, got rule={rule}, sparsity={sparsity}, bytes_share={bytes_share}"
            )
        if activation not in (None, "relu"):
            raise ValueError(f"activation in quantization_config must be relu or missing, got {activation!r}")
        if rows is not None:
            check_rows(rows)
        self.quant_method = METHOD
        given = thresholds | {"activation": activation, "rows": rows}
        vars(self).update({key: value for key, value in given.items() if value is not None})


@register_quantizer(METHOD)
class CatsQuantizer(HfQuantizer):
    """Patches a model when transformers has loaded its weights, and writes the thresholds when it saves them."""

    requires_calibration = False

    def __init__(
        self, quantization_config: CatsConfig | QuantizationConfig | CatsCheckpointConfig, **kwargs: Any
    ) -> None:
        self.thresholds = None
        self.marks: list[tuple[Any, dict[str, Any]]] = []  # of the model before it was patched or quantised
        if isinstance(quantization_config, CatsConfig):
            self.thresholds = quantization_config
            quantization_config = CatsCheckpointConfig(**saving.checkpoint_entry(self.thresholds))
        super().__init__(quantization_config, **kwargs)
        # Early versions would leave weights that they rename while loading, such as experts, in the file's dtype.
        self.pre_quantized = self.pre_quantized and hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if not isinstance(config, CatsCheckpointConfig):
            return
        if config.rows is not None:
            prepare(model, config.rows)
        if self.thresholds is None and config.rule not in (None, EXACT):
            self.thresholds = CatsConfig.from_pretrained(_checkpoint_directory(model.config, checkpoint_files))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config, thresholds, self.thresholds = self.quantization_config, self.thresholds, None
        _unmark(_marks(model))  # nothing has been done to this one yet
        del model.hf_quantizer
        if isinstance(config, QuantizationConfig):
            return quantize_as(model, config, progress=False)
        _check_rows(model)
        attach(model)
        if config.rule == EXACT:
            return apply_exact(model)
        if thresholds is None:
            return model
        return patch_with_relu(model, thresholds) if config.activation == "relu" else apply_cats(model, thresholds)

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Tensor] | None, dict]:
        return saving.state_dict_to_save(), {}  # what is returned replaces the caller's

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if quantized_linears(model):
            raise ValueError(
                f"model of class {type(model).__name__} is quantised, and the weights before are not kept: "
                "remove_cats(model) takes thresholds away"
            )
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
    """Raise ValueError if another quantization method has been at work and the weights are not dense.

    Those of a GGUF file are, unless transformers was asked to keep them packed and has kernels for it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or isinstance(quantizer, CatsQuantizer):
        return
    method = getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    if method == "gguf" and not getattr(quantizer, "packed_modules", None):
        return
    advice = "load it without quantization_config, or dequantize it first"
    if method == "gguf":
        advice = "load it with GgufConfig(dequantize=True), or dequantize it first"
    elif method in METHODS:
        advice = "cats_ext.convert_quantized(directory) makes packed rows of its checkpoint"
    raise ValueError(
        f"model of class {type(model).__name__} is quantised with {method}, which is not supported: {advice}"
    )


def _check_rows(model: nn.Module) -> None:
    """Raise ValueError unless all packed rows have been loaded; give them memory of their own where they need it."""
    linears = quantized_linears(model)
    if linears:
        check_on_one_rank(model, "a checkpoint with packed rows")
    for name, linear in linears.items():
        weight = linear.weight
        if weight.is_meta:
            raise ValueError(f"{name}.weight is on the meta device: load the weights first, without offloading")
        loaded = getattr(weight, "_is_hf_initialized", False)
        if not loaded or weight.dtype != torch.uint8 or tuple(weight.shape) != linear.weight_shape:
            found = f"{weight.dtype} {list(weight.shape)}" if loaded else "none that can be used"
            raise ValueError(
                f"the checkpoint must have packed rows {name}.weight, torch.uint8 {list(linear.weight_shape)} by its "
                f"config.json, got {found}"
            )
        if weight.data_ptr() % ROW_ALIGNMENT:  # it lies in the file, which is mapped into memory
            weight.data = weight.data.clone()


def attach(model: nn.Module, config: CatsConfig | None = None) -> None:
    """Make ``save_pretrained`` of a transformers model write a CATS checkpoint. Undone by :func:`detach`.

    Nothing happens to one that is neither patched with ``config`` nor quantised.
    """
    from transformers.modeling_utils import PreTrainedModel  # not above: it is what imports this module

    rows = describe(model) or None
    if not isinstance(model, PreTrainedModel) or (config is None and rows is None):
        return
    entry = CatsCheckpointConfig(**saving.checkpoint_entry(config, rows=rows))
    if isinstance(before := getattr(model, "hf_quantizer", None), CatsQuantizer):
        before.quantization_config = entry
        return
    quantizer = CatsQuantizer(entry)
    quantizer.marks = _marks(model)
    model.hf_quantizer = quantizer
    _unmark(quantizer.marks)
    for name, function in _REPLACED.items():
        setattr(model, name, partial(function, model))


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`, whole or half done, of the model or of a part of it; not if it has packed rows."""
    if quantized_linears(model):
        return
    for part in model.modules():
        for name, function in _REPLACED.items():
            own = vars(part).get(name)
            if isinstance(own, partial) and own.func is function:
                delattr(part, name)
        quantizer = getattr(part, "hf_quantizer", None)
        if isinstance(quantizer, CatsQuantizer):
            for owner, marks in quantizer.marks:
                vars(owner).update(marks)
            if part.hf_quantizer is quantizer:
                del part.hf_quantizer


def _save_pretrained(model: PreTrainedModel, *arguments: Any, **named: Any) -> None:
    if not (
        sparse_mlps(model) or quantized_linears(model)
    ):  # remove_cats has been called with the part that has the MLPs
        detach(model)
        return model.save_pretrained(*arguments, **named)
    return saving.save_pretrained(model, *arguments, **named)


_REPLACED = {
    "save_pretrained": _save_pretrained,
    "_upload_modified_files": saving.upload_modified_files,
    "barrier_after_gathered_checkpoint_save": saving.barrier_after_save,
}

add_listener(PatchListener(check=check_not_quantised, patched=attach, quantized=attach, removing=detach))


def _marks(model: PreTrainedModel) -> list[tuple[Any, dict[str, Any]]]:
    """``_MARKS`` of a model and its configs, by their owner; the model and its quantizer come last."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    owners = {id(owner): owner for owner in (*configs, model) if hasattr(owner, "__dict__")}
    found = [(owner, {name: vars(owner)[name] for name in _MARKS if name in vars(owner)}) for owner in owners.values()]
    return [(owner, marks) for owner, marks in found if marks]


def _unmark(marks: list[tuple[Any, dict[str, Any]]]) -> None:
    """Take the marks away, all but the quantizer."""
    for owner, found in marks:
        for name in found.keys() - {"hf_quantizer"}:
            vars(owner).pop(name, None)


def _checkpoint_directory(config: PreTrainedConfig, checkpoint_files: list[str] | None) -> Path:
    """Where a checkpoint's threshold files are: beside its weights, fetched from the hub if need be."""
    source, place = config._name_or_path, {}
    if checkpoint_files:
        beside = Path(checkpoint_files[0]).parent
        if (beside / CONFIG_FILE).is_file() and (beside / thresholds_file(beside / CONFIG_FILE)).is_file():
            return beside
        place = _place_in_cache(beside)
        source = source if place else str(beside)
    try:
        path = Path(cached_file(source, CONFIG_FILE, **place))
        cached_file(source, thresholds_file(path), **place)
    except OSError as error:
        raise OSError(
            f"the checkpoint's config.json has a quantization_config of method {METHOD}, but its thresholds cannot be "
            f"read; without that entry it loads as the dense model. {error}"
        ) from error
    return path.parent


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
