"""What a worker process of vLLM can be asked to do, by the names with which ``collective_rpc`` calls its methods."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.worker_base import WorkerBase

from cats_ext.integrations.vllm.mlp import ServedMLP


def add_to_workers() -> None:
    """Give every worker the methods below: vLLM finds them by name, on whichever device a worker is."""
    for method in (cats_set_sparsity, cats_sparsity, cats_reset_sparsity):
        setattr(WorkerBase, method.__name__, method)


def cats_set_sparsity(self: WorkerBase, sparsity: float, down_sparsity: float | None = None) -> None:
    """Overwrite this worker's part of the thresholds in place, which captured graphs read."""
    served = _served(self)
    config = served[0].served.at_sparsity(sparsity, down_sparsity)
    for mlp in served:
        mlp.set_thresholds(config)


def cats_sparsity(self: WorkerBase) -> dict[str, dict[str, Any]]:
    """What was counted in this worker's part of each MLP, and what was aimed at, by name."""
    return {mlp.served.name: mlp.counted() for mlp in _served(self) if mlp.counts is not None}


def cats_reset_sparsity(self: WorkerBase) -> None:
    for mlp in _served(self):
        if mlp.counts is not None:
            mlp.counts.zero_()


def _served(worker: WorkerBase) -> list[ServedMLP]:
    found = [module for module in worker.get_model().modules() if isinstance(module, ServedMLP)]
    if not found:
        raise ValueError("the model that is served has no thresholds: it is no CATS checkpoint")
    return found
