"""Perplexity of a causal language model over a token sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_ext._run import check_token_ids, evaluation_mode, input_device, progress_bar

_POSITIONS = 256  # whose logits are turned to float32 together: 128 MB at a vocabulary of 128k


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of a predicted token in nats, its exponential, and how much it is the mean of."""

    nll: float
    ppl: float
    tokens: int
    windows: int


def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    bos_token_id: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity over non-overlapping windows of ``input_ids``; the first token of a window is not predicted.

    The log-softmax is computed in float32 whatever the model's dtype, and the sum in float64. A last, shorter window
    counts if it predicts at least one token.

    Args:
        model: maps ``input_ids`` to an output with ``logits``, as transformers' causal language models do.
        input_ids: integer ``[T]`` or ``[1, T]``.
        window: tokens of a window, with the BOS token if there is one.
        max_windows: use only the first so many windows.
        bos_token_id: put before each window, for models that are trained with it (Llama, Gemma); then the first token
            of the text is predicted too.
        progress: show a bar with the time left on standard error.

    Raises:
        TypeError, ValueError: ``input_ids`` is no sequence of the model's token ids or has nothing to predict.
    """
    check_token_ids("input_ids", input_ids, model)
    if input_ids.dim() != 1 and input_ids.shape[:-1] != (1,):
        raise ValueError(f"input_ids must have shape [T] or [1, T], got {list(input_ids.shape)}")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}")
    device = input_device(model)
    bos = input_ids.new_tensor([] if bos_token_id is None else [bos_token_id])
    pieces = input_ids.flatten().split(window - len(bos))[:max_windows]
    windows = [ids for ids in (torch.cat([bos, piece]) for piece in pieces) if len(ids) > 1]
    if not windows:
        raise ValueError(f"input_ids must have at least two tokens, got {input_ids.numel()}")
    total, tokens = 0.0, 0
    with evaluation_mode(model), progress_bar("perplexity", len(windows), progress) as advance:
        for ids in windows:
            logits = model(input_ids=ids[None].to(device)).logits[0, :-1]
            targets = ids[1:].to(logits.device)
            for some, wanted in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
                total += F.cross_entropy(some.float(), wanted.long(), reduction="sum").double().item()
            tokens += len(targets)
            advance()
    nll = total / tokens
    return Perplexity(nll=nll, ppl=math.exp(nll), tokens=tokens, windows=len(windows))
