"""cats_ext: activation sparsity (CATS, arXiv 2404.08763) for gated MLPs, as fused CPU and CUDA kernels."""

from typing import TYPE_CHECKING, Any

from cats_ext import evaluation, expert_ops, functional, ops
from cats_ext._version import __version__
from cats_ext.calibration import calibrate
from cats_ext.config import CatsConfig
from cats_ext.integrations import register_with_transformers
from cats_ext.integrations.stopping import deferred_stop
from cats_ext.modules import CatsMLP
from cats_ext.patching import apply_cats, apply_relufication, masking_disabled, remove_cats, set_sparsity
from cats_ext.report import SparsityDriftWarning, SparsityReport, reset_sparsity, sparsity_report, track_sparsity

if TYPE_CHECKING:
    from cats_ext.decode import DecodeEngine

__all__ = [
    "CatsConfig",
    "CatsMLP",
    "DecodeEngine",
    "SparsityDriftWarning",
    "SparsityReport",
    "__version__",
    "apply_cats",
    "apply_relufication",
    "calibrate",
    "deferred_stop",
    "evaluation",
    "expert_ops",
    "functional",
    "masking_disabled",
    "ops",
    "remove_cats",
    "reset_sparsity",
    "set_sparsity",
    "sparsity_report",
    "track_sparsity",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "DecodeEngine":  # on demand: it imports most of transformers
        from cats_ext.decode import DecodeEngine

        return DecodeEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
