"""Finds the gated MLPs of a model and makes them sparse in place."""

from cats_ext.patching.apply import apply_cats, apply_relufication, masking_disabled, remove_cats, set_sparsity

__all__ = ["apply_cats", "apply_relufication", "masking_disabled", "remove_cats", "set_sparsity"]
