"""Thresholds: how they follow from what calibration counted, and the files they are kept in."""

from cats_ext.thresholds.config import CatsConfig

__all__ = ["CatsConfig"]
