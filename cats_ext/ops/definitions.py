"""The torch ops: schemas, shape functions, and the reference as a fallback.

The schemas live here so that ``torch.ops.cats.*`` exists on every machine; ``csrc/ops_cpu.cpp`` and
``csrc/ops_cuda.cu`` only register kernels. ``sparse_mlp`` carries no autograd: a Python-registered one costs about six
microseconds a call even under ``no_grad``. Training goes through ``gated_threshold`` (see ``masked_product.py``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from cats_ext.ops import reference
from cats_ext.ops.library import LIBRARIES
from cats_ext.ops.reference import ACTIVATIONS

_WEIGHTS = "Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t"
_RULE = "Tensor threshold, Tensor? down_threshold=None, str activation='silu'"
_REST = "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None, bool deterministic=False"

SCHEMAS = {
    # deterministic: the same bits in every run on the same device, at some cost on CUDA; on the CPU they always are.
    "sparse_mlp": f"({_WEIGHTS}, {_RULE}, {_REST}) -> Tensor",
    # As sparse_mlp, and adds to counts (int64 [3]): token-neuron pairs evaluated, kept by threshold, kept by both.
    "sparse_mlp_counted": f"({_WEIGHTS}, Tensor(a!) counts, {_RULE}, {_REST}) -> Tensor",
    # For a step of decoding: one token, whose row x is first normalised (RMS). Adds y, in float32, to y_sum [H + 1],
    # which is zero before; what is behind H is the kernel's. The kernel before it on the stream must not write weights.
    # CUDA says of layers that it has no such kernel for, small ones among them, that they are not supported.
    "sparse_mlp_step": f"(Tensor x, Tensor norm_weight, float norm_eps, {_WEIGHTS.removeprefix('Tensor x, ')}, "
    f"Tensor(a!) y_sum, {_RULE}, Tensor? gate_bias=None, Tensor? up_bias=None) -> ()",
    "gated_threshold": f"(Tensor gate, Tensor up, {_RULE}) -> Tensor",
    # The same kernel without autograd, whose registration costs the host time at each call (see masked_product.py).
    "gated_threshold_forward": f"(Tensor gate, Tensor up, {_RULE}) -> Tensor",
    "gated_threshold_backward": f"(Tensor grad_h, Tensor gate, Tensor up, {_RULE}) -> (Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"cats::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

sparse_mlp = torch.ops.cats.sparse_mlp
sparse_mlp_counted = torch.ops.cats.sparse_mlp_counted
sparse_mlp_step = torch.ops.cats.sparse_mlp_step
gated_threshold = torch.ops.cats.gated_threshold
gated_threshold_forward = torch.ops.cats.gated_threshold_forward
gated_threshold_backward = torch.ops.cats.gated_threshold_backward

SPARSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTWISE_DTYPES = (*SPARSE_DTYPES, torch.float64)


def _check(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise RuntimeError(message())


def _check_activation(op: str, activation: str) -> None:
    _check(
        activation in ACTIVATIONS,
        lambda: f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'",
    )


def _check_like(op: str, name: str, t: Tensor | None, like_name: str, like: Tensor, shape: tuple) -> None:
    if t is None:
        return
    _check(t.dtype == like.dtype, lambda: f"{op}: {name} must have {like_name}'s dtype {like.dtype}, got {t.dtype}")
    _check(
        t.device == like.device, lambda: f"{op}: {name} must be on {like_name}'s device {like.device}, got {t.device}"
    )
    _check(tuple(t.shape) == shape, lambda: f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")


def _check_thresholds(op: str, like: Tensor, intermediate: int, **thresholds: Tensor | None) -> None:
    for name, t in thresholds.items():
        if t is None:
            continue
        _check(t.dtype == torch.float32, lambda n=name, t=t: f"{op}: {n} must be torch.float32, got {t.dtype}")
        _check(
            t.device == like.device,
            lambda n=name, t=t: f"{op}: {n} must be on the device {like.device} of the other arguments, got {t.device}",
        )
        _check(
            t.dim() == 0 or tuple(t.shape) == (intermediate,),
            lambda n=name, t=t: f"{op}: {n} must have shape [] or [{intermediate}], got {list(t.shape)}",
        )


def _check_gated_threshold(gate, up, threshold, down_threshold, activation) -> None:
    op = "gated_threshold"
    _check(
        gate.dtype in ELEMENTWISE_DTYPES,
        lambda: f"{op}: gate must be float32, float16, bfloat16 or float64, got {gate.dtype}",
    )
    _check(gate.dim() >= 1, lambda: f"{op}: gate must have at least one dimension, got shape {list(gate.shape)}")
    _check_like(op, "up", up, "gate", gate, tuple(gate.shape))
    _check_thresholds(op, gate, gate.shape[-1], threshold=threshold, down_threshold=down_threshold)
    _check_activation(op, activation)


# --- shape functions: the checks of csrc/checks.h, so that torch.compile fails at trace time with the same sentence ---


def _sparse_mlp_fake(
    x,
    w_gate,
    w_up,
    w_down_t,
    threshold,
    down_threshold=None,
    activation="silu",
    gate_bias=None,
    up_bias=None,
    down_bias=None,
    deterministic=False,
):
    op = "sparse_mlp"
    _check(x.dtype in SPARSE_DTYPES, lambda: f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    _check(x.dim() >= 1, lambda: f"{op}: x must have at least one dimension, got shape {list(x.shape)}")
    _check(w_gate.dim() == 2, lambda: f"{op}: w_gate must have shape [I, H], got {list(w_gate.shape)}")
    intermediate, hidden = w_gate.shape
    _check(intermediate > 0 and hidden > 0, lambda: f"{op}: w_gate must have I > 0 and H > 0, got {list(w_gate.shape)}")
    _check(x.shape[-1] == hidden, lambda: f"{op}: x must have last dimension H = {hidden}, got shape {list(x.shape)}")
    for name, w in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
        _check_like(op, name, w, "x", x, (intermediate, hidden))
        _check(
            hidden == 1 or w.stride(1) == 1,
            lambda n=name, w=w: (
                f"{op}: {n} must have unit stride in its last dimension, got strides {list(w.stride())}"
                + ("; lay down_proj.weight out with one contiguous row a neuron" if n == "w_down_t" else "")
            ),
        )
    _check_thresholds(op, x, intermediate, threshold=threshold, down_threshold=down_threshold)
    _check_activation(op, activation)
    for name, bias, size in (
        ("gate_bias", gate_bias, intermediate),
        ("up_bias", up_bias, intermediate),
        ("down_bias", down_bias, hidden),
    ):
        _check_like(op, name, bias, "x", x, (size,))
        _check(
            bias is None or size == 1 or bias.stride(0) == 1,
            lambda n=name, b=bias: f"{op}: {n} must be contiguous, got stride {b.stride(0)}",
        )
    return x.new_empty(x.shape)


def _sparse_mlp_counted_fake(x, w_gate, w_up, w_down_t, counts, *rule, **named):
    _check(
        counts.dtype == torch.int64 and tuple(counts.shape) == (3,) and counts.device == x.device,
        lambda: (
            f"sparse_mlp: counts must be int64 of shape [3] on {x.device}, "
            f"got {counts.dtype} of shape {list(counts.shape)} on {counts.device}"
        ),
    )
    return _sparse_mlp_fake(x, w_gate, w_up, w_down_t, *rule, **named)


def _sparse_mlp_step_fake(x, norm_weight, norm_eps, w_gate, w_up, w_down_t, y_sum, *rule, **named):
    op, hidden = "sparse_mlp_step", w_gate.shape[-1]
    _sparse_mlp_fake(x, w_gate, w_up, w_down_t, *rule, **named)
    _check(x.numel() == hidden, lambda: f"{op}: x must be one contiguous row, got shape {list(x.shape)}")
    _check_like(op, "norm_weight", norm_weight, "x", x, (hidden,))
    _check(
        y_sum.dtype == torch.float32 and y_sum.dim() == 1 and len(y_sum) > hidden and y_sum.device == x.device,
        lambda: (
            f"{op}: y_sum must be contiguous float32 of shape [H + 1] on {x.device}, "
            f"got {y_sum.dtype} of shape {list(y_sum.shape)} on {y_sum.device}"
        ),
    )


def _gated_threshold_fake(gate, up, threshold, down_threshold=None, activation="silu"):
    _check_gated_threshold(gate, up, threshold, down_threshold, activation)
    return gate.new_empty(gate.shape)


def _gated_threshold_backward_fake(grad_h, gate, up, threshold, down_threshold=None, activation="silu"):
    _check_gated_threshold(gate, up, threshold, down_threshold, activation)
    _check_like("gated_threshold", "grad_h", grad_h, "gate", gate, tuple(gate.shape))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


# --- the reference, on every device that has no compiled kernel -----------------------------------------------------


def _sparse_mlp_fallback(x, w_gate, w_up, w_down_t, *rule, deterministic=False, **named):
    rule = rule[:6]  # a seventh is deterministic, as the reference is
    _sparse_mlp_fake(x, w_gate, w_up, w_down_t, *rule, **named)
    return reference.sparse_mlp_ref(x, w_gate, w_up, w_down_t, *rule, **named)


def _sparse_mlp_counted_fallback(x, w_gate, w_up, w_down_t, counts, *rule, deterministic=False, **named):
    rule = rule[:6]
    _sparse_mlp_counted_fake(x, w_gate, w_up, w_down_t, counts, *rule, **named)
    counts += reference.sparse_mlp_counts_ref(
        x, w_gate, w_up, *rule[:5], **{k: v for k, v in named.items() if k != "down_bias"}
    )
    return reference.sparse_mlp_ref(x, w_gate, w_up, w_down_t, *rule, **named)


def _sparse_mlp_step_fallback(x, norm_weight, norm_eps, w_gate, w_up, w_down_t, y_sum, *rule, **named):
    _sparse_mlp_step_fake(x, norm_weight, norm_eps, w_gate, w_up, w_down_t, y_sum, *rule, **named)
    y_sum[: x.numel()] += reference.sparse_mlp_step_ref(
        x, norm_weight, norm_eps, w_gate, w_up, w_down_t, *rule, **named
    ).flatten()


def _gated_threshold_fallback(*args, **named):
    _gated_threshold_fake(*args, **named)
    return reference.gated_threshold_ref(*args, **named)


def _gated_threshold_backward_fallback(*args, **named):
    _gated_threshold_backward_fake(*args, **named)
    return reference.gated_threshold_backward_ref(*args, **named)


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
    implementations = {
        "sparse_mlp": (_sparse_mlp_fake, _sparse_mlp_fallback),
        "sparse_mlp_counted": (_sparse_mlp_counted_fake, _sparse_mlp_counted_fallback),
        "gated_threshold": (_gated_threshold_fake, _gated_threshold_fallback),
        "gated_threshold_forward": (_gated_threshold_fake, _gated_threshold_fallback),
        "gated_threshold_backward": (_gated_threshold_backward_fake, _gated_threshold_backward_fallback),
    }
    # The CPU gains nothing by it, and has no kernel.
    torch.library.register_fake("cats::sparse_mlp_step", _sparse_mlp_step_fake)
    torch.library.register_kernel("cats::sparse_mlp_step", "cpu", _sparse_mlp_step_fallback)
    if not LIBRARIES["_C_cuda"].loaded:
        torch.library.register_kernel("cats::sparse_mlp_step", "cuda", _sparse_mlp_step_fallback)
    uncompiled = [d for d, lib in (("cpu", "_C"), ("cuda", "_C_cuda")) if not LIBRARIES[lib].loaded]
    for name, (fake, fallback) in implementations.items():
        torch.library.register_fake(f"cats::{name}", fake)
        for device in uncompiled:

            def slow(*args, _device=device, _fallback=fallback, **named):
                _warn_slow(_device)
                return _fallback(*args, **named)

            torch.library.register_kernel(f"cats::{name}", device, slow)


_register()
