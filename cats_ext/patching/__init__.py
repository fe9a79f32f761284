"""Finds the gated MLPs of a model and makes them sparse in place."""

from cats_ext.patching.apply import apply_cats, apply_relufication, masking_disabled, remove_cats, set_sparsity
from cats_ext.patching.mlp import CatsMLP
from cats_ext.patching.tracking import (
    SparsityDriftWarning,
    SparsityReport,
    reset_sparsity,
    sparsity_report,
    track_sparsity,
)

__all__ = [
    "CatsMLP",
    "SparsityDriftWarning",
    "SparsityReport",
    "apply_cats",
    "apply_relufication",
    "masking_disabled",
    "remove_cats",
    "reset_sparsity",
    "set_sparsity",
    "sparsity_report",
    "track_sparsity",
]
