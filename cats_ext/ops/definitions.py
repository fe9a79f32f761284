"""The torch ops: schemas, shape functions, the reference as a fallback, and autograd of the elementwise op.

The schemas live here so that ``torch.ops.cats.*`` exists on every machine; ``csrc/ops_cpu.cpp`` and
``csrc/ops_cuda.cu`` only register kernels. ``sparse_mlp`` carries no autograd: a Python-registered one costs about six
microseconds a call even under ``no_grad``. Training goes through ``gated_threshold`` (see :func:`masked_product`), and
so do dual tensors of ``torch.autograd.forward_ad``, whose tangents the other ops do not see. torch.func's transforms
run the formula of any op.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from cats_ext.native.library import LIBRARIES
from cats_ext.ops import reference
from cats_ext.ops.checks import check

_WEIGHTS = "Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t"
_COLUMNS = "Tensor x, Tensor w_gate_t, Tensor w_up, Tensor w_down_t"
_FORMATS = "str gate_format, str up_format, str down_format"
_THRESHOLDS = "Tensor threshold, Tensor? down_threshold=None, str activation='silu'"
_REST = "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None, bool deterministic=False"

SCHEMAS = {
    # deterministic: the same bits in every run on the same device, at some cost on CUDA; on the CPU they always are.
    "sparse_mlp": f"({_WEIGHTS}, {_THRESHOLDS}, {_REST}) -> Tensor",
    # As sparse_mlp, and adds to counts (int64 [3]): token-neuron pairs evaluated, kept by threshold, kept by both.
    "sparse_mlp_counted": f"({_WEIGHTS}, Tensor(a!) counts, {_THRESHOLDS}, {_REST}) -> Tensor",
    # As sparse_mlp on packed rows: uint8 [I, bytes], in a format of cats_ext.rows each. Only x says how many columns
    # they have: rows are padded to a multiple of 128, so an x of another width up to that is not refused.
    "sparse_mlp_packed": f"({_WEIGHTS}, {_FORMATS}, {_THRESHOLDS}, {_REST}) -> Tensor",
    "sparse_mlp_packed_counted": f"({_WEIGHTS}, Tensor(a!) counts, {_FORMATS}, {_THRESHOLDS}, {_REST}) -> Tensor",
    # As sparse_mlp, with the transpose of the gate, [H, I]: the gate sees zero of inputs below input_threshold (float32
    # []), whose rows are not read. Up takes x as it is. counts is int64 [4]: token-input pairs kept come last. On CUDA
    # rows must be multiples of 16 bytes; an error otherwise. Each token takes two launches.
    "sparse_mlp_columns": f"({_COLUMNS}, Tensor input_threshold, {_THRESHOLDS}, {_REST}) -> Tensor",
    "sparse_mlp_columns_counted": f"({_COLUMNS}, Tensor(a!) counts, Tensor input_threshold, {_THRESHOLDS}, {_REST}) "
    "-> Tensor",
    # For a step of decoding: one token, whose row x is first normalised (RMS). Adds y, in float32, to y_sum [H + 1],
    # which is zero before; elements from H on are scratch. The kernel before it on the stream must not write weights.
    # On CUDA raises cudaErrorNotSupported for shapes without a step kernel: plan.step_supported says which.
    "sparse_mlp_step": f"(Tensor x, Tensor norm_weight, float norm_eps, {_WEIGHTS.removeprefix('Tensor x, ')}, "
    f"Tensor(a!) y_sum, {_THRESHOLDS}, Tensor? gate_bias=None, Tensor? up_bias=None) -> ()",
    "sparse_mlp_columns_step": f"(Tensor x, Tensor norm_weight, float norm_eps, {_COLUMNS.removeprefix('Tensor x, ')}, "
    f"Tensor(a!) y_sum, Tensor input_threshold, {_THRESHOLDS}, Tensor? gate_bias=None, Tensor? up_bias=None) -> ()",
    "sparse_mlp_packed_step": f"(Tensor x, Tensor norm_weight, float norm_eps, {_WEIGHTS.removeprefix('Tensor x, ')}, "
    f"{_FORMATS}, Tensor(a!) y_sum, {_THRESHOLDS}, Tensor? gate_bias=None, Tensor? up_bias=None) -> ()",
    # The MLP from its activations v [..., I] on, by the rows of those that are not zero: v * (x Wu) Wd, or v Wd without
    # x and w_up. See reference.activated_mlp_ref.
    "activated_mlp": "(Tensor v, Tensor w_down_t, Tensor? down_bias=None, Tensor? x=None, Tensor? w_up=None, "
    "Tensor? up_bias=None, bool deterministic=False) -> Tensor",
    # An MLP that is sparse by itself, in one call: down(v * up), v = act(gate), reading what is not exactly zero.
    # Without w_up down(v); with deviations v = act(max(gate - cutoff, 0)) (Gemma 3n); with relu_up
    # down(v * max(up, 0)). Gates and v are rounded to x's dtype. See reference.exact_mlp_ref.
    "exact_mlp": "(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down_t, str activation='relu', "
    f"float? deviations=None, bool relu_up=False, {_REST}) -> Tensor",
    # For a step of decoding: y [sum of N] = W in + bias + residual, for up to three weights of packed rows, uint8
    # [N, bytes], of one input [K]: x, x + delta (in float32 or x's dtype; x_new gets it), or the attention of which x
    # [S, heads, D], largest and total [S, heads] are partial results; normalised (RMS) where there is a norm_weight.
    # The kernel before it on the stream must not write weights. On CUDA packed_linear_supported says what it takes.
    "packed_linear_step": "(Tensor x, Tensor? delta, Tensor? norm_weight, float norm_eps, Tensor[] weights, "
    "str row_format, Tensor[] biases, Tensor? residual, Tensor? largest, Tensor? total, Tensor(a!) y, "
    "Tensor(b!)? x_new) -> ()",
    # Packed rows [I, bytes] as dense ones [I, columns], for products with many tokens.
    "unpack_rows": "(Tensor rows, str row_format, int columns, ScalarType dtype) -> Tensor",
    # x W^T for packed rows of W [N, columns], or with input_rows x W for those of W [N, columns] in x [..., N]; plus
    # bias. On CUDA for compute capability 9.0, 16 bits, and multiples of 8 rows and columns; an error otherwise.
    "packed_matmul": "(Tensor x, Tensor rows, str row_format, int columns, bool input_rows=False, Tensor? bias=None) "
    "-> Tensor",
    "gated_threshold": f"(Tensor gate, Tensor up, {_THRESHOLDS}) -> Tensor",
    "gated_threshold_counted": f"(Tensor gate, Tensor up, Tensor(a!) counts, {_THRESHOLDS}) -> Tensor",
    # The same kernel below autograd, whose registration costs the host time at each call: see masked_product.
    "gated_threshold_forward": f"(Tensor gate, Tensor up, {_THRESHOLDS}) -> Tensor",
    "gated_threshold_backward": f"(Tensor grad_h, Tensor gate, Tensor up, {_THRESHOLDS}) -> (Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"cats::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

sparse_mlp = torch.ops.cats.sparse_mlp
sparse_mlp_counted = torch.ops.cats.sparse_mlp_counted
sparse_mlp_packed = torch.ops.cats.sparse_mlp_packed
sparse_mlp_packed_counted = torch.ops.cats.sparse_mlp_packed_counted
sparse_mlp_columns = torch.ops.cats.sparse_mlp_columns
sparse_mlp_columns_counted = torch.ops.cats.sparse_mlp_columns_counted
sparse_mlp_step = torch.ops.cats.sparse_mlp_step
sparse_mlp_columns_step = torch.ops.cats.sparse_mlp_columns_step
sparse_mlp_packed_step = torch.ops.cats.sparse_mlp_packed_step
activated_mlp = torch.ops.cats.activated_mlp
exact_mlp = torch.ops.cats.exact_mlp
packed_linear_step = torch.ops.cats.packed_linear_step
unpack_rows = torch.ops.cats.unpack_rows
packed_matmul = torch.ops.cats.packed_matmul
gated_threshold = torch.ops.cats.gated_threshold
gated_threshold_counted = torch.ops.cats.gated_threshold_counted
gated_threshold_forward = torch.ops.cats.gated_threshold_forward
gated_threshold_backward = torch.ops.cats.gated_threshold_backward

SPARSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTWISE_DTYPES = (*SPARSE_DTYPES, torch.float64)


# --- shape functions for tracing, and the reference on devices without a compiled kernel ----------------------------


def _sparse_mlp_ref(*, deterministic: bool, **arguments) -> Tensor:  # the reference always is
    return reference.sparse_mlp_ref(**arguments)


def _activated_mlp_ref(*, deterministic: bool, **arguments) -> Tensor:
    return reference.activated_mlp_ref(**arguments)


def _exact_mlp_ref(*, deterministic: bool, **arguments) -> Tensor:
    return reference.exact_mlp_ref(**arguments)


def _sparse_mlp_packed_ref(*, deterministic: bool, **arguments) -> Tensor:
    return reference.sparse_mlp_packed_ref(**arguments)


def _sparse_mlp_columns_ref(*, deterministic: bool, **arguments) -> Tensor:
    return reference.sparse_mlp_columns_ref(**arguments)


def _step_ref(sparse_mlp_ref: Callable[..., Tensor]) -> Callable[..., None]:
    def step_ref(*, x: Tensor, norm_weight: Tensor, norm_eps: float, y_sum: Tensor, **arguments) -> None:
        row = reference.rms_norm_ref(x, norm_weight, norm_eps).float()  # in x's dtype the result would be rounded
        y_sum[: x.numel()] += sparse_mlp_ref(row, **arguments).flatten()

    return step_ref


def _like(*names: str) -> Callable[[dict[str, Any]], tuple[Tensor, ...]]:
    """The outputs of an op: each has the shape, dtype and device of one of its arguments."""
    return lambda arguments: tuple(arguments[name].new_empty(arguments[name].shape) for name in names)


def _activated_mlp_output(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    v = arguments["v"]
    return (v.new_empty(*v.shape[:-1], arguments["w_down_t"].shape[-1]),)


def _unpacked_output(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    rows = arguments["rows"]
    return (rows.new_empty(rows.shape[0], arguments["columns"], dtype=arguments["dtype"]),)


def _matmul_output(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    x, rows = arguments["x"], arguments["rows"]
    return (x.new_empty(*x.shape[:-1], arguments["columns"] if arguments["input_rows"] else rows.shape[0]),)


# Empty outputs, from the arguments of a call by name; and the reference.
_OPS: dict[str, tuple[Callable[[dict[str, Any]], tuple[Tensor, ...]], Callable]] = {
    "sparse_mlp": (_like("x"), _sparse_mlp_ref),
    "sparse_mlp_counted": (_like("x"), _sparse_mlp_ref),
    "sparse_mlp_packed": (_like("x"), _sparse_mlp_packed_ref),
    "sparse_mlp_packed_counted": (_like("x"), _sparse_mlp_packed_ref),
    "sparse_mlp_columns": (_like("x"), _sparse_mlp_columns_ref),
    "sparse_mlp_columns_counted": (_like("x"), _sparse_mlp_columns_ref),
    "sparse_mlp_step": (_like(), _step_ref(reference.sparse_mlp_ref)),
    "sparse_mlp_columns_step": (_like(), _step_ref(reference.sparse_mlp_columns_ref)),
    "sparse_mlp_packed_step": (_like(), _step_ref(reference.sparse_mlp_packed_ref)),
    "activated_mlp": (_activated_mlp_output, _activated_mlp_ref),
    "exact_mlp": (_like("x"), _exact_mlp_ref),
    "packed_linear_step": (_like(), reference.packed_linear_step_ref),
    "unpack_rows": (_unpacked_output, reference.unpack_rows_ref),
    "packed_matmul": (_matmul_output, reference.packed_matmul_ref),
    "gated_threshold": (_like("gate"), reference.gated_threshold_ref),
    "gated_threshold_counted": (_like("gate"), reference.gated_threshold_counted_ref),
    "gated_threshold_forward": (_like("gate"), reference.gated_threshold_ref),
    "gated_threshold_backward": (_like("gate", "up"), reference.gated_threshold_backward_ref),
}


def _checked_arguments(op: str, args: tuple, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults that the dispatcher leaves out."""
    parameters = getattr(torch.ops.cats, op).default._schema.arguments
    defaults = {p.name: p.default_value for p in parameters}
    arguments = defaults | dict(zip(defaults, args, strict=False)) | named
    check(op, arguments)
    return arguments


