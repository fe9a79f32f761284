"""What can be asked of a running engine: another sparsity, and the sparsity that it reaches.

Every worker process has the thresholds and the statistics of its calibration, so only numbers are sent to it. The
methods that are called there are in worker.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any

from cats_ext.patching.tracking import LayerSparsity, SparsityReport
from cats_ext.thresholds.rules import check_sparsity


def set_sparsity(engine: Any, sparsity: float, *, down_sparsity: float | None = None) -> Awaitable[None] | None:
    """Change how sparse a running engine is, as :func:`cats_ext.set_sparsity` does: no restart, no new graphs.

    Requests in progress are computed anew up to where they are, with the new thresholds, and cached prefixes are
    forgotten: keys and values depend on the thresholds. Speculative decoding's draft model stays as it is.

    Args:
        engine: a ``vllm.LLM``, or an ``AsyncLLM``, for which the result has to be awaited.
        sparsity, down_sparsity: as for :meth:`cats_ext.CatsConfig.at_sparsity`.

    Raises:
        TypeError, ValueError: a sparsity is out of its range. What only the workers find, such as a config without
            statistics, vLLM raises as an exception of its own, with their message; the thresholds are then unchanged.
    """
    for name, value in (("sparsity", sparsity), ("down_sparsity", down_sparsity)):
        if value is not None or name == "sparsity":
            check_sparsity(name, value)
    arguments = (sparsity, down_sparsity)
    if inspect.iscoroutinefunction(engine.collective_rpc):
        return _set_sparsity_async(engine, arguments)
    engine.collective_rpc("cats_set_sparsity", args=arguments)
    engine.reset_prefix_cache(reset_running_requests=True)
    return None


async def _set_sparsity_async(engine: Any, arguments: tuple[float, float | None]) -> None:
    await engine.collective_rpc("cats_set_sparsity", args=arguments)
    await engine.reset_prefix_cache(reset_running_requests=True)


def sparsity_report(engine: Any) -> SparsityReport | Awaitable[SparsityReport]:
    """The sparsity that the engine's MLPs have reached since the last :func:`reset_sparsity`, over all its workers.

    The engine has to be started with ``additional_config={"cats": {"count": True}}``, on a command line
    ``--additional-config '{"cats": {"count": true}}'``: graphs that have been captured cannot begin to count. Every row
    that is computed counts, those too with which vLLM fills a batch up to a captured size.

    Args:
        engine: a ``vllm.LLM``, or an ``AsyncLLM``, for which the result has to be awaited.

    Raises:
        ValueError: nothing has been counted.
    """
    found = engine.collective_rpc("cats_sparsity")
    return _report_async(found) if inspect.isawaitable(found) else report_of(found)


async def _report_async(found: Awaitable[list[dict[str, Any]]]) -> SparsityReport:
    return report_of(await found)


def report_of(workers: list[dict[str, Any]]) -> SparsityReport:
    """What :func:`sparsity_report` makes of the workers' answers to ``cats_sparsity``."""
    layers: dict[str, dict[str, Any]] = {}
    for worker in workers:
        for name, layer in worker.items():
            known = layers.setdefault(name, {**layer, "counts": [0, 0, 0]})
            known["counts"] = [a + b for a, b in zip(known["counts"], layer["counts"], strict=True)]
    if not layers or not all(layer["counts"][0] for layer in layers.values()):
        raise ValueError(
            'no token has been counted: start the engine with additional_config={"cats": {"count": True}}, and run it'
        )
    report = []
    for name, layer in layers.items():
        evaluated, kept_up, kept_down = layer.pop("counts")
        neurons, matrix_bytes = layer.pop("intermediate_size"), tuple(layer.pop("matrix_bytes"))
        report.append(
            LayerSparsity(
                name=name,
                tokens=evaluated // neurons,
                matrix_bytes=matrix_bytes,
                up_sparsity=1 - kept_up / evaluated,
                down_sparsity=1 - kept_down / evaluated,
                **layer,
            )
        )
    return SparsityReport(report)


def reset_sparsity(engine: Any) -> Awaitable[Any] | None:
    """Forget what has been counted. Of an ``AsyncLLM`` the result has to be awaited."""
    done = engine.collective_rpc("cats_reset_sparsity")
    return done if inspect.isawaitable(done) else None
