"""How one call of a gated MLP is computed: by the sparse kernel, by masked dense products, or as the dense model does.

:func:`choose` and :func:`choose_experts` are the only places that decide it, from the number of tokens, dtype,
autocast, gradients and the weights. What the weights are and whether they can be read directly is known by a
:class:`Projections`. Each limit on the number of tokens is a measured crossover, named beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from cats_ext.ops import definitions as ops
from cats_ext.ops.experts import triton_installed
from cats_ext.ops.reference import kept_inputs
from cats_ext.rows.product import has_product

# What choose() answers.
KERNEL = "kernel"  # the sparse kernel, which reads the rows of kept neurons only
MASKED = "masked"  # dense products of all weights, with the mask between them: differentiable, and fast for many tokens
DENSE = "dense"  # without a mask: prompts of a config with sparse_prefill=False

# Largest number of tokens for which the sparse kernel is taken, per device type. With more tokens fewer neurons are
# skipped by all of them, while a dense product reads the weights once for all. At H 4096, I 14336 and 50 % sparsity, on
# two cores of a Zen 3, fp32, the kernel takes about half the dense time for 16 tokens, and as long as dense for 64
# (bench/results/cpu-epyc-zen3).
MAX_KERNEL_TOKENS = {"cpu": 16, "cuda": 2}

# As MAX_KERNEL_TOKENS, under vLLM, whose graphs take the choice for each captured size. On an H200 a step of Mistral-7B
# with 2 sequences takes 0.92 times as long as the dense one at 50 % sparsity and 0.84 times at 70 %; with 4 the kernel
# would take 1.03, 0.96 and 0.81 times at 50, 70 and 90 %, and the sparsity can change while an engine runs
# (bench/results/h200/serving.csv). Longer rows than the tensor cores take are served to one sequence: of Llama-3-70B's
# shape over two GPUs, 2 sequences take 1.06 times as long as dense at 50 % (serving_two_gpus.csv).
MAX_SERVED_TOKENS, MAX_SERVED_ROW = 2, 4224
ALL_TOKENS = 1 << 31  # more than any x has

# 16-bit weights of these hidden sizes have a tensor-core kernel. On an H100, 4096x14336, with masks that are
# independent from token to token, it takes 83 to 130 us for 4 tokens and 107 to 138 for 8; dense takes 132 to 135 for 2
# to 16. 2048x8192 takes 37 to 50, and dense 46 for 1. Longer rows do not fit, and without the copy engine of compute
# capability 9.0 it is slower (bench/results/h100: kernel_experiments, microbench, mlp_tokens, mlp_small.csv). So it is
# where the memory is faster than the H100's 3.4 TB/s: on an H200, with 4.8, it takes 95 us for 4 tokens at 50 %
# sparsity, and dense 92 (bench/results/h200/serving_tokens.csv).
MAX_BATCHED_TOKENS, BATCHED_HIDDEN_SIZES, BATCHED_CAPABILITY = 4, range(3072, 4225, 32), 9
MOST_BATCHED_GB_PER_S = 4000

# As MAX_KERNEL_TOKENS, of packed rows, which other paths unpack first. At 50 % sparsity, on two cores with AVX-512,
# 1024x3584, fp32, int4 takes 9.1 ms for 48 tokens and 17.7 for 96, and to unpack and multiply 15.6 and 14.0; int8 9.3
# and 18.4, and 10.4 and 13.3 (bench/results/cpu/packed_tokens.csv). On an H200, 4096x14336, bf16, int4 takes 182 us for
# 16 tokens, 361 for 32, and to unpack and multiply 228 and 224; int8 232, 460, 248 and 244 (h200/packed_tokens.csv).
# packed_matmul, where there is one, takes 83 and 90 for 4 tokens and as long for 8; the kernel takes 46 and 57 for 4.
# 5 tokens are two launches, of 4 and of 1, which take 70 and 96: with int4 less than packed_matmul, with int8 more
# (h200/packed.csv).
MAX_PACKED_TOKENS = {"cpu": 48, "cuda": 16}
MAX_PACKED_BEFORE_PRODUCT = 4

# As MAX_KERNEL_TOKENS, of sparse_mlp_columns. On two cores with AVX-512-BF16, 1024x3584, two thirds of the pairs kept,
# bf16 takes 1.3 ms for 4 tokens and 1.9 for 8, and the dense products 1.5 and 1.8; fp32 takes 3.0 and 5.0 for 8
# (bench/results/cpu/columns_tokens.log). On CUDA each token takes two launches: two tokens would take 1.3 times as long
# as the dense MLP takes for one (bench/results/h200/columns.csv, at two thirds). And its longest rows on CUDA: the
# inputs that are kept, and batches of rows, then have room in the shared memory of every card (csrc/cuda/plan.h).
MAX_COLUMN_TOKENS = {"cpu": 8, "cuda": 1}
MOST_COLUMN_INPUTS, MOST_COLUMN_BYTES = 12288, 32768
MOST_COLUMN_NEURONS = 1 << 18

# As MAX_KERNEL_TOKENS, of activated_mlp. On an H200, compiled, with masks that are independent from token to token, it
# takes 0.68 to 0.80 of the time of the fastest dense path for 2 tokens (bench/results/h200/exact.csv). For 4 it takes
# 0.84 to 0.93 there, and took 0.98 to 1.04 in another run: dense products serve them until patched models are timed.
MAX_ACTIVATED_TOKENS = {"cpu": 16, "cuda": 2}
MOST_ACTIVATED_BYTES = 32768  # of a row on CUDA

# As MAX_KERNEL_TOKENS, of exact_mlp, which takes the place of activated_mlp and of what is computed before it: without
# and with a cutoff. On an H200 it takes 0.41 to 0.60 of the time of the fastest dense path for one token. For 2 tokens
# it takes 0.59 to 0.68 with a cutoff, where activated_mlp, compiled, takes 0.70 to 0.75; without one it takes 0.69 to
# 0.94, activated_mlp 0.68 to 0.80 (bench/results/h200/exact.csv).
MAX_EXACT_TOKENS = {"cpu": 16, "cuda": 1}
MAX_CUTOFF_TOKENS = {"cpu": 16, "cuda": 2}

# As MAX_KERNEL_TOKENS, of experts. On an H100, in a graph, a block of Mixtral's experts takes 769 us for 4 tokens with
# transformers' grouped products and 648 at 50 % sparsity, and for 8 tokens 1071 and 1253; of Qwen3-30B-A3B's, 196 and
# 86, 278 and 157 (bench/results/h100/experts.csv).
MAX_EXPERT_TOKENS = {"cpu": 16, "cuda": 4}

# Half dtypes for which PyTorch's matrix products on this CPU are scalar code. With those, down_proj in the layout that
# the kernel needs takes 25 times as long as in its own (bf16, Zen 3), and the kernel is faster than any dense path for
# as many tokens as were measured (32), so it takes them all.
_MKLDNN_QUERIES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_SCALAR_ON_CPU = tuple(
    dtype
    for dtype, query in _MKLDNN_QUERIES.items()
    if torch.backends.mkldnn.is_available() and not getattr(torch.ops.mkldnn, query)()
)

# Bound at import: a lookup in torch's large modules at each call misses the processor's cache between layers.
_autocast_is_enabled = torch.is_autocast_enabled
_transforms_are_active = torch._C._are_functorch_transforms_active
# Whether the user wants the same bits in every run. Decided when traced under torch.compile.
deterministic = torch.are_deterministic_algorithms_enabled

# (w_gate, w_up, w_down_t) and (gate_bias, up_bias, down_bias), as torch.ops.cats.sparse_mlp takes them. Without a gate,
# w_gate is what comes before the activation, and w_up is None, as exact_mlp takes them.
Operands = tuple[tuple[Tensor, Tensor | None, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]
# (threshold, down_threshold, activation), of some kinds of projections with the input threshold before them, as their
# op takes them. The op takes the activation's name; where dense products are masked, it can be any function.
Mask = tuple[Tensor | str | Callable[[Tensor], Tensor] | None, ...]


class Projections:
    """What the gate, up and down projection of an MLP are, and how to compute with them.

    One subclass for each kind, without instances: ``source``, where the projections are looked up, is passed to every
    method, since adapters and loaders replace modules and weights between calls. Weights in another format are a
    subclass with operands, a kernel and a limit of its own.
    """

    down_name = "down_proj"  # of the child

    @staticmethod
    def kernel_fits(x: Tensor, hidden_size: int) -> bool:
        """Whether ``x`` ``[..., H]`` has few enough tokens for the kernel and a dtype that it takes."""
        return kernel_fits(x, hidden_size)

    @staticmethod
    def operands(source: Any) -> Operands | None:
        """The weights and biases for ``kernel``; None if it cannot read them or a projection has to be called."""
        raise NotImplementedError

    @staticmethod
    def gate_up(source: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both projections ``[..., I]`` of ``x`` ``[..., H]``, dense."""
        raise NotImplementedError

    @staticmethod
    def mask(buffers: dict[str, Tensor | None], activation: str | Callable[[Tensor], Tensor]) -> Mask:
        """What ``kernel`` and ``hidden`` take of a module's thresholds."""
        return buffers["threshold"], buffers["down_threshold"], activation

    @classmethod
    def hidden(cls, source: Any, x: Tensor, mask: Mask, counts: Tensor | None) -> Tensor:
        """The masked product ``[..., I]`` of ``x`` ``[..., H]``, from dense projections. Differentiable."""
        gate, up = cls.gate_up(source, x)
        return ops.masked_product(gate, up, *mask, counts)

    @staticmethod
    def down(source: Any, h: Tensor) -> Tensor:
        """The down projection ``[..., H]`` of ``h`` ``[..., I]``, dense."""
        raise NotImplementedError

    @staticmethod
    def kernel(x: Tensor, operands: Operands, mask: Mask, counts: Tensor | None) -> Tensor:
        """The whole MLP of ``x`` ``[..., H]``, reading the rows of kept neurons only."""
        weights, biases = operands
        if counts is not None:
            return ops.sparse_mlp_counted(x, *weights, counts, *mask, *biases, deterministic())
        # One by one: unpacking them in the call takes the host longer.
        w_gate, w_up, w_down_t = weights
        threshold, down_threshold, activation = mask
        gate_bias, up_bias, down_bias = biases
        return ops.sparse_mlp(
            x,
            w_gate,
            w_up,
            w_down_t,
            threshold,
            down_threshold,
            activation,
            gate_bias,
            up_bias,
            down_bias,
            deterministic(),
        )


