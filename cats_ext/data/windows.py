"""From text or token ids to the windows that calibration runs on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cats_ext._inputs import check_token_ids, window_bos
from cats_ext.data.texts import PART, cut_text, sample_size, sample_texts

MIN_TOKENS = 128  # too few for a distribution are refused; some thousands are advisable


def collect_windows(data: Any, tokenizer: Any, sequence_length: int, max_tokens: int, seed: int) -> list[Tensor]:
    """Windows of at most ``sequence_length`` token ids, ``max_tokens`` tokens in all.

    Texts are tokenised without special tokens, joined and cut into windows; where the tokenizer starts its sequences
    with a BOS token, so does every window. Token tensors are sequences of their own: one longer than a window is cut, a
    shorter one stays as it is, and positions with attention mask 0 are left out.

    Of a text, a tensor, a mapping or a sequence with more than ``max_tokens`` tokens, ``seed`` chooses the windows; of
    texts with more than 64 characters for each of them, it first chooses parts, and only these are tokenised. Any other
    iterable is read in its order, and only as far as needed. So memory grows with ``max_tokens``, not with the text.

    Args:
        data: as for :func:`cats_ext.calibrate`.
        tokenizer: called for texts; None where there are none.

    Returns:
        int64 tensors ``[T]`` on the CPU.

    Raises:
        TypeError: an element of ``data`` is none of the above, or texts come without a tokenizer.
        ValueError: fewer than 128 tokens in all.
    """
    texts = [data] if isinstance(data, str) else data if isinstance(data, Sequence) else []
    if all(isinstance(text, str) for text in texts) and sum(map(len, texts)) > sample_size(max_tokens):
        data = sample_texts(enumerate(texts), max_tokens, sequence_length, seed)
    windows: Iterable[Tensor] = _windows(data, tokenizer, sequence_length)
    if isinstance(data, (str, Tensor, Mapping, Sequence)):
        windows = list(windows)
        if sum(len(window) for window in windows) > max_tokens:
            random.Random(seed).shuffle(windows)
    chosen: list[Tensor] = []
    tokens = 0
    for window in windows:
        chosen.append(window[: max_tokens - tokens])
        tokens += len(chosen[-1])
        if tokens == max_tokens:
            break
    if tokens < MIN_TOKENS:
        limit = f" (max_tokens is {max_tokens})" if tokens == max_tokens else ""
        raise ValueError(f"data must have at least {MIN_TOKENS} tokens, and better some thousands, got {tokens}{limit}")
    return chosen


def sample_windows(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """Evenly spaced windows that hold about ``tokens`` tokens together; at least one of them, at most all."""
    count = min(len(windows), math.ceil(tokens * len(windows) / sum(map(len, windows))))
    return [windows[i * len(windows) // count] for i in range(count)]


def _windows(data: Any, tokenizer: Any, sequence_length: int) -> Iterator[Tensor]:
    if isinstance(data, (str, Tensor, Mapping)):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a text, or an iterable of texts or token ids, got {type(data).__name__}")
    bos = [token for token in (window_bos(tokenizer),) if token is not None]
    room = sequence_length - len(bos)
    if room < 1:
        raise ValueError(f"sequence_length must leave room for text after the BOS token, got {sequence_length}")
    pending: list[int] = []  # tokens of text that do not fill a window yet
    for item in data:
        if isinstance(item, str):
            for part in cut_text(item, PART):
                pending += _tokenise(part, tokenizer)
                full = len(pending) // room * room
                for i in range(0, full, room):
                    yield torch.tensor(bos + pending[i : i + room])
                pending = pending[full:]
        else:
            for row in _rows(item):
                yield from row.split(sequence_length)
    if pending:
        yield torch.tensor(bos + pending)


def _tokenise(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise TypeError("tokenizer must be given when data is text, got None")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _rows(item: Any) -> Iterator[Tensor]:
    """The unpadded sequences of one batch of token ids."""
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise TypeError(f"data has a mapping without input_ids; its keys are {', '.join(map(str, item))}")
        item, mask = item["input_ids"], item.get("attention_mask")
    check_token_ids("data", item)
    if item.dim() not in (1, 2):
        raise ValueError(f"data must have token ids of shape [T] or [B, T], got {list(item.shape)}")
    if mask is not None and mask.shape != item.shape:
        raise ValueError(
            f"data must have attention_mask in the shape of input_ids {list(item.shape)}, got {list(mask.shape)}"
        )
    rows: Iterable[Tensor] = torch.atleast_2d(item)
    if mask is not None:
        rows = (ids[kept] for ids, kept in zip(rows, torch.atleast_2d(mask.bool()), strict=True))
    yield from (ids.long().cpu() for ids in rows if len(ids))