def _fake(op: str) -> Callable:
    empty, _ = _OPS[op]

    def fake(*args, **named):
        outputs = empty(_checked_arguments(op, args, named))
        return outputs if len(outputs) > 1 else next(iter(outputs), None)

    return fake


def _formula(op: str) -> Callable:
    _, reference_op = _OPS[op]
    return lambda *args, **named: reference_op(**_checked_arguments(op, args, named))


def _refuse_counting(*_: Any, **__: Any) -> None:
    raise RuntimeError("neurons cannot be counted inside torch.func's transforms: call track_sparsity(model, False)")


def _fallback(op: str, device: str) -> Callable:
    formula = _formula(op)

    def fallback(*args, **named):
        _warn_slow(device)
        return formula(*args, **named)

    return fallback


@functools.cache
def _warn_slow(device: str) -> None:
    library = LIBRARIES["_C_cuda" if device == "cuda" else "_C"]
    warnings.warn(
        f"cats_ext has no compiled kernel for {device} ({library.name}: {library.reason}); "
        "the PyTorch reference runs instead: right, but slower than the dense model. `cats env` shows what is built.",
        RuntimeWarning,
        stacklevel=3,
    )


def _register() -> None:
    uncompiled = [d for d, lib in (("cpu", "_C"), ("cuda", "_C_cuda")) if not LIBRARIES[lib].loaded]
    for op in _OPS:
        torch.library.register_fake(f"cats::{op}", _fake(op))
        # Without a CPU kernel: a step, because decoding on a CPU gains nothing by it, and products of many tokens.
        no_kernel = op.endswith("_step") or op == "packed_matmul"
        for device in {*uncompiled, "cpu"} if no_kernel else uncompiled:
            torch.library.register_kernel(f"cats::{op}", device, _formula(op) if no_kernel else _fallback(op, device))
        # Inside torch.func's transforms the formula runs, which has all derivatives and batching rules.
        counted = op.endswith("_counted")
        _library.impl(op, _refuse_counting if counted else _formula(op), "FuncTorchDynamicLayerFrontMode")
        refuse_other_layouts(_library, op)


