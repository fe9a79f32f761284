"""The decode engine: one CUDA graph a token."""

from cats_ext.decode.engine import DecodeEngine

__all__ = ["DecodeEngine"]
