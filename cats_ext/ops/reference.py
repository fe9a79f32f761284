"""The ops written as their formulas, in PyTorch: slow, and the definition of correct."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.rows import RowFormat

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}
EXACT_ACTIVATIONS = ACTIVATIONS | {"relu2": lambda g: F.relu(g).square()}  # of exact_mlp

# The gradient by g, of the gradient by act(g).
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, g: torch.ops.aten.gelu_backward(grad, g, approximate="tanh"),
    "relu": lambda grad, g: grad * (g > 0),
}


def keep(values: Tensor, threshold: Tensor) -> Tensor:
    """``|values| >= threshold`` as a bool tensor, except that NaN on either side keeps the neuron."""
    return ~(values.abs() < threshold)


def _keep_both(v: Tensor, h: Tensor, threshold: Tensor, down_threshold: Tensor | None) -> Tensor:
    kept = keep(v, threshold)
    return kept if down_threshold is None else kept & keep(h, down_threshold)


def masked(v: Tensor, u: Tensor, threshold: Tensor, down_threshold: Tensor | None) -> Tensor:
    """``v * u`` where the activation's output ``v`` and the product are above their thresholds, and 0 elsewhere."""
    h = v * u
    return torch.where(_keep_both(v, h, threshold, down_threshold), h, 0)


def masked_counts(v: Tensor, u: Tensor, threshold: Tensor, down_threshold: Tensor | None) -> Tensor:
    """int64 ``[3]``: token-neuron pairs evaluated, kept by ``threshold``, and kept by ``down_threshold`` too."""
    kept, kept_by_both = keep(v, threshold).sum(), _keep_both(v, v * u, threshold, down_threshold).sum()
    return torch.stack(
        [torch.full_like(kept, v.numel()), kept, kept_by_both]
    )  # no copy from the host: graphs capture it


