"""cats_ext: activation sparsity (CATS, arXiv 2404.08763) for gated MLPs, as fused CPU and CUDA kernels."""

from typing import TYPE_CHECKING, Any

from cats_ext import evaluation, functional, ops
from cats_ext._version import __version__
from cats_ext.calibration.run import calibrate
from cats_ext.integrations import register_with_transformers
from cats_ext.integrations.deferred_stop import deferred_stop
from cats_ext.ops import experts as expert_ops
from cats_ext.patching.apply import apply_cats, apply_relufication, masking_disabled, remove_cats, set_sparsity
from cats_ext.patching.exact.apply import apply_exact
from cats_ext.patching.mlp import CatsMLP
from cats_ext.patching.tracking import (
    SparsityDriftWarning,
    SparsityReport,
    reset_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.quantization import QuantizationConfig, convert_quantized, quantize
from cats_ext.thresholds.config import CatsConfig

if TYPE_CHECKING:
    from cats_ext.decode.engine import DecodeEngine

__all__ = [
    "CatsConfig",
    "CatsMLP",
    "DecodeEngine",
    "QuantizationConfig",
    "SparsityDriftWarning",
    "SparsityReport",
    "__version__",
    "apply_cats",
    "apply_exact",
    "apply_relufication",
    "calibrate",
    "convert_quantized",
    "deferred_stop",
    "evaluation",
    "expert_ops",
    "functional",
    "masking_disabled",
    "ops",
    "quantize",
    "remove_cats",
    "reset_sparsity",
    "set_sparsity",
    "sparsity_report",
    "track_sparsity",
]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "DecodeEngine":  # on demand: it imports most of transformers
        from cats_ext.decode.engine import DecodeEngine

        return DecodeEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
