"""Makes one module of a model sparse and dense again, by a change of its class. All state that this adds is undone."""

from __future__ import annotations

import torch
from torch import nn

from cats_ext.patching.detection import GatedMLP
from cats_ext.patching.experts import CatsExperts
from cats_ext.patching.mlp import CatsMLP, CatsState, ForwardSettings
from cats_ext.patching.wrappers import rebind_forward
from cats_ext.thresholds.config import CatsConfig


def make_sparse(mlp: GatedMLP, config: CatsConfig, neuron_rows: bool = True) -> None:
    """Turn one dense module into a :class:`CatsMLP`. If interrupted, :func:`make_dense` undoes what was done.

    Without ``neuron_rows`` the weight's memory stays as it is, and the module takes the dense path.
    """
    module, weight = mlp.module, mlp.down_weight
    # First of all, so that make_dense knows what there is to undo.
    module.cats = CatsState(type(module), mlp.down_owner, weight.stride(), config, mlp.name)
    projections = "merged" if mlp.merged else "separate"
    module.forward_settings = ForwardSettings(
        mlp.hidden_size, mlp.activation, projections, dense_prefill=not config.sparse_prefill
    )
    if neuron_rows:
        weight.data = weight.data.mT.contiguous().mT
    thresholds = {"threshold": config.thresholds[mlp.name], "down_threshold": config.down_thresholds.get(mlp.name)}
    with torch.inference_mode(False):  # they are written to later, also outside of it
        for name, value in thresholds.items():
            copy = None if value is None else value.detach().to(weight.device, torch.float32, copy=True)
            module.register_buffer(name, copy, persistent=False)
        module.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device=weight.device), persistent=False)
    set_class(module, sparse_class(module))


def sparse_class(module: nn.Module) -> type[CatsMLP]:
    """The class of a module that :func:`make_sparse` has been called for."""
    return CatsMLP if module.cats.target.experts is None else CatsExperts


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` does, under a hook too; its state stays."""
    module.__class__ = kind
    module.forward_settings = module.forward_settings._replace()  # another object: compiled models see the change
    rebind_forward(module)


def make_dense(module: nn.Module) -> None:
    """Turn a :class:`CatsMLP`, whole or half made, back into what it was. Safe to call again if interrupted."""
    state: CatsState | None = vars(module).get("cats")
    if state is None:
        return
    if "forward_settings" in vars(module):
        set_class(module, state.original_class)
        del module.forward_settings
    for name in ("threshold", "down_threshold", "counts"):
        if name in module._buffers:
            delattr(module, name)
    weight = state.down_weight
    if weight.stride() != state.down_strides:
        dense = torch.empty_strided(weight.shape, state.down_strides, dtype=weight.dtype, device=weight.device)
        weight.data = dense.copy_(weight.data)
    del module.cats
