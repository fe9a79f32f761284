"""Texts and token ids as windows for a model: what calibration, tuning and rounding run on."""
