"""Makes a model's gated MLPs sparse in place, and dense again: all of them or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn

from cats_ext._progress import finish_despite_interrupt
from cats_ext.parallel.ranks import check_same, raised_together
from cats_ext.parallel.sharding import group_of
from cats_ext.patching import listeners
from cats_ext.patching.detection import GatedMLP, check_module, find_gated_mlps
from cats_ext.patching.mlp import PatchedMLP
from cats_ext.patching.surgery import (
    MemoryLayouts,
    check_rule,
    make_dense,
    make_sparse,
    patched_class,
    set_class,
    sparse_layout,
)
from cats_ext.patching.wrappers import unwrapped
from cats_ext.thresholds.config import CatsConfig, LayerConfig
from cats_ext.thresholds.exact import ExactConfig
from cats_ext.thresholds.rules import check_bool
from cats_ext.thresholds.statistics import SMALLEST


def sparse_mlps(model: nn.Module) -> dict[str, PatchedMLP]:
    """The patched MLPs of ``model`` by name, also while masking is disabled; empty if it is dense.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    check_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, PatchedMLP)}


def patched_mlps(model: nn.Module, advice: str = "call apply_cats first") -> dict[str, PatchedMLP]:
    """As :func:`sparse_mlps`, of a model that has to be patched.

    Args:
        advice: how the error's sentence ends.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is not patched.
    """
    patched = sparse_mlps(model)
    if not patched:
        raise ValueError(f"model of class {type(model).__name__} is not patched: {advice}")
    return patched


def apply_cats(
    model: nn.Module,
    config: CatsConfig,
    *,
    sparse_prefill: bool | None = None,
    neuron_rows: bool = True,
    check_weights: bool = True,
) -> nn.Module:
    """Make every gated MLP of ``model`` sparse, in place, with the thresholds of ``config``.

    The state dict, the Parameter objects and the modules stay the same ones; each down projection's memory is laid out
    with one contiguous row a neuron, layer by layer, so the peak of extra memory is one such matrix of each size, taken
    before anything is changed. With the rule ``three_threshold`` each gate's memory is laid out too, with one
    contiguous row an input. From then on ``save_pretrained`` of a transformers model writes a checkpoint with the
    thresholds beside the dense weights, which ``from_pretrained`` loads patched. Of a tensor-parallel model, each rank
    takes the thresholds of its neurons; all ranks have to call this function, :func:`set_sparsity`,
    :func:`sparsity_report` and ``save_pretrained`` together, and what one rank refuses is an error on all.

    Args:
        model: any model whose MLPs have gate_proj, up_proj, down_proj (Llama and its relatives) or gate_up_proj,
            down_proj (Phi-3) and a SiLU, GELU or ReLU; also inside torch.compile, DistributedDataParallel or PEFT.
        config: from :func:`cats_ext.calibrate` or :meth:`CatsConfig.from_pretrained`, for this model, with or without
            its head.
        sparse_prefill: False to compute prompts densely (whatever has several tokens of a sequence, so also a draft
            that is being verified), True to mask them as generated tokens are; None for what the config says, by
            default True.
        neuron_rows: False leaves all memory as it is. The mask is the same, but the sparse kernel is never taken: for
            training under FSDP2, whose ``fully_shard`` takes contiguous weights only, and for weights in shared memory
            or a flat buffer. Packed rows lie right as they are.
        check_weights: False takes thresholds that were made for other weights, such as those of the model that this one
            was tuned from. By default a sample of the weights is compared with the config's, in any dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the model is patched already, is quantised or cannot run sparsely, others have the memory of a
            weight that is laid out too (``share_memory``, a flat buffer), the config belongs to another model or other
            weights, its rule does not go with the model's MLPs, or the ranks of the model have other configs or cannot
            share its neurons evenly. The model is unchanged after any error, KeyboardInterrupt included.
    """
    with raised_together(group_of(model)):
        if not isinstance(config, CatsConfig):
            raise TypeError(f"config must be a CatsConfig, got {type(config).__name__}")
        if isinstance(config, ExactConfig):
            raise TypeError(
                "config must have thresholds, got that of a model that is sparse by itself: call apply_exact"
            )
        check_bool("neuron_rows", neuron_rows)
        check_bool("check_weights", check_weights)
        mlps = find_dense_mlps(model)
        if sparse_prefill is not None:
            config = replace(config, sparse_prefill=sparse_prefill)
        if not check_weights:
            config = replace(config, weights={})
        config.validate()
    return _patch(model, mlps, config, neuron_rows)


