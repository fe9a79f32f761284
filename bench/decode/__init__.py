"""Whole models that generate, and what patching them costs."""
