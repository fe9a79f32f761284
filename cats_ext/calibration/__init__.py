"""Calibration: runs text through a dense model and sets each MLP's thresholds."""

from cats_ext.calibration.run import calibrate

__all__ = ["calibrate"]
