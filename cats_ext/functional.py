"""The sparse gated MLP as a function, and the choice between its two ways: decode kernel or dense masked path.

The dense masked path is three matrix products with one fused elementwise op between them. It reads all weights, is
differentiable, and is what many tokens (prefill, large batches) run on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops import definitions as ops
from cats_ext.ops import reference

# Largest number of tokens for which the sparse kernel is taken, per device type. With more tokens fewer neurons are
# skipped by all of them, while a dense product reads the weights once for all. At H 4096, I 14336 and 50 % sparsity, on
# two cores of a Zen 3, fp32, the kernel takes about half the dense time for 16 tokens, and as long as dense for 64
# (bench/results/cpu-epyc-zen3).
MAX_KERNEL_TOKENS = {"cpu": 16, "cuda": 2}

# 16-bit weights of these hidden sizes have a tensor-core kernel. On an H100, 4096x14336, with masks that are
# independent from token to token, it takes 83 to 130 us for 4 tokens and 107 to 138 for 8; dense takes 132 to 135 for 2
# to 16. 2048x8192 takes 37 to 50, and dense 46 for 1. Longer rows do not fit, and without the copy engine of compute
# capability 9.0 it is slower (bench/results/h100: kernel_experiments, microbench, mlp_tokens, mlp_small.csv).
MAX_BATCHED_TOKENS, BATCHED_HIDDEN_SIZES, BATCHED_CAPABILITY = 4, range(3072, 4225, 32), 9

MOST_KERNEL_TOKENS = max(*MAX_KERNEL_TOKENS.values(), MAX_BATCHED_TOKENS)

# As MAX_KERNEL_TOKENS, of experts. On an H100, in a graph, a block of Mixtral's experts takes 769 us for 4 tokens with
# transformers' grouped products and 648 at 50 % sparsity, and for 8 tokens 1071 and 1253; of Qwen3-30B-A3B's, 196 and
# 86, 278 and 157 (bench/results/h100/experts.csv).
MAX_EXPERT_TOKENS = {"cpu": 16, "cuda": 4}


# Half dtypes for which PyTorch's matrix products on this CPU are scalar code. With those, down_proj in the layout that
# the kernel needs takes 25 times as long as in its own (bf16, Zen 3), and the kernel is faster than any dense path for
# as many tokens as were measured (32), so it takes them all.
_SCALAR_ON_CPU = tuple(
    dtype
    for dtype, query in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, query)()
)


def kernel_fits(x: Tensor, hidden_size: int) -> bool:
    """Whether the sparse kernel is the way for ``x`` ``[..., H]``: few tokens, a dtype it takes, and no autocast.

    Under autocast the operands have to be cast first, which the dense path's ``linear`` does.
    """
    # Once a layer and token: is_cuda costs a fifth of device.type.
    device = "cuda" if x.is_cuda else x.device.type
    most = MAX_KERNEL_TOKENS.get(device, 0)
    tokens_fit = x.numel() <= most * hidden_size
    if not tokens_fit and device == "cuda" and x.numel() <= MAX_BATCHED_TOKENS * hidden_size:
        tokens_fit = (
            x.dtype != torch.float32
            and hidden_size in BATCHED_HIDDEN_SIZES
            and torch.cuda.get_device_properties(x.device).major == BATCHED_CAPABILITY
        )
    return (
        (tokens_fit or (device == "cpu" and x.dtype in _SCALAR_ON_CPU))
        and x.dtype in ops.SPARSE_DTYPES
        and not torch.is_autocast_enabled(device)
    )


def experts_fit(x: Tensor) -> bool:
    """As :func:`kernel_fits`, for ``x`` ``[T, H]`` and the op of routed experts."""
    device = x.device.type
    return (
        (len(x) <= MAX_EXPERT_TOKENS.get(device, 0) or (device == "cpu" and x.dtype in _SCALAR_ON_CPU))
        and x.dtype in ops.SPARSE_DTYPES
        and not torch.is_autocast_enabled(device)
    )


# Whether the user wants the same bits in every run. Decided when traced under torch.compile.
deterministic = torch.are_deterministic_algorithms_enabled


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the operation. The sparse kernel has no backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    ``torch.ops.cats.sparse_mlp`` itself has no backward: PyTorch warns there, and gives no gradient.
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
    operands = (x, w_gate, w_up, w_down_t, gate_bias, up_bias, down_bias)
    if kernel_fits(x, w_down_t.shape[-1]) and w_down_t.stride(-1) == 1 and not needs_grad(*operands):
        rest = (threshold, down_threshold, activation, gate_bias, up_bias, down_bias, deterministic())
        if counts is None:
            return ops.sparse_mlp(x, w_gate, w_up, w_down_t, *rest)
        return ops.sparse_mlp_counted(x, w_gate, w_up, w_down_t, counts, *rest)
    gate, up = F.linear(x, w_gate, gate_bias), F.linear(x, w_up, up_bias)
    h = masked_product(gate, up, threshold, down_threshold, activation, counts)
    return F.linear(h, w_down_t.t(), down_bias)


def masked_product(
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None,
    activation: str,
    counts: Tensor | None,
) -> Tensor:
    """``h`` of :func:`sparse_mlp` from the projections of shape ``[..., I]``; differentiable by both."""
    if counts is not None:
        with torch.no_grad():
            counts += reference.gated_threshold_counts_ref(gate, up, threshold, down_threshold, activation)
    return ops.eager_gated_threshold(gate, up, threshold, down_threshold, activation)
