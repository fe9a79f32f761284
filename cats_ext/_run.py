"""What calibration and evaluation share: evaluation mode and its undoing, where inputs go, a bar with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        complete(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])


def complete(action: Callable[[], object]) -> None:
    """Run ``action``. If it is interrupted, run it again, to its end, before the exception is passed on."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on standard error; yields the function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def note(message: str) -> None:
    """A line on standard error, where the bars are."""
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)


def input_device(model: nn.Module) -> torch.device:
    """The device on which ``model`` takes its token ids."""
    return next(_embedding(model).parameters()).device


def check_token_ids(name: str, ids: Tensor, model: nn.Module | None = None) -> None:
    """Raise unless ``ids`` is an integer tensor whose values are in the model's vocabulary."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be an integer tensor of token ids, got {kind}")
    size = getattr(_embedding(model), "num_embeddings", None) if model is not None else None
    if ids.numel() and size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
        raise ValueError(
            f"{name} has token id {wrong}, but the model's vocabulary has {size} entries: is this its tokenizer?"
        )


def _embedding(model: nn.Module) -> nn.Module:
    """The input embedding of a transformers model, else the model itself."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
