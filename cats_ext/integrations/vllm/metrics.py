"""The sparsity that a server's MLPs reach, on its page of metrics: ``vllm serve ... --middleware`` and this class."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import Gauge

from cats_ext.integrations.vllm.control import report_of

# The newest value also where several API servers write to common files.
_NEWEST: dict[str, Any] = {"multiprocess_mode": "mostrecent"}
_OPTIONS: dict[str, Any] = {"labelnames": ("layer",)} | _NEWEST
_COUNTS = '1 if the engine counts rows, for which it needs --additional-config \'{"cats": {"count": true}}\', else 0'
COUNTING = Gauge("cats_counting", _COUNTS, **_NEWEST)
UP = Gauge("cats_up_sparsity", "Share of the rows of up_proj that were not read, since counting began", **_OPTIONS)
DOWN = Gauge("cats_down_sparsity", "Share of the rows of down_proj that were not read, likewise", **_OPTIONS)
TOKENS = Gauge("cats_counted_tokens", "Rows of the batches that were counted, padding included", **_OPTIONS)


class SparsityMetrics:
    """ASGI middleware that asks the workers when ``/metrics`` is read, and does nothing at any other request."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await update(scope["app"].state.engine_client)
        await self.app(scope, receive, send)


async def update(engine: Any) -> None:
    """Set the gauges to what the workers of an ``AsyncLLM`` have counted; without anything counted they stay."""
    counted = await engine.collective_rpc("cats_sparsity")
    COUNTING.set(any(counted))
    try:
        report = report_of(counted)
    except ValueError:  # nothing has been counted yet
        return
    for layer in report.layers:
        UP.labels(layer.name).set(layer.up_sparsity)
        DOWN.labels(layer.name).set(layer.down_sparsity)
        TOKENS.labels(layer.name).set(layer.tokens)
