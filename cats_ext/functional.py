"""The sparse gated MLP as a function of its tensors: a sparse kernel for few tokens, masked dense products for many.

``cats_ext.ops.dispatch`` decides between the two and holds the measured limits, which are named here as well.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops.definitions import masked_product
from cats_ext.ops.dispatch import (
    KERNEL,
    MAX_EXPERT_TOKENS,
    MAX_KERNEL_TOKENS,
    Operands,
    Projections,
    choose,
    kernel_fits,
    needs_grad,
)

__all__ = ["MAX_EXPERT_TOKENS", "MAX_KERNEL_TOKENS", "kernel_fits", "masked_product", "needs_grad", "sparse_mlp"]


def sparse_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """``y = h Wd`` with ``h = act(x Wg) * (x Wu)``, of which only the neurons above their thresholds are used.

    A neuron j is kept if ``|act(g_j)| >= threshold_j`` and, where given, ``|h_j| >= down_threshold_j`` (CATS, arXiv
    2404.08763, eq. 2 to 5; the second test is an extension). A threshold of 0 keeps every neuron. For few tokens,
    without gradients, the sparse kernel reads the weights of kept neurons only; otherwise the dense masked path runs.
    Forward-mode derivatives and torch.func's transforms take that path too. ``torch.ops.cats.sparse_mlp`` itself has no
    backward, and PyTorch warns there; the tangents of ``torch.autograd.forward_ad`` it drops.
    Under ``torch.use_deterministic_algorithms(True)`` the kernel gives the same bits in every run. For more than two
    tokens on CUDA, a NaN or infinite weight of a neuron that one of them keeps reaches the others, as in dense layers.

    Args:
        x: ``[..., H]``, float32, float16 or bfloat16 (float64 takes the dense path).
        w_gate, w_up: ``[I, H]``, as in ``nn.Linear``; the row stride may exceed H.
        w_down_t: ``[I, H]``, the down projection with one contiguous row a neuron: ``down_proj.weight.t()`` of a
            weight stored that way. Any other layout takes the dense path.
        threshold, down_threshold: float32, ``[]`` or ``[I]``, on x's device.
        activation: silu, gelu, gelu_tanh or relu.
        gate_bias, up_bias, down_bias: ``[I]``, ``[I]``, ``[H]``.
        counts: int64 ``[3]``, added to: token-neuron pairs evaluated, kept by ``threshold``, kept by both.

    Returns:
        ``[..., H]`` in x's dtype.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    tensors = (w_gate, w_up, w_down_t), (gate_bias, up_bias, down_bias)
    implementation, operands = choose(x, w_down_t.shape[-1], _Tensors, tensors)
    if implementation == KERNEL:
        return _Tensors.kernel(x, operands, (threshold, down_threshold, activation), counts)
    gate, up = _Tensors.gate_up(tensors, x)
    return _Tensors.down(tensors, masked_product(gate, up, threshold, down_threshold, activation, counts))


class _Tensors(Projections):
    """Weights and biases that are passed as arguments; the source is the operands themselves."""

    @staticmethod
    def operands(source: Operands) -> Operands | None:
        return source if source[0][2].stride(-1) == 1 else None

    @staticmethod
    def gate_up(source: Operands, x: Tensor) -> tuple[Tensor, Tensor]:
        (w_gate, w_up, _), (gate_bias, up_bias, _) = source
        return F.linear(x, w_gate, gate_bias), F.linear(x, w_up, up_bias)

    @staticmethod
    def down(source: Operands, h: Tensor) -> Tensor:
        return F.linear(h, source[0][2].t(), source[1][2])
