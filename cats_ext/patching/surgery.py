"""Makes one module of a model sparse and dense again, by a change of its class. All state that this adds is undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext.patching.detection import ACTIVATION_NAMES, GatedMLP, recognise_activation
from cats_ext.patching.experts import CatsExperts
from cats_ext.patching.mlp import CatsMLP, CatsState, ForwardSettings, PatchedMLP
from cats_ext.patching.wrappers import rebind_forward
from cats_ext.thresholds.config import CatsConfig


def make_sparse(mlp: GatedMLP, config: CatsConfig, neuron_rows: bool = True) -> None:
    """Turn one dense module into a :class:`CatsMLP`. If interrupted, :func:`make_dense` undoes what was done.

    Without ``neuron_rows`` the weight's memory stays as it is, and the module takes the dense path.
    """
    module, weight = mlp.module, mlp.down_weight
    name = next(name for name in ACTIVATION_NAMES if hasattr(module, name))
    own = getattr(module, name)
    relufied = recognise_activation(own) != mlp.activation
    # First of all, so that make_dense knows what there is to undo.
    module.cats = CatsState(type(module), own, relufied, mlp.down_owner, weight.stride(), config, mlp.name)
    module.forward_settings = ForwardSettings(
        mlp.hidden_size,
        mlp.activation,
        None if relufied else name,
        projections="merged" if mlp.merged else "separate",
        dense_prefill=not config.sparse_prefill,
    )
    if neuron_rows:
        _set_memory(weight, neuron_rows_of)
    thresholds = {"threshold": config.thresholds[mlp.name], "down_threshold": config.down_thresholds.get(mlp.name)}
    with torch.inference_mode(False):  # they are written to later, also outside of it
        for name, value in thresholds.items():
            copy = None if value is None else value.detach().to(weight.device, torch.float32, copy=True)
            module.register_buffer(name, copy, persistent=False)
        module.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device=weight.device), persistent=False)
    set_class(module, sparse_class(module))


def neuron_rows_of(weight: Tensor) -> Tensor:
    """The values of ``weight`` ``[..., H, I]`` with one contiguous row a neuron; itself if it lies that way."""
    return weight.mT.contiguous().mT


def _set_memory(weight: Tensor, make: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode(weight.is_inference()):  # a weight cannot run with memory of the other kind
        weight.data = make(weight.data)


def sparse_class(module: nn.Module) -> type[CatsMLP]:
    """The class of a module that :func:`make_sparse` has been called for."""
    return CatsMLP if module.cats.target.experts is None else CatsExperts


@functools.cache
def unmasked_class(original: type[nn.Module]) -> type[PatchedMLP]:
    """The class of a patched module that computes as ``original`` does, with all its methods."""

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # pickle finds no class that is made here
        return _new_unmasked, (original,), vars(self)

    return type(original.__name__, (PatchedMLP, original), {"__reduce_ex__": __reduce_ex__})


def _new_unmasked(original: type[nn.Module]) -> nn.Module:
    kind = unmasked_class(original)
    return kind.__new__(kind)


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` does, under a hook too; its state stays."""
    module.__class__ = kind
    module.forward_settings = module.forward_settings._replace()  # another object: compiled models see the change
    rebind_forward(module)


def check_own_memory(name: str, weight: Tensor) -> None:
    """Raise ValueError if ``weight`` would be detached from others that have its memory by getting new memory."""
    if type(weight.data) is not Tensor:
        return
    storage = weight.untyped_storage()
    holders = torch._C._storage_Use_Count(storage._cdata) - 1  # without the object above
    if storage.nbytes() != weight.numel() * weight.element_size() and holders > 1:
        place = f"is a view of a buffer of {storage.nbytes()} bytes that other tensors use too"
    elif weight.device.type == "cpu" and weight.is_shared():  # on CUDA always true
        place = "is in memory shared between processes"
    else:
        return
    raise ValueError(
        f"{name} {place}, and another memory layout would detach it: give it memory of its own first "
        "(weight.data = weight.data.clone())"
    )


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
        dense = functools.partial(torch.empty_strided, weight.shape, state.down_strides)
        _set_memory(weight, lambda w: dense(dtype=w.dtype, device=w.device).copy_(w))
    del module.cats