def refuse_other_layouts(library: torch.library.Library, op: str) -> None:
    """Let ``op`` refuse sparse, quantised and nested tensors by name; torch would list all backends instead."""
    names = [p.name for p in getattr(torch.ops.cats, op).default._schema.arguments]

    def refuse(*args, **named):
        for name, t in [*zip(names, args, strict=False), *named.items()]:
            if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_quantized or t.is_nested):
                kind = "nested tensor" if t.is_nested else f"quantised {t.dtype}" if t.is_quantized else t.layout
                raise RuntimeError(f"{op}: {name} must be a dense tensor, got {kind}")

    for layout in ("Sparse", "SparseCsr", "Quantized", "NestedTensor", "Mkldnn"):
        for device in ("CPU",) if layout == "Mkldnn" else ("CPU", "CUDA"):
            library.impl(op, refuse, f"{layout}{device}")
    library.impl(op, refuse, "AutogradNestedTensor")


# --- autograd of the elementwise op ---------------------------------------------------------------------------------


class _GatedThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, thresholds_and_activation):
        threshold, down_threshold, activation = thresholds_and_activation
        ctx.save_for_backward(gate, up, threshold, down_threshold)
        ctx.activation = activation
        return gated_threshold_forward(gate, up, threshold, down_threshold, activation)

    @staticmethod
    def backward(ctx, grad_h):
        if is_grad_enabled():  # create_graph
            return _backward_once(ctx, grad_h)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, grad_h)


