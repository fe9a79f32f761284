"""The searched allocation of a budget, kept only if the model's predictions confirm it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from cats_ext.data.windows import sample_windows
from cats_ext.evaluation.comparison import compare
from cats_ext.patching.apply import apply_cats, remove_cats, sparse_mlps
from cats_ext.thresholds.allocation import LossTable
from cats_ext.thresholds.config import CatsConfig

CHECK_TOKENS = 4096  # on which the searched and the uniform allocation are compared


def search_allocation(model: nn.Module, uniform: CatsConfig, losses: LossTable, windows: list[Tensor]) -> CatsConfig:
    """``uniform`` with the allocation that ``losses`` leads to, or as it is where that one predicts no better.

    Either way the entry ``calibration["search"]`` has the divergence from the dense ``model`` with each of them, in
    nats a position: ``uniform_kl`` and ``searched_kl``, measured on some of the ``windows``.
    """
    searched = replace(uniform, losses=losses).at_sparsity(uniform.sparsity)
    text = [ids for ids in sample_windows(windows, CHECK_TOKENS) if len(ids) > 1]
    kl_by_allocation = {f"{name}_kl": _kl(model, c, text) for name, c in (("uniform", uniform), ("searched", searched))}
    chosen = searched if kl_by_allocation["searched_kl"] < kl_by_allocation["uniform_kl"] else uniform
    return replace(chosen, calibration=uniform.calibration | {"search": kl_by_allocation})


def _kl(model: nn.Module, config: CatsConfig, windows: list[Tensor]) -> float:
    """Mean over all positions of the divergence from the dense model, in nats; 0 without windows."""

    def remove() -> None:
        if sparse_mlps(model):
            remove_cats(model)

    try:
        try:
            apply_cats(model, config)
            sums = [len(ids) * compare(model, ids, window=len(ids), progress=False).kl for ids in windows]
        finally:
            remove()
    finally:  # of an interrupt in or right before the first one
        remove()
    return sum(sums) / max(1, sum(map(len, windows)))