def apply_relufication(model: nn.Module) -> nn.Module:
    """Replace the activation of every gated MLP by ReLU, in place: the baseline that CATS is compared with.

    Neurons whose gate is not positive are zero and skipped by the same kernel; there is no threshold to calibrate, and
    without tuning the model is another one (arXiv 2404.08763, section 4; arXiv 2310.04564). :func:`remove_cats` undoes
    it.

    ``save_pretrained`` of a transformers model then writes a checkpoint that ``from_pretrained`` loads ReLUfied and
    patched. Its ``config.json`` names ReLU as the activation, so that it is the ReLUfied model without cats_ext too;
    where the model's config names no activation, saving warns that it is not.

    Args:
        model: dense, as for :func:`apply_cats`.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: as :func:`apply_cats`.
    """
    return patch_with_relu(model)


def patch_with_relu(model: nn.Module, config: CatsConfig | None = None) -> nn.Module:
    """As :func:`apply_relufication`; ``config`` has the thresholds of a ReLUfied model that was saved."""
    with raised_together(group_of(model)):
        mlps = [replace(mlp, activation="relu") for mlp in find_dense_mlps(model)]
    if config is None:
        layers = {
            mlp.name: LayerConfig(mlp.hidden_size, mlp.intermediate_size, mlp.activation, 0.0, 0.0, mlp.experts)
            for mlp in mlps
        }
        config = CatsConfig(
            thresholds={name: torch.tensor(SMALLEST) for name in layers},
            layers=layers,
            model_type=getattr(getattr(unwrapped(model), "config", None), "model_type", None),
            sparsity=0.0,
        )
    return _patch(model, mlps, config)


def _patch(model: nn.Module, mlps: list[GatedMLP], config: CatsConfig, neuron_rows: bool = True) -> nn.Module:
    inner, group = unwrapped(model), group_of(model)
    check_same(group, "config", partial(_digest, config))
    with raised_together(group):
        config = config.for_part(inner, mlps)
        check_rule(config.rule, mlps)
        config.check_fits(inner, mlps)
        wanted = [sparse_layout(mlp, config.rule) if neuron_rows else {} for mlp in mlps]
        layouts = MemoryLayouts(
            {
                f"{mlp.name}.{child}": weight
                for mlp, layout in zip(mlps, wanted, strict=True)
                for child, weight in layout.items()
            }
        )
    try:
        with raised_together(group):
            for mlp, layout in zip(mlps, wanted, strict=True):
                make_sparse(mlp, config, layouts, layout)
            listeners.patched(inner, config)
        return model
    except BaseException:
        make_all_dense(inner, [mlp.module for mlp in mlps], layouts)
        raise