def _backward(ctx, grad_h: Tensor) -> tuple[Tensor, Tensor, None]:
    return *gated_threshold_backward(grad_h, *ctx.saved_tensors, ctx.activation), None


_backward_once = torch.autograd.function.once_differentiable(_backward)  # a second derivative is an error


# What Function.apply calls after it has looked for functorch's transforms, which takes as long as all the rest of it.
_apply = super(torch.autograd.Function, _GatedThreshold).apply
# Bound at import: a lookup in torch's large modules at each call misses the processor's cache between layers.
_transforms_are_active = torch._C._are_functorch_transforms_active


def _gated_threshold_autograd(gate, up, threshold, down_threshold=None, activation="silu"):
    if forward_ad._current_level >= 0:
        return _formula("gated_threshold")(gate, up, threshold, down_threshold, activation)
    present = gate is not None and up is not None
    if present and is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedThreshold.apply(gate, up, (threshold, down_threshold, activation))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cats.gated_threshold.default(gate, up, threshold, down_threshold, activation)


def masked_product(
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None,
    activation: str | Callable[[Tensor], Tensor],
    counts: Tensor | None = None,
) -> Tensor:
    """``act(gate) * up`` of the neurons above their thresholds, and 0 elsewhere. Differentiable by ``gate`` and ``up``.

    Small layers wait for the host. ``gated_threshold`` goes through the dispatcher's autograd keys, whose code is cold
    between layers: inside a model the call took 57 to 59 us, and 10 in a loop. So it is used only where it is needed,
    by torch.compile and torch.func; otherwise the autograd function or the op below autograd is called directly
    (bench/results/h100/decode_host.log).

    Args:
        gate, up: ``[..., I]``, float32, float16, bfloat16 or float64.
        threshold, down_threshold: float32, ``[]`` or ``[I]``.
        activation: silu, gelu, gelu_tanh or relu; or any function, which is called.
        counts: int64 ``[3]``, added to: token-neuron pairs evaluated, kept by ``threshold``, kept by both.

    Returns:
        ``[..., I]`` in the dtype of ``gate``.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    if counts is not None and _transforms_are_active():
        _refuse_counting()
    if not isinstance(activation, str):
        return _masked_product_by_parts(gate, up, (threshold, down_threshold), activation, counts)
    needs_grad = is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if counts is not None:
        if not needs_grad and forward_ad._current_level < 0:
            return gated_threshold_counted(gate, up, counts, threshold, down_threshold, activation)
        with torch.no_grad():
            counts += reference.gated_threshold_counts_ref(gate, up, threshold, down_threshold, activation)
    if is_compiling() or _transforms_are_active() or forward_ad._current_level >= 0:
        return gated_threshold(gate, up, threshold, down_threshold, activation)
    if needs_grad:
        return _apply(gate, up, (threshold, down_threshold, activation))
    return gated_threshold_forward(gate, up, threshold, down_threshold, activation)


def _masked_product_by_parts(gate, up, thresholds, activation: Callable, counts: Tensor | None) -> Tensor:
    v = activation(gate)
    wide = torch.promote_types(v.dtype, torch.float32)
    v, u = v.to(wide), up.to(wide)
    if counts is not None:
        with torch.no_grad():
            counts += reference.masked_counts(v, u, *thresholds)
    return reference.masked(v, u, *thresholds).to(gate.dtype)


_library = torch.library.Library("cats", "FRAGMENT")  # what is registered lives as long as this
_register()
# Not torch.library.register_autograd, which takes more of the host's time: small models wait for it in training.
_library.impl("gated_threshold", _gated_threshold_autograd, "Autograd")
