"""Makes one module of a model sparse and dense again, by a change of its class. All state that this adds is undone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cats_ext.patching.detection import ACTIVATION_NAMES, MERGED, GatedMLP, recognise_activation
from cats_ext.patching.experts import CatsExperts
from cats_ext.patching.mlp import CatsMLP, CatsState, ForwardSettings, PatchedMLP
from cats_ext.patching.projections import kind_of
from cats_ext.patching.wrappers import rebind_forward
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.rules import has_input_threshold

_Kind = TypeVar("_Kind", bound=PatchedMLP)


class MemoryLayouts:
    """Gives weights another memory layout, one after the other, and the one before, without new memory from then on.

    A weight is copied into a spare memory, and its own is the spare of the next one of its size. Where others have that
    too, it keeps its values, and there are spares for all. They are taken before the first weight is changed.

    Args:
        layouts: the weight, and the strides that it is to have, by what errors call it.

    Raises:
        ValueError: a weight would be detached from others that have its memory.
    """

    def __init__(self, layouts: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
        changing = {name: (weight, new) for name, (weight, new) in layouts.items() if weight.stride() != new}
        for name, (weight, _) in changing.items():
            check_own_memory(name, weight)
        self._weights = [weight for weight, _ in changing.values()]
        self._memories: list[Tensor] = []
        spares = Counter({_memory_of(weight, strides): 1 for weight, strides in changing.values()})
        for weight, strides in changing.values():
            there, back = _memory_of(weight, strides), _memory_of(weight, weight.stride())
            if there == back and _is_whole(weight) and _is_only_holder(weight):
                with torch.inference_mode(weight.is_inference()):
                    self._memories.append(weight.data.as_strided((weight.numel(),), (1,)))
            else:
                spares.update({there, back})
        for (size, dtype, device, inference), count in spares.items():
            with torch.inference_mode(inference):
                self._memories += [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]

    def lay_out(self, weight: Tensor, strides: tuple[int, ...]) -> None:
        """Give one of the weights these strides: its new ones, or those it had. Safe to call again if interrupted."""
        if weight.stride() == strides:
            return
        wanted = _memory_of(weight, strides)
        in_use = {other.untyped_storage()._cdata for other in self._weights}
        spare = next(
            memory
            for memory in self._memories
            if _memory_of(memory, (1,)) == wanted and memory.untyped_storage()._cdata not in in_use
        )
        with torch.inference_mode(weight.is_inference()):  # a weight cannot run with memory of the other kind
            weight.data = spare.as_strided(weight.shape, strides).copy_(weight.data)


def _memory_of(weight: Tensor, strides: tuple[int, ...]) -> tuple[int, torch.dtype, torch.device, bool]:
    """The memory that ``weight`` takes with these strides: elements, dtype, device, and if of inference mode."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(weight.shape, strides, strict=True))
    return size, weight.dtype, weight.device, weight.is_inference()


def check_rule(rule: str, mlps: Sequence[GatedMLP]) -> None:
    """Raise ValueError unless ``rule`` goes with all ``mlps``: columns of a gate are read of a dense one only."""
    if not has_input_threshold(rule):
        return
    for mlp in mlps:
        found = (
            (mlp.experts is not None, "the experts of a mixture"),
            (mlp.merged, f"{MERGED[0]}, which is gate and up in one"),
            (mlp.packed, "packed rows"),
            (mlp.shard is not None, "a part of its neurons on this rank (tensor parallelism)"),
        )
        kind = next((kind for is_found, kind in found if is_found), None)
        if kind is not None:
            raise ValueError(f"rule {rule!r} needs a whole gate_proj of dense weights, got {kind} in {mlp.name}")


Layout = dict[str, tuple[Tensor, tuple[int, ...]]]
"""Weights of a module and the strides that they are to have, by the names of the children or parameters."""


def sparse_layout(mlp: GatedMLP, rule: str) -> Layout:
    """What the kernel needs: down_proj with one contiguous row a neuron, a gate read by columns with one an input."""
    layout = {"down_proj": (mlp.down_weight, column_strides(mlp.down_weight))}
    if has_input_threshold(rule):
        weight = mlp.module.gate_proj.weight
        layout["gate_proj"] = weight, column_strides(weight)
    return layout


def column_strides(weight: Tensor) -> tuple[int, ...]:
    """The strides of ``weight`` ``[..., H, I]`` with each column contiguous; its own if it lies that way.

    Packed rows of the down projection always do.
    """
    if weight.dtype == torch.uint8 or weight.mT.is_contiguous():
        return weight.stride()
    *_, height, width = weight.shape
    return *(() if weight.dim() == 2 else (height * width,)), 1, height


