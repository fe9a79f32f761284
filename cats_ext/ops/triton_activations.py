"""The activation functions of gated MLPs as a Triton function, for the kernels of experts and of the decode step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """``act(gate)`` of float32 values; NaN gives NaN, as in PyTorch."""
    if ACTIVATION == "silu":
        return gate / (1 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * (1 - 1 / (1 + tl.exp(2 * inner)))
    else:  # relu; tl.maximum(NaN, 0) would be 0
        return tl.where(gate < 0, 0.0, gate)