class ColumnsOfGate(Projections):
    """Projections whose gate gets only the inputs above their threshold, the first value of the mask.

    Of the operands, its weight is ``[H, I]``, with one contiguous row an input: those of the others are not read.
    """

    @staticmethod
    def kernel_fits(x: Tensor, hidden_size: int) -> bool:
        return kernel_fits(x, hidden_size, MAX_COLUMN_TOKENS, 0)  # there is no tensor-core kernel

    @staticmethod
    def gate_up(source: Any, x: Tensor, for_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of other kinds; the gate takes ``for_gate`` instead of ``x`` if it is given."""
        raise NotImplementedError

    @staticmethod
    def mask(buffers: dict[str, Tensor | None], activation: str | Callable[[Tensor], Tensor]) -> Mask:
        return buffers["input_threshold"], buffers["threshold"], buffers["down_threshold"], activation

    @classmethod
    def hidden(cls, source: Any, x: Tensor, mask: Mask, counts: Tensor | None) -> Tensor:
        input_threshold, *mask = mask
        kept = kept_inputs(x, input_threshold)
        gate, up = cls.gate_up(source, x, torch.where(kept, x, 0))
        h = ops.masked_product(gate, up, *mask, None if counts is None else counts[:3])
        if counts is not None:
            counts[3] += kept.sum()
        return h

    @staticmethod
    def kernel(x: Tensor, operands: Operands, mask: Mask, counts: Tensor | None) -> Tensor:
        weights, biases = operands
        if counts is not None:
            return ops.sparse_mlp_columns_counted(x, *weights, counts, *mask, *biases, deterministic())
        return ops.sparse_mlp_columns(x, *weights, *mask, *biases, deterministic())


def choose(
    x: Tensor, hidden_size: int, projections: type[Projections], source: Any, dense_prefill: bool = False
) -> tuple[str, Operands | None]:
    """KERNEL, MASKED or DENSE for ``x`` ``[..., H]``, and the operands if it is the kernel.

    Args:
        hidden_size: H, which ``x`` may lack if it is wrong.
        projections, source: what the weights are and where they are looked up.
        dense_prefill: compute densely whatever has several positions of a sequence.
    """
    if dense_prefill and x.dim() > 1 and x.shape[-2] > 1:
        return DENSE, None
    if projections.kernel_fits(x, hidden_size):
        operands = projections.operands(source)
        if (
            operands is not None
            and forward_ad._current_level < 0
            and not (is_grad_enabled() and needs_grad(x, *operands[0], *operands[1]))
        ):
            return KERNEL, operands
    return MASKED, None


def choose_experts(
    x: Tensor,
    routing: Tensor,
    operands: tuple[Tensor, Tensor] | None,
    *,
    counted: bool,
    dense_prefill: bool,
) -> str:
    """KERNEL, MASKED or DENSE for ``x`` ``[T, H]`` of routed experts. The kernel neither counts nor has a backward.

    Args:
        routing: the experts' weights ``[T, K]``.
        operands: ``w_gate_up`` ``[E, 2 I, H]`` and ``w_down_t`` ``[E, I, H]``; None if they are no plain parameters.
    """
    if dense_prefill and len(x) > 1:
        return DENSE
    device = x.device.type
    if (
        not counted
        and operands is not None
        and (len(x) <= MAX_EXPERT_TOKENS.get(device, 0) or (device == "cpu" and x.dtype in _SCALAR_ON_CPU))
        and x.dtype in ops.SPARSE_DTYPES
        and not _autocast_is_enabled(device)
        and (device != "cuda" or triton_installed())
        and operands[1].stride(-1) == 1  # one contiguous row a neuron
        and forward_ad._current_level < 0
        and not _transforms_are_active()
        and not needs_grad(x, routing, *operands)
    ):
        return KERNEL
    return MASKED


def kernel_fits(
    x: Tensor,
    hidden_size: int,
    max_tokens: dict[str, int] = MAX_KERNEL_TOKENS,
    max_batched_tokens: int = MAX_BATCHED_TOKENS,
) -> bool:
    """Whether ``x`` ``[..., H]`` has few enough tokens for the sparse kernel and a dtype that it takes.

    Not under autocast: the operands would have to be cast first, which the dense path's ``linear`` does.

    Args:
        max_tokens: per device type.
        max_batched_tokens: where there is a tensor-core kernel.
    """
    # Once a layer and token: is_cuda and is_cpu cost a fifth of device.type.
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    size = x.numel()
    tokens_fit = size <= max_tokens.get(device, 0) * hidden_size
    if not tokens_fit and device == "cuda" and size <= max_batched_tokens * hidden_size:
        card = torch.cuda.get_device_properties(x.device)
        tokens_fit = (
            x.dtype != torch.float32
            and hidden_size in BATCHED_HIDDEN_SIZES
            and card.major == BATCHED_CAPABILITY
            and memory_gb_per_s(card) <= MOST_BATCHED_GB_PER_S
        )
    return (
        (tokens_fit or (device == "cpu" and x.dtype in _SCALAR_ON_CPU))
        and x.dtype in ops.SPARSE_DTYPES
        and not _autocast_is_enabled(device)
    )


def served_tokens(x: Tensor) -> int:
    """For how many tokens the kernel is taken under vLLM, of dense weights of ``x``'s dtype; ``x`` is ``[..., H]``.

    vLLM does not use autocast.
    """
    if x.dtype not in ops.SPARSE_DTYPES:
        return 0
    if x.is_cuda:
        return MAX_SERVED_TOKENS if x.shape[-1] <= MAX_SERVED_ROW else min(MAX_SERVED_TOKENS, 1)
    return ALL_TOKENS if x.dtype in _SCALAR_ON_CPU else MAX_KERNEL_TOKENS["cpu"]


def packed_kernel_fits(x: Tensor, hidden_size: int) -> bool:
    """As :func:`kernel_fits`, of packed rows."""
    return kernel_fits(x, hidden_size, MAX_PACKED_TOKENS) and not (
        x.numel() > MAX_PACKED_BEFORE_PRODUCT * hidden_size and has_product(x)
    )


def column_rows_fit(weights: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether ``sparse_mlp_columns`` takes these weights: on CUDA, rows in pieces of 16 bytes that are not too long."""
    _, w_up, _ = weights
    if not w_up.is_cuda:
        return True
    inputs, size = w_up.shape[1], w_up.element_size()
    places = (n for w in weights for n in (w.storage_offset(), w.stride(0), w.shape[1]))
    return (
        inputs <= MOST_COLUMN_INPUTS
        and inputs * size <= MOST_COLUMN_BYTES
        and w_up.shape[0] <= MOST_COLUMN_NEURONS
        and all(n * size % 16 == 0 for n in places)
        and all(w.stride(0) * size < 2**32 for w in weights)
    )


def memory_gb_per_s(card: Any) -> float:
    """Peak rate of a GPU's memory, from ``torch.cuda.get_device_properties``; 0 where this torch does not know it."""
    # kHz, with two transfers a cycle, and bits.
    return 2 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8e6


def activated_fits(rows: Tensor, width: int, hidden_size: int) -> bool:
    """Whether ``activated_mlp`` serves as many tokens as ``rows`` ``[..., width]`` has, and their dtype.

    Not under autocast, where a gradient is needed or taken forward, or where CUDA has a slow kernel only.
    """
    device = "cuda" if rows.is_cuda else "cpu" if rows.is_cpu else rows.device.type
    row_bytes = hidden_size * rows.element_size()
    return (
        rows.dtype in ops.SPARSE_DTYPES
        and (
            rows.numel() <= MAX_ACTIVATED_TOKENS.get(device, 0) * width
            or (device == "cpu" and rows.dtype in _SCALAR_ON_CPU)
        )
        and (device != "cuda" or (row_bytes % 16 == 0 and row_bytes <= MOST_ACTIVATED_BYTES))
        and not _autocast_is_enabled(device)
        and forward_ad._current_level < 0
    )


def exact_fits(x: Tensor, hidden_size: int, cutoff: bool) -> bool:
    """Whether ``exact_mlp`` serves ``x`` ``[..., H]``, for which :func:`activated_fits` holds."""
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    tokens = (MAX_CUTOFF_TOKENS if cutoff else MAX_EXACT_TOKENS).get(device, 0)
    return x.numel() <= tokens * hidden_size and (
        device != "cuda" or x.dtype != torch.float32  # which has a slow kernel only
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the operation. The sparse kernel has no backward."""
    return is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
