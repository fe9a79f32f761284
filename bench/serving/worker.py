"""What the benchmark changes in vLLM's workers, which import this before they load a model."""

from __future__ import annotations

import os

from cats_ext.ops import dispatch

LIMIT = "BENCH_MAX_SERVED_TOKENS"
if LIMIT in os.environ:
    dispatch.MAX_SERVED_TOKENS, dispatch.MAX_SERVED_ROW = int(os.environ[LIMIT]), 1 << 30


class Extension:
    """For vLLM's ``worker_extension_cls``; importing this module has done it all."""
