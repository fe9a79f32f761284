"""Models whose linear layers hold packed rows: how they are made, and how checkpoints describe them."""

from cats_ext.quantization.config import QuantizationConfig
from cats_ext.quantization.convert import convert_quantized
from cats_ext.quantization.run import quantize, quantize_as, quantized_linears

__all__ = ["QuantizationConfig", "convert_quantized", "quantize", "quantize_as", "quantized_linears"]
