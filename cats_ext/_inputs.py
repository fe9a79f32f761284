"""Token ids as a model's input: checks, device, BOS token, batches of equal length, evaluation mode, hooks."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_SEED = 2**32 - 1  # NumPy's; PyTorch takes larger ones


def check_integer(name: str, value: int, least: int, most: int = sys.maxsize) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode and there are no gradients; afterwards each has its earlier mode."""
    modes = {module: module.training for module in model.modules()}
    gradients = torch.is_grad_enabled()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        for module, mode in modes.items():
            module.training = mode

    try:
        try:
            model.eval()
            torch.set_grad_enabled(False)  # not no_grad(): its own way out can be interrupted
            yield
        finally:
            put_back()
    finally:  # of an interrupt in or right before the first one
        put_back()


@contextmanager
def hooked(register: Callable[..., Any], hooks: dict[nn.Module, Callable[..., Any]], **options: Any) -> Iterator[None]:
    """Each module has its hook inside. After an interrupt at any place none has, so they are looked up, not held."""

    def remove() -> None:
        for module, hook in hooks.items():
            for registered in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, found in registered.items() if found is hook]:
                    del registered[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)

    try:
        try:
            for module, hook in hooks.items():
                register(module, hook, **options)
            yield
        finally:
            remove()
    finally:  # of an interrupt in or right before the first one
        remove()


def batches_of(windows: Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """``windows`` ``[T]`` stacked to batches ``[B, T]`` of equal length, the longest first; nothing is padded."""
    groups = itertools.groupby(sorted(windows, key=len, reverse=True), key=len)
    return [batch for _, same_length in groups for batch in torch.stack(list(same_length)).split(batch_size)]


def input_device(model: nn.Module) -> torch.device:
    """The device on which ``model`` takes its token ids."""
    return next(_embedding(model).parameters()).device


def check_token_ids(name: str, ids: Tensor, model: nn.Module | None = None) -> None:
    """Check token ids, against the vocabulary of ``model`` if one is given.

    Raises:
        TypeError: ``ids`` is no int64 or int32 tensor.
        ValueError: an id is not in the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor of token ids, got {kind}")
    size = getattr(_embedding(model), "num_embeddings", None) if model is not None else None
    if ids.numel() and size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
        raise ValueError(
            f"{name} has token id {wrong}, but the model's vocabulary has {size} entries: is this its tokenizer?"
        )


def weights_digest(model: nn.Module) -> str:
    """A SHA-256 of some values of every parameter: another one is of other weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.numel():
            row = parameter.detach()[(0,) * (parameter.dim() - 1)].reshape(-1)[:16]  # no copy of the whole
            digest.update(row.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def window_bos(tokenizer: Any) -> int | None:
    """The BOS token if ``tokenizer`` starts every text with it, as the model then was trained to see it; else None."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else None


def _embedding(model: nn.Module) -> nn.Module:
    """The input embedding of a transformers model, else the model itself."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
