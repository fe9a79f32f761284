"""cats_ext: activation sparsity (CATS, arXiv 2404.08763) for gated MLPs, as fused CPU and CUDA kernels."""

from cats_ext import ops
from cats_ext._version import __version__

__all__ = ["__version__", "ops"]
