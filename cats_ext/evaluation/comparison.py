"""Perplexity of a causal language model over a token sequence, and the comparison of a sparse with the dense model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_ext._inputs import batches_of, check_integer, check_token_ids, evaluation_mode, input_device
from cats_ext._progress import progress_bar
from cats_ext.patching.apply import masking_disabled

_POSITIONS = 256  # with logits in float32 at a time: 128 MB at a vocabulary of 128k


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of a predicted token in nats, its exponential, and the number of tokens."""

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
    batch_size: int = 1,
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
        bos_token_id: put before each window, for models that are trained with it (Llama, Gemma). The first token of
            each window's text is then predicted too.
        batch_size: windows run together; the logits of all of them are in memory.
        progress: show a bar with the time left on standard error.

    Returns:
        The mean negative log-likelihood in nats, its exponential, and how many tokens and windows it is the mean of.

    Raises:
        TypeError, ValueError: ``input_ids`` is no sequence of the model's token ids or has nothing to predict.
    """
    check_integer("batch_size", batch_size, 1)
    windows = _windows(model, input_ids, window, max_windows, bos_token_id)
    batches = batches_of(windows, batch_size)
    device = input_device(model)
    total, tokens = 0.0, 0
    with evaluation_mode(model), progress_bar("perplexity", len(batches), progress) as advance:
        for ids in batches:
            logits = model(input_ids=ids.to(device)).logits[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten().to(logits.device)
            for some, wanted in zip(logits.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
                total += F.cross_entropy(some.float(), wanted.long(), reduction="sum").double().item()
            tokens += len(targets)
            advance()
    return _perplexity(total, tokens, len(windows))


@dataclass(frozen=True)
class Comparison:
    """The sparse and the dense model on the same windows. Standard errors are over windows.

    Attributes:
        dense, sparse: their perplexities.
        nll_increase, nll_increase_se: mean increase of a predicted token's negative log-likelihood in nats, and its
            standard error over windows (NaN with one window).
        kl: mean Kullback-Leibler divergence of the sparse from the dense next-token distribution, nats a position.
        top1: share of positions at which the same token is most probable for both models.
    """

    dense: Perplexity
    sparse: Perplexity
    nll_increase: float
    nll_increase_se: float
    kl: float
    kl_se: float
    top1: float
    top1_se: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)


def compare(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    bos_token_id: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Run every window twice, dense and sparse, and compare what the model predicts. Arguments as :func:`perplexity`.

    Args:
        model: patched by :func:`cats_ext.apply_cats`; the dense run uses the same weights with masking off.

    Returns:
        Both perplexities, the divergence in nats a position and the share of equal top predictions.

    Raises:
        ValueError: as :func:`perplexity`, or the model is not patched.
    """
    windows = _windows(model, input_ids, window, max_windows, bos_token_id)
    device = input_device(model)
    rows = []  # per window: predicted tokens, positions, and sums of nll dense, nll sparse, kl, agreement
    with evaluation_mode(model), progress_bar("dense and sparse", len(windows), progress) as advance:
        for ids in windows:
            with masking_disabled(model):
                dense = model(input_ids=ids[None].to(device)).logits[0]
            sparse = model(input_ids=ids[None].to(device)).logits[0]
            targets = ids[1:].to(dense.device).long()
            sums = torch.zeros(4, dtype=torch.float64)
            for start in range(0, len(dense), _POSITIONS):
                piece = slice(start, start + _POSITIONS)
                wanted = targets[piece]  # one fewer at the end: the last position has none
                p, q = (logits[piece].float().log_softmax(-1) for logits in (dense, sparse))
                nll = (-t[: len(wanted)].gather(1, wanted[:, None]).double().sum() for t in (p, q))
                divergence = (p.exp() * (p - q)).double().sum()
                agree = (p.argmax(-1) == q.argmax(-1)).double().sum()
                sums += torch.stack([*nll, divergence, agree]).cpu()
            rows.append([len(targets), len(dense), *sums.tolist()])
            advance()
    predicted, positions, nll_dense, nll_sparse, divergence, agree = torch.tensor(rows, dtype=torch.float64).unbind(1)
    tokens, count = int(predicted.sum()), len(windows)
    return Comparison(
        _perplexity(float(nll_dense.sum()), tokens, count),
        _perplexity(float(nll_sparse.sum()), tokens, count),
        *_ratio(nll_sparse - nll_dense, predicted),
        *_ratio(divergence, positions),
        *_ratio(agree, positions),
    )


def _windows(
    model: nn.Module, input_ids: Tensor, window: int, max_windows: int | None, bos_token_id: int | None
) -> list[Tensor]:
    """The windows of :func:`perplexity`, each of two tokens or more."""
    check_token_ids("input_ids", input_ids, model)
    if input_ids.dim() != 1 and input_ids.shape[:-1] != (1,):
        raise ValueError(f"input_ids must have shape [T] or [1, T], got {list(input_ids.shape)}")
    check_integer("window", window, 2)
    if max_windows is not None:
        check_integer("max_windows", max_windows, 1)
    bos = input_ids.new_tensor([] if bos_token_id is None else [bos_token_id])
    pieces = input_ids.flatten().split(window - len(bos))[:max_windows]
    windows = [ids for ids in (torch.cat([bos, piece]) for piece in pieces) if len(ids) > 1]
    if not windows:
        raise ValueError(f"input_ids must have at least two tokens, got {input_ids.numel()}")
    return windows


def _perplexity(total: float, tokens: int, windows: int) -> Perplexity:
    nll = total / tokens
    return Perplexity(nll=nll, ppl=math.exp(nll) if nll < 700 else math.inf, tokens=tokens, windows=windows)


def _ratio(sums: Tensor, sizes: Tensor) -> tuple[float, float]:
    """Mean over tokens and its standard error, from sums over windows, by the ratio estimator."""
    mean = float(sums.sum() / sizes.sum())
    n = len(sums)
    if n < 2:
        return mean, math.nan
    residuals = sums - mean * sizes
    return mean, float((residuals.square().sum() * n / (n - 1)).sqrt() / sizes.sum())
