"""Text of any length in bounded memory: cut into parts, of which a calibration draws as many as it can need."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator

PART = 1 << 20  # characters that are tokenised at once: a tokenizer takes far more memory than its text
_CHARACTERS_A_TOKEN = 64  # many more than any tokenizer's average, so a sample has more tokens than are used


def cut_text(text: str, size: int) -> Iterator[str]:
    """``text`` in parts of at most ``size`` characters, cut before white space where there is some."""
    start = 0
    while len(text) - start > size:
        half, end = start + size // 2, start + size
        space = max(text.rfind(" ", half, end), text.rfind("\n", half, end))
        yield text[start : (end := space if space > start else end)]
        start = end
    yield text[start:]


def sample_size(max_tokens: int) -> int:
    """How many characters a calibration on ``max_tokens`` tokens draws its windows from."""
    return max(PART, _CHARACTERS_A_TOKEN * max_tokens)


def sample_texts(parts: Iterable[tuple[int, str]], max_tokens: int, sequence_length: int, seed: int) -> list[str]:
    """All texts if they have no more characters than :func:`sample_size`, else random pieces of them, in their order.

    Reads the texts once and holds no more than the result.

    Args:
        parts: consecutive parts of the texts, each with the number of its text.
        max_tokens, sequence_length: of the calibration; pieces have the text of several windows.
        seed: chooses the pieces.
    """
    room = sample_size(max_tokens)
    size = min(16 * sequence_length, room // 16)
    draw = random.Random(seed)
    kept: list[tuple[float, int, int, str]] = []  # a heap of (-key, place, number of the text, piece)
    total, limit = 0, 1.0  # characters kept; pieces with this key or a larger one are dropped
    pieces = ((number, piece) for number, part in parts for piece in cut_text(part, size))
    for place, (number, piece) in enumerate(pieces):
        key = draw.random()
        if piece and key < limit:
            heapq.heappush(kept, (-key, place, number, piece))
            total += len(piece)
        while total > room:
            negative, _, _, dropped = heapq.heappop(kept)
            total, limit = total - len(dropped), -negative
    joined: list[list[str]] = []
    before = (-1, -1)
    for _, place, number, piece in sorted(kept, key=lambda item: item[1]):
        if (place - 1, number) != before:
            joined.append([])
        joined[-1].append(piece)
        before = (place, number)
    return ["".join(pieces) for pieces in joined]
