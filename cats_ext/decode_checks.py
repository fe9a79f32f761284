"""What the decode engine asks of a model and of its input, and how it notices that a model has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cats_ext._run import check_token_ids
from cats_ext.patching import sparse_mlps

_ATTENTION = ("full_attention", "sliding_attention")


def check_decodable(model: nn.Module) -> None:
    """Raise unless ``model`` is a language model that the engine can decode."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model must be a transformers model that can generate, got {type(model).__name__}")
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: the decode engine takes decoder-only models")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION))
    if other or getattr(config, "num_kv_shared_layers", 0) or not hasattr(config, "num_hidden_layers"):
        what = (
            f"layers of the types {', '.join(other)}" if other else "a cache that is not one of keys and values a layer"
        )
        raise ValueError(f"{name} has {what}: the decode engine takes attention over all tokens or a window of them")
    if model.training:
        raise ValueError(f"model of class {name} is in training mode: call model.eval() first")


def check_inputs(ids: Tensor, mask: Tensor | None, model: nn.Module) -> Tensor | None:
    """The mask on the model's device, or None if nothing is masked."""
    check_token_ids("input_ids", ids, model)
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids must have shape [B, T] with at least one token, got {list(ids.shape)}")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {list(ids.shape)}, got {list(mask.shape)}")
    kept = mask != 0
    if bool(kept.all()):
        return None
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()) or not bool(kept[:, -1].all()):
        raise ValueError("attention_mask must have its zeros on the left of each sequence, and a 1 at its end")
    return mask.to(model.device, torch.int64)


def fingerprint(model: nn.Module) -> tuple:
    """What a captured step has fixed: where weights are and which code runs on them."""
    modules = tuple(
        (
            type(m),
            len(m._forward_hooks) + len(m._forward_pre_hooks),
            getattr(getattr(m, "cats", None), "tracking", None),
        )
        for m in model.modules()
    )
    return modules, tuple((p.data_ptr(), p.stride()) for p in model.parameters())


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """What runs inside does not show in the sparsity report."""
    counts = [(module.counts, module.counts.clone()) for module in sparse_mlps(model).values()]
    try:
        yield
    finally:
        for now, before in counts:
            now.copy_(before)


@contextmanager
def nothing_skipped(model: nn.Module) -> Iterator[None]:
    """Thresholds are 0 inside, in place: rounding then changes no neuron from kept to skipped."""
    buffers = [t for m in sparse_mlps(model).values() for t in (m.threshold, m.down_threshold) if t is not None]
    thresholds = [t.clone() for t in buffers]
    try:
        for buffer in buffers:
            buffer.zero_()
        yield
    finally:
        for buffer, before in zip(buffers, thresholds, strict=True):
            buffer.copy_(before)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