def make_sparse(
    mlp: GatedMLP, config: CatsConfig, layouts: MemoryLayouts, layout: Layout, *, exact: bool = False
) -> None:
    """Turn one dense module into a :class:`CatsMLP`. If interrupted, :func:`make_dense` undoes what was done.

    Where ``layout`` has not what :func:`sparse_layout` has, it takes the dense path.
    """
    module = mlp.module
    name = next(name for name in ACTIVATION_NAMES if hasattr(module, name))
    own = getattr(module, name)
    relufied = recognise_activation(own) != mlp.activation
    columns = has_input_threshold(config.rule)
    state = CatsState(
        type(module),
        own,
        relufied,
        mlp.down_owner,
        mlp.down_weight.stride(),
        config,
        mlp.name,
        shard=mlp.shard,
        gate_owner=module.gate_proj if columns else None,
        gate_strides=module.gate_proj.weight.stride() if columns else (),
    )
    settings = ForwardSettings(
        mlp.hidden_size,
        mlp.activation,
        None if relufied else name,
        projections=kind_of(mlp.merged, mlp.packed, mlp.shard is not None, columns),
        dense_prefill=not config.sparse_prefill,
        exact=exact,
    )
    patch_module(module, CatsExperts if mlp.experts else CatsMLP, state, settings, layouts, layout)


def patch_module(
    module: nn.Module,
    kind: type[PatchedMLP],
    state: CatsState,
    settings: ForwardSettings,
    layouts: MemoryLayouts,
    layout: Layout,
) -> None:
    """Let ``module`` compute as ``kind`` does, with its weights in ``layout``."""
    module.cats = state  # first of all, so that make_dense knows what there is to undo
    module.forward_settings = settings
    for weight, strides in layout.values():
        layouts.lay_out(weight, strides)
    _register_buffers(module, state.down_weight.device)
    set_class(module, patched_class(kind, state.original_class))


def _register_buffers(module: nn.Module, device: torch.device) -> None:
    """Give a module that has its ``cats`` the thresholds of its config, and what counts neurons."""
    cats, config, name = module.cats, module.cats.config, module.cats.name
    thresholds = {"threshold": config.thresholds[name], "down_threshold": config.down_thresholds.get(name)}
    thresholds["input_threshold"] = config.input_thresholds.get(name)
    with torch.inference_mode(False):  # they are written to later, also outside of it
        for name, value in thresholds.items():
            copy = None if value is None else cats.own(value).detach().to(device, torch.float32, copy=True)
            module.register_buffer(name, copy, persistent=False)
        counts = torch.zeros(4 if thresholds["input_threshold"] is not None else 3, dtype=torch.int64, device=device)
        module.register_buffer("counts", counts, persistent=False)


@functools.cache
def patched_class(kind: type[_Kind], original: type[nn.Module]) -> type[_Kind]:
    """``kind`` with all that ``original`` has beside it: a forward of the original finds its methods and its super().

    ``PatchedMLP`` itself computes as ``original`` does.
    """

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # pickle finds no class that is made here
        return _new_patched, (kind, original), vars(self)

    name = original.__name__ if kind is PatchedMLP else kind.__name__
    return type(name, (kind, original), {"__module__": kind.__module__, "__reduce_ex__": __reduce_ex__})


def _new_patched(kind: type[PatchedMLP], original: type[nn.Module]) -> nn.Module:
    made = patched_class(kind, original)
    return made.__new__(made)


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` does, under a hook too; its state stays."""
    module.__class__ = kind
    module.forward_settings = module.forward_settings._replace()  # another object: compiled models see the change
    rebind_forward(module)


def check_own_memory(name: str, weight: Tensor) -> None:
    """Raise ValueError if ``weight`` would be detached from others that have its memory by getting new memory."""
    if type(weight.data) is not Tensor:
        return
    if not _is_whole(weight) and not _is_only_holder(weight):
        size = weight.untyped_storage().nbytes()
        place = f"is a view of a buffer of {size} bytes that other tensors use too"
    elif weight.device.type == "cpu" and weight.is_shared():  # on CUDA always true
        place = "is in memory shared between processes"
    else:
        return
    raise ValueError(
        f"{name} {place}, and another memory layout would detach it: give it memory of its own first "
        "(weight.data = weight.data.clone())"
    )


def _is_whole(weight: Tensor) -> bool:
    """Whether ``weight`` is all that is in its memory."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _is_only_holder(weight: Tensor) -> bool:
    """Whether no other tensor has the memory of ``weight``, and torch allocated it."""
    storage = weight.untyped_storage()
    return storage.resizable() and torch._C._storage_Use_Count(storage._cdata) == 2  # the weight, and the object here


def make_dense(module: nn.Module, layouts: MemoryLayouts) -> None:
    """Turn a :class:`CatsMLP`, whole or half made, back into what it was. Safe to call again if interrupted."""
    state: CatsState | None = vars(module).get("cats")
    if state is None:
        return
    if "forward_settings" in vars(module):
        set_class(module, state.original_class)
        del module.forward_settings
    for name in ("threshold", "down_threshold", "input_threshold", "counts"):
        if name in module._buffers:
            delattr(module, name)
    for weight, strides in state.layouts:
        layouts.lay_out(weight, strides)
    del module.cats
