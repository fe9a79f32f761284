"""What the benchmark changes in vLLM's workers, which import this before they load a model.

Whoever starts vLLM must not import it: a forked worker would find it imported, with nothing changed.
"""

from __future__ import annotations

import os

from bench.serving.engine import LIMIT
from cats_ext.ops import dispatch

if LIMIT in os.environ:
    dispatch.MAX_SERVED_TOKENS, dispatch.MAX_SERVED_ROW = int(os.environ[LIMIT]), 1 << 30


class Extension:
    """For vLLM's ``worker_extension_cls``."""

    def max_served_tokens(self) -> int:
        return dispatch.MAX_SERVED_TOKENS
