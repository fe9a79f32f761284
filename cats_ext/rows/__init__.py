"""Packed rows: the weights of a gated MLP in int4, int8 or fp8, each neuron's row with its own scales."""

from cats_ext.rows.formats import FORMATS, Fields, RowFormat
from cats_ext.rows.linear import QuantizedLinear
from cats_ext.rows.rounding import quantize_rows

__all__ = ["FORMATS", "Fields", "QuantizedLinear", "RowFormat", "quantize_rows"]