def gated_threshold_ref(
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``mask * act(gate) * up`` of shape ``[..., I]``, computed in ``compute_dtype`` and rounded once."""
    compute_dtype = torch.promote_types(compute_dtype, gate.dtype)
    v = ACTIVATIONS[activation](gate.to(compute_dtype))
    return masked(v, up.to(compute_dtype), threshold, down_threshold).to(gate.dtype)


def gated_threshold_backward_ref(
    grad_h: Tensor,
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`gated_threshold_ref` by ``gate`` and ``up``; the mask is a constant, as in training CATS."""
    compute_dtype = torch.promote_types(compute_dtype, gate.dtype)
    g, u, grad = gate.to(compute_dtype), up.to(compute_dtype), grad_h.to(compute_dtype)
    v = ACTIVATIONS[activation](g)
    mask = _keep_both(v, v * u, threshold, down_threshold)
    grad_gate = torch.where(mask, ACTIVATION_GRADS[activation](grad * u, g), 0)
    grad_up = torch.where(mask, grad * v, 0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


def sparse_mlp_ref(
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
    compute_dtype: torch.dtype = torch.float32,
    counts: Tensor | None = None,
    for_gate: Tensor | None = None,
) -> Tensor:
    """The whole gated MLP with its mask; arguments as in :func:`cats_ext.functional.sparse_mlp`.

    Args:
        for_gate: what the gate takes instead of ``x``.
    """

    def linear(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(a.to(compute_dtype), w.to(compute_dtype), None if b is None else b.to(compute_dtype))

    g = linear(x if for_gate is None else for_gate, w_gate, gate_bias)
    u = linear(x, w_up, up_bias)
    if counts is not None:
        counts += gated_threshold_counts_ref(g, u, threshold, down_threshold, activation)
    h = gated_threshold_ref(g, u, threshold, down_threshold, activation, compute_dtype)
    return linear(h, w_down_t.t(), down_bias).to(x.dtype)


def kept_inputs(x: Tensor, input_threshold: Tensor) -> Tensor:
    """Which elements of ``x`` the gate sees under an ``input_threshold`` ``[]``, as a bool tensor."""
    return keep(x.float(), input_threshold)


def sparse_mlp_columns_ref(
    x: Tensor, w_gate_t: Tensor, *, input_threshold: Tensor, counts: Tensor | None = None, **rest: Any
) -> Tensor:
    """As :func:`sparse_mlp_ref`, with the gate transposed, which does not see inputs below ``input_threshold`` ``[]``.

    Args:
        w_gate_t: ``[H, I]``.
        counts: int64 ``[4]``; token-input pairs kept come last.
        rest: as there, by name.
    """
    kept = kept_inputs(x, input_threshold)
    if counts is not None:
        counts[3] += kept.sum()
        rest["counts"] = counts[:3]
    return sparse_mlp_ref(x, w_gate_t.t(), for_gate=torch.where(kept, x, 0), **rest)


def activated_mlp_ref(
    v: Tensor,
    w_down_t: Tensor,
    down_bias: Tensor | None = None,
    x: Tensor | None = None,
    w_up: Tensor | None = None,
    up_bias: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """An MLP from its activations on: ``h Wd + bd`` with ``h = v * (x Wu + bu)``, or ``h = v`` without x and w_up.

    A zero in ``v`` gives a zero in ``h`` whatever ``x Wu`` is; the kernels then read neither row of that neuron.

    Args:
        v: ``[..., I]``, float32, float16 or bfloat16.
        w_down_t: ``[I, H]``, with one contiguous row a neuron; ``w_up`` likewise.
        x: ``[..., H]``, with w_up only.
        down_bias, up_bias: ``[H]`` and ``[I]``.

    Returns:
        ``[..., H]`` in v's dtype.
    """
    wide = lambda t: None if t is None else t.to(compute_dtype)  # noqa: E731
    h = wide(v)
    if x is not None:
        h = torch.where(h == 0, 0, h * F.linear(wide(x), wide(w_up), wide(up_bias)))
    return F.linear(h, wide(w_down_t).t(), wide(down_bias)).to(v.dtype)


def exact_mlp_ref(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down_t: Tensor,
    activation: str = "relu",
    deviations: float | None = None,
    relu_up: bool = False,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """An MLP that is sparse by itself: ``h Wd + bd``, with ``h`` as :func:`exact_hidden_ref` computes it.

    Args:
        x: ``[..., H]``, float32, float16 or bfloat16.
        w_gate, w_up, w_down_t: ``[I, H]``, with one contiguous row a neuron. Without w_up, w_gate is the projection
            before the activation, whatever a model calls it.
        activation: relu, relu2 (its square), silu, gelu or gelu_tanh.
        deviations: of a cutoff (Gemma 3n); rounded to x's dtype by the caller. Not with relu_up.
        relu_up: ``h = v * relu(u)`` (dReLU). The kernels then read no down row of a zero in ``h``.
        gate_bias, up_bias, down_bias: ``[I]``, ``[I]`` and ``[H]``.

    Returns:
        ``[..., H]`` in x's dtype.
    """
    h = exact_hidden_ref(x, w_gate, w_up, activation, deviations, relu_up, gate_bias, up_bias, compute_dtype)
    wide = lambda t: None if t is None else t.to(compute_dtype)  # noqa: E731
    return F.linear(h, wide(w_down_t).t(), wide(down_bias)).to(x.dtype)


def exact_hidden_ref(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    activation: str = "relu",
    deviations: float | None = None,
    relu_up: bool = False,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``h = v * u``, or ``v``, ``[..., I]`` in ``compute_dtype``, with ``v = act(x Wg + bg)`` and ``u = x Wu + bu``.

    With a cutoff ``v = act(relu(g - c))``, where ``c = mean(g) + deviations * std(g)`` over a token's gates ``g``, the
    deviation being biased. The gate and what is computed from it are rounded to x's dtype, operation by operation, as
    a model's own modules round them. A zero in ``v`` gives a zero in ``h`` whatever ``u`` is: no row of it is read.
    """
    wide = lambda t: None if t is None else t.to(compute_dtype)  # noqa: E731
    rounded = lambda t: t.to(x.dtype).to(compute_dtype)  # noqa: E731
    g = rounded(F.linear(wide(x), wide(w_gate), wide(gate_bias)))
    if deviations is not None:
        mean, deviation = g.mean(-1, keepdim=True), g.std(-1, keepdim=True, unbiased=False)
        g = F.relu(rounded(g - rounded(rounded(mean) + rounded(rounded(deviation) * deviations))))
    v = rounded(EXACT_ACTIVATIONS[activation](g))
    if w_up is None:
        return v
    u = F.linear(wide(x), wide(w_up), wide(up_bias))
    return torch.where(v == 0, 0, v * (u.relu() if relu_up else u))


def unpack_rows_ref(rows: Tensor, row_format: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The weights in ``rows``, uint8 ``[I, bytes]``, as dense ones ``[I, columns]``: in float32, then rounded."""
    form = RowFormat.parse(row_format)
    q, scales, zeros = form.fields(rows, columns)
    return form.decode(q.unflatten(1, (scales.shape[1], -1)), scales, zeros).flatten(1).to(dtype)


def packed_matmul_ref(
    x: Tensor, rows: Tensor, row_format: str, columns: int, input_rows: bool = False, bias: Tensor | None = None
) -> Tensor:
    """``x W^T + bias`` for packed rows of ``W`` ``[N, columns]``; with ``input_rows`` ``x W + bias``.

    Weights are rounded to the dtype of ``x``, and products are added in at least float32.
    """
    weight = unpack_rows_ref(rows, row_format, columns, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ (weight if input_rows else weight.t()).to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def sparse_mlp_packed_ref(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    gate_format: str,
    up_format: str,
    down_format: str,
    *args,
    **named,
) -> Tensor:
    """:func:`sparse_mlp_ref` on the weights that the packed rows stand for."""
    packed = ((w_gate, gate_format), (w_up, up_format), (w_down_t, down_format))
    weights = (unpack_rows_ref(w, name, x.shape[-1], torch.float32) for w, name in packed)
    return sparse_mlp_ref(x, *weights, *args, **named)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of ``[..., H]``, rounded to x's dtype before and after the weight, as in transformers."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def merged_attention_ref(weighted: Tensor, largest: Tensor, total: Tensor) -> Tensor:
    """The attention ``[heads * D]``, in float32, that partial results over parts of the keys stand for.

    Args:
        weighted: ``[S, heads, D]``, sums of values weighted by exp(score - largest).
        largest, total: ``[S, heads]``, the largest score and the sum of the weights.
    """
    weights = (largest - largest.amax(0)).exp()
    return ((weighted * weights[..., None]).sum(0) / (total * weights).sum(0)[..., None]).flatten()


def packed_linear_step_ref(
    x: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    weights: list[Tensor],
    row_format: str,
    biases: list[Tensor],
    residual: Tensor | None,
    largest: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    x_new: Tensor | None,
) -> None:
    row = x if largest is None else merged_attention_ref(x, largest, total).to(y.dtype)
    if delta is not None:
        row = row + delta.to(row.dtype)
    if x_new is not None:
        x_new.copy_(row)
    if norm_weight is not None:
        row = rms_norm_ref(row, norm_weight, norm_eps)
    unpacked = (unpack_rows_ref(w, row_format, row.numel(), row.dtype) for w in weights)
    products = [F.linear(row, w, b) for w, b in zip(unpacked, biases or [None] * len(weights), strict=True)]
    result = torch.cat(products)
    y.copy_(result if residual is None else residual + result)


def gated_threshold_counts_ref(
    gate: Tensor, up: Tensor, threshold: Tensor, down_threshold: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """:func:`masked_counts` of the gate's and the up projection's output."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return masked_counts(ACTIVATIONS[activation](gate.to(wide)), up.to(wide), threshold, down_threshold)


def gated_threshold_counted_ref(gate: Tensor, up: Tensor, counts: Tensor, *rule: Any, **named: Any) -> Tensor:
    """:func:`gated_threshold_ref`, with :func:`gated_threshold_counts_ref` added to ``counts`` ``[3]``."""
    counts += gated_threshold_counts_ref(gate, up, *rule, **named)
    return gated_threshold_ref(gate, up, *rule, **named)
