"""The key-value cache of the decode engine: allocated once, written in place, at a fixed address for CUDA graphs.

Outside a step it acts as transformers' dynamic cache: the host knows its length and ``update`` returns the filled part,
so that a prompt runs attention kernels without a mask. Inside a captured step it acts as a static cache: the position
is read from device memory, ``update`` returns the whole length, and transformers masks the empty part.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin


class DecodeLayer(CacheLayerMixin):
    """Keys and values ``[B, KV heads, L, D]`` of one layer. The attention applies sliding windows."""

    is_sliding = False

    def __init__(self, cache: DecodeCache) -> None:
        super().__init__()
        self.cache = cache

    @property
    def is_compileable(self) -> bool:
        return self.cache.position is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, like in (("keys", key_states), ("values", value_states)):
            batch, heads, _, size = like.shape
            setattr(self, name, like.new_zeros(batch, heads, self.cache.max_length, size))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.position is not None:
            self.keys.index_copy_(2, self.cache.position, key_states)
            self.values.index_copy_(2, self.cache.position, value_states)
            return self.keys, self.values
        start, count = self.cache.length, key_states.shape[-2]
        self.keys[:, :, start : start + count] = key_states
        self.values[:, :, start : start + count] = value_states
        return self.keys[:, :, : start + count], self.values[:, :, : start + count]

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        if self.cache.position is not None:
            return self.cache.max_length, 0
        count = query if isinstance(query, int) else query.shape[0]  # transformers 5.0: all positions
        return self.cache.length + count, 0

    def get_seq_length(self) -> int | Tensor:
        return self.cache.length if self.cache.position is None else self.cache.position

    def get_max_length(self) -> int:
        return self.cache.max_length

    get_max_cache_shape = get_max_length  # its name in transformers 5.0


class DecodeCache(Cache):
    """One :class:`DecodeLayer` a layer, for ``max_length`` tokens each, of which ``length`` are filled.

    ``position`` (int64 ``[1]`` on the device) is the token's place while a step runs, and otherwise None.
    """

    def __init__(self, layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.position: Tensor | None = None
        super().__init__(layers=[DecodeLayer(self) for _ in range(layers)])

    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of ``model.forward``: ``cache`` since transformers 5.24."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters and "past_key_values" not in parameters else "past_key_values"