def _digest(config: CatsConfig) -> str:
    """Of what the ranks of a model have to agree on."""
    digest = sha256(repr(config.to_dict()).encode())
    for thresholds in (config.thresholds, config.down_thresholds, config.input_thresholds):
        for name, threshold in thresholds.items():
            digest.update(name.encode() + threshold.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def remove_cats(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_cats`: same modules, same values, same memory layout. A quantised model stays quantised.

    Adapters and hooks added since stay where they are. If interrupted, the removal is completed before the exception
    is passed on.

    Args:
        model: patched, or a wrapper of a patched model, or the part of it that has all its MLPs.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is not patched, has only some of the MLPs that were patched together, or others have the
            memory of a weight that was laid out too. The model is unchanged then.
    """
    if not sparse_mlps(model):
        listeners.removing(unwrapped(model))  # what a removal from the part with the MLPs has left on the whole
    patched = patched_mlps(model, "there is nothing to remove")
    check_complete(model, patched)
    layouts = MemoryLayouts({child: weight for name, m in patched.items() for child, weight in m.layouts(name).items()})
    finish_despite_interrupt(lambda: make_all_dense(model, list(patched.values()), layouts))
    return model


def check_complete(model: nn.Module, patched: dict[str, PatchedMLP]) -> None:
    """Raise ValueError if the rest of the model would stay patched: it then has no config that fits it."""
    states = [module.cats for module in patched.values()]
    others = {name for state in states for name in state.config.layers} - {state.name for state in states}
    if others:
        raise ValueError(
            f"model of class {type(model).__name__} is a part of a patched model and has {len(states)} of its MLPs, "
            f"but not {min(others)}: call remove_cats with the whole model"
        )


def current_config(model: nn.Module) -> CatsConfig:
    """The config of a patched model, with the thresholds as they are in its modules now.

    Of a tensor-parallel model, those of all ranks, all of which have to call it.

    Raises:
        ValueError: the model is not patched.
    """
    with raised_together(group_of(model)):
        states = {module.cats.name: module for module in patched_mlps(model).values()}

    def read(buffer: str) -> dict[str, Tensor]:
        tensors = {name: getattr(module, buffer) for name, module in states.items()}
        return {
            name: states[name].cats.whole(tensor).detach().to("cpu", copy=True)
            for name, tensor in tensors.items()
            if tensor is not None
        }

    config = next(iter(states.values())).cats.config
    return replace(
        config,
        thresholds=read("threshold"),
        down_thresholds=read("down_threshold"),
        input_thresholds=read("input_threshold"),
    )


def set_sparsity(model: nn.Module, sparsity: float, *, down_sparsity: float | None = None) -> nn.Module:
    """Change how sparse a patched model is, from what its calibration counted; the model is not run.

    The thresholds are overwritten in place, so captured CUDA graphs and compiled models follow from their next run on.

    Args:
        model: patched with a config that has statistics, as :func:`cats_ext.calibrate` makes it.
        sparsity, down_sparsity: as for :meth:`CatsConfig.at_sparsity`.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: the model is not patched, a sparsity is out of its range, or the config has no
            statistics. The thresholds are unchanged after any error.
    """
    before, group = current_config(model), group_of(model)
    with raised_together(group):
        after = before.at_sparsity(sparsity, down_sparsity=down_sparsity)
    check_same(group, "sparsity", partial(_digest, after))
    modules = list(sparse_mlps(model).values())
    try:
        with raised_together(group):
            for module in modules:
                module.set_thresholds(after)
        return model
    except BaseException:
        for module in modules:
            module.set_thresholds(before)
        raise


@contextmanager
def masking_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes densely with the same weights, as it did before :func:`apply_cats`; nothing is copied.

    It counts as patched there: it can be cast, moved, saved and given another sparsity, but not calibrated or patched.
    A captured graph runs what it recorded; setting its thresholds to 0 has the same effect there.

    Args:
        model: patched.

    Returns:
        A context manager.

    Raises:
        ValueError: the model is not patched.
    """
    before = {module: type(module) for module in patched_mlps(model).values()}

    def put_back() -> None:
        for module, kind in before.items():
            if isinstance(module, PatchedMLP):  # not removed meanwhile
                set_class(module, kind)

    try:
        try:
            for module in before:
                set_class(module, patched_class(PatchedMLP, module.cats.original_class))
            yield
        finally:
            put_back()
    finally:  # of an interrupt in or right before the first one
        put_back()


def replaced_activation(model: nn.Module) -> str | None:
    """The activation that the patched MLPs of ``model`` compute instead of their own; None if it is their own."""
    replaced = (m.forward_settings.activation for m in sparse_mlps(model).values() if m.cats.relufied)
    return next(replaced, None)


def find_dense_mlps(model: nn.Module) -> list[GatedMLP]:
    """As :func:`find_gated_mlps`, in what ``model`` may be wrapped in; refuses one that is patched already."""
    model = unwrapped(model)
    if sparse_mlps(model):
        raise ValueError(f"model of class {type(model).__name__} is patched already: call remove_cats first")
    listeners.check(model)
    return find_gated_mlps(model)


def make_all_dense(model: nn.Module, modules: list[nn.Module], layouts: MemoryLayouts) -> None:
    """Undo the patching of ``modules``, whole or half made."""
    listeners.removing(unwrapped(model))
    for module in modules:
        make_dense(module, layouts)
