"""transformers' ``generate`` on CUDA without a wait for the GPU at every token.

Before each forward, ``generate`` reads from the GPU whether all sequences have ended. The host waits for the answer,
and the GPU then waits for the host to launch the next forward. From version 5.17 on transformers can read the answer
one step late (``DeferredStopCheck``), which costs one more forward after an end-of-text token; it does so on MPS only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICES = {"cuda"}  # beside those on which transformers defers by itself

_lock = threading.Lock()
_users = 0
_original: Any = None


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Let transformers' ``generate`` check one step late, on CUDA, whether it has ended, so that it does not wait.

        with cats_ext.deferred_stop():
            output = model.generate(**inputs, cache_implementation="static")

    For greedy decoding and sampling of any model, patched or not. The output and a returned cache are the same, and
    streamers get each token one step later. With a cache that was passed in and cannot be shortened by one step (a
    static one with a sliding window), ``generate`` waits as without this context. A sampled sequence that ends early
    has drawn one more random number. While one thread is in the context, it holds for all threads.

    Raises:
        RuntimeError: transformers is older than 5.17, or has changed so that it cannot be done.
    """
    import transformers
    from transformers.generation import utils

    global _users, _original
    if not hasattr(utils, "DeferredStopCheck"):
        raise RuntimeError(f"deferred_stop() needs transformers 5.17 or newer, found {transformers.__version__}")
    with _lock:
        if _users == 0:
            _original, utils.DeferredStopCheck = utils.DeferredStopCheck, _deferred_stop_check(utils.DeferredStopCheck)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                utils.DeferredStopCheck = _original


def _deferred_stop_check(base: type) -> type:
    """transformers' class, also for ``DEVICES`` and for static caches, which transformers cannot shorten."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    class DeferredStopCheck(base):  # type: ignore[misc,valid-type]
        def __init__(
            self, input_ids: torch.Tensor, max_length: int, cache: Any, cache_is_returned: bool, streamer: Any = None
        ) -> None:
            self.static = cache if cache_is_returned and DeferredStopCheck.is_static(cache) else None
            super().__init__(input_ids, max_length, cache, cache_is_returned and self.static is None, streamer)

        @staticmethod
        def is_static(cache: Any) -> bool:
            return isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers)

        @staticmethod
        def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
            if device.type not in DEVICES or is_assistant:
                return base.is_supported(device, cache, cache_is_returned, is_assistant)
            return not cache_is_returned or cache is None or cache.is_croppable or DeferredStopCheck.is_static(cache)

        def finish(self) -> int:
            steps = super().finish()
            for layer in self.static.layers if self.static is not None and steps else ():
                layer.cumulative_length.sub_(steps)  # the next token overwrites the entry after it
            return steps

    return DeferredStopCheck
