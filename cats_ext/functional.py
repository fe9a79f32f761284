"""The sparse gated MLP as a function of its tensors: a sparse kernel for few tokens, masked dense products for many.

``cats_ext.ops.dispatch`` decides between the two and holds the measured limits, which are named here as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops.definitions import masked_product
from cats_ext.ops.dispatch import (
    KERNEL,
    MAX_EXPERT_TOKENS,
    MAX_KERNEL_TOKENS,
    ColumnsOfGate,
    Operands,
    Projections,
    choose,
    column_rows_fit,
    kernel_fits,
    needs_grad,
)

__all__ = [
    "MAX_EXPERT_TOKENS",
    "MAX_KERNEL_TOKENS",
    "kernel_fits",
    "masked_product",
    "needs_grad",
    "sparse_mlp",
    "sparse_mlp_columns",
]


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
    mask = threshold, down_threshold, activation
    if implementation == KERNEL:
        return _Tensors.kernel(x, operands, mask, counts)
    return _Tensors.down(tensors, _Tensors.hidden(tensors, x, mask, counts))


def sparse_mlp_columns(
    x: Tensor,
    w_gate_t: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    input_threshold: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """As :func:`sparse_mlp`, with a gate that sees only the larger inputs: ``g = sum of x_i Wg_i over |x_i| >= t``.

    Inputs below ``input_threshold`` count as zero for the gate; ``u = x Wu`` takes them all. For few tokens (one on
    CUDA), without gradients, the sparse kernel does not read the rows of ``w_gate_t`` of inputs that no token keeps;
    otherwise the dense masked path runs, which multiplies them with zero: an infinite or NaN weight there makes its
    output NaN. It runs on CUDA, too, where a row of a weight is no multiple of 16 bytes, or H is large.

    Args:
        x: ``[..., H]``, float32, float16 or bfloat16 (float64 takes the dense path).
        w_gate_t: ``[H, I]``, with one contiguous row an input: ``gate_proj.weight.t()`` of a weight stored that way.
            Any other layout takes the dense path.
        w_up: ``[I, H]``, as in ``nn.Linear``; the row stride may exceed H.
        w_down_t: ``[I, H]``, as in :func:`sparse_mlp`.
        input_threshold: float32, ``[]``, on x's device. 0 keeps every input, and NaN inputs are always kept.
        threshold, down_threshold: float32, ``[]`` or ``[I]``, on x's device.
        activation: silu, gelu, gelu_tanh or relu.
        gate_bias, up_bias, down_bias: ``[I]``, ``[I]``, ``[H]``.
        counts: int64 ``[4]``, added to: token-neuron pairs evaluated, kept by ``threshold``, kept by both, and
            token-input pairs kept by ``input_threshold``.

    Returns:
        ``[..., H]`` in x's dtype.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    tensors = (w_gate_t, w_up, w_down_t), (gate_bias, up_bias, down_bias)
    implementation, operands = choose(x, w_down_t.shape[-1], _Columns, tensors)
    mask = input_threshold, threshold, down_threshold, activation
    if implementation == KERNEL:
        return _Columns.kernel(x, operands, mask, counts)
    for name, t, dtype, shape in (
        ("input_threshold", input_threshold, torch.float32, []),
        ("counts", counts, torch.int64, [4]),
    ):
        if t is not None and (t.dtype != dtype or list(t.shape) != shape):
            got = f"{t.dtype} of shape {list(t.shape)}"
            raise RuntimeError(f"sparse_mlp_columns: {name} must be {dtype} of shape {shape}, got {got}")
    return _Columns.down(tensors, _Columns.hidden(tensors, x, mask, counts))


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


class _Columns(ColumnsOfGate, _Tensors):
    @staticmethod
    def operands(source: Operands) -> Operands | None:
        w_gate_t, _, w_down_t = source[0]
        return source if w_gate_t.stride(-1) == w_down_t.stride(-1) == 1 and column_rows_fit(source[0]) else None

    @staticmethod
    def gate_up(source: Operands, x: Tensor, for_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (w_gate_t, w_up, _), (gate_bias, up_bias, _) = source
        gate = F.linear(x if for_gate is None else for_gate, w_gate_t.t(), gate_bias)
        return gate, F.linear(x, w_up, up_bias)
