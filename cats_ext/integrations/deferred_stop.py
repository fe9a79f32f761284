"""transformers' ``generate`` on CUDA without a wait for the GPU at every token.

Before each forward, ``generate`` reads from the GPU whether all sequences have ended. Until the answer is there the
host prepares nothing, and then the GPU waits for the host. From version 5.17 on transformers can read the answer a step
late (``DeferredStopCheck``), at the price of one forward more after an end-of-text token; it does so on MPS only.
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
    """Let transformers' ``generate`` learn a step late, on CUDA, that it has come to the end, so that it never waits.

        with cats_ext.deferred_stop():
            output = model.generate(**inputs, cache_implementation="static")

    For greedy decoding and sampling of any model, patched or not. The output is the same, streamers get each token a
    step later, and a cache that ``generate`` returns is as it would have been. With one that was passed in and cannot
    go back a step (a static one with a sliding window), ``generate`` waits as ever. A sampled sequence that ends early
    has drawn one random number more. What one thread enters holds for all threads.

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
    """transformers' class, for ``DEVICES`` too, and for static caches, which it cannot take back by a step."""
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
                layer.cumulative_length.sub_(steps)  # what lies behind it is written anew
            return steps

    return DeferredStopCheck
