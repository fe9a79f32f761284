"""Makes a model's gated MLPs sparse in place, and dense again: all of them or none."""

from __future__ import annotations

from torch import nn

from cats_ext.config import CatsConfig
from cats_ext.detection import GatedMLP, find_gated_mlps
from cats_ext.modules import CatsMLP, make_dense, make_sparse


def sparse_mlps(model: nn.Module) -> dict[str, CatsMLP]:
    """The patched MLPs of ``model`` by name; empty if it is dense."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CatsMLP)}


def apply_cats(model: nn.Module, config: CatsConfig) -> nn.Module:
    """Make every gated MLP of ``model`` sparse, in place, with the thresholds of ``config``.

    The state dict, the Parameter objects and the modules stay the same ones; each down projection's memory is laid out
    with one contiguous row a neuron, layer by layer, so the peak of extra memory is one such matrix.

    Args:
        model: any model whose MLPs have gate_proj, up_proj, down_proj (Llama and its relatives) or gate_up_proj,
            down_proj (Phi-3) and a SiLU, GELU or ReLU.
        config: from :func:`cats_ext.calibrate` or :meth:`CatsConfig.from_pretrained`, for this model.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the model is patched already or cannot run sparsely, or the config belongs to another model. The
            model is unchanged after any error, KeyboardInterrupt included.
    """
    if not isinstance(config, CatsConfig):
        raise TypeError(f"config must be a CatsConfig, got {type(config).__name__}")
    mlps = find_dense_mlps(model)
    config.validate()
    config.check_fits(model, mlps)
    try:
        for mlp in mlps:
            layer = config.layers[mlp.name]
            make_sparse(
                mlp,
                config.thresholds[mlp.name],
                config.down_thresholds.get(mlp.name),
                layer.up_sparsity,
                layer.down_sparsity,
            )
        return model
    except BaseException:
        for mlp in mlps:
            make_dense(mlp.module)
        raise


def remove_cats(model: nn.Module) -> nn.Module:
    """Undo :func:`apply_cats`: same modules, same values, same memory layout. Returns ``model``.

    Adapters and hooks added since stay where they are. If interrupted, the removal is completed before the exception
    is passed on.

    Raises:
        ValueError: the model is not patched.
    """
    patched = sparse_mlps(model)
    if not patched:
        raise ValueError(f"model of class {type(model).__name__} is not patched: there is nothing to remove")
    try:
        for module in patched.values():
            make_dense(module)
    except BaseException:
        for module in patched.values():
            make_dense(module)
        raise
    return model


def find_dense_mlps(model: nn.Module) -> list[GatedMLP]:
    """As :func:`find_gated_mlps`, and refuses a model that is patched already."""
    if isinstance(model, nn.Module) and sparse_mlps(model):
        raise ValueError(f"model of class {type(model).__name__} is patched already: call remove_cats first")
    return find_gated_mlps(model)
