"""The ops written as their formulas, in PyTorch: slow, and the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}


def _silu_grad(g: Tensor) -> Tensor:
    s = torch.sigmoid(g)
    return s * (1 + g * (1 - s))


def _gelu_grad(g: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(g / math.sqrt(2)))
    return cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)


def _gelu_tanh_grad(g: Tensor) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (g + c * g**3))
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * k * (1 + 3 * c * g * g)


ACTIVATION_GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu_grad,
    "gelu": _gelu_grad,
    "gelu_tanh": _gelu_tanh_grad,
    "relu": lambda g: (g > 0).to(g.dtype),
}


def keep(values: Tensor, threshold: Tensor) -> Tensor:
    """``|values| >= threshold`` as a bool tensor, except that NaN on either side keeps the neuron."""
    return ~(values.abs() < threshold)


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
    h = v * up.to(compute_dtype)
    mask = keep(v, threshold)
    if down_threshold is not None:
        mask = mask & keep(h, down_threshold)
    return torch.where(mask, h, 0).to(gate.dtype)


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
    mask = keep(v, threshold)
    if down_threshold is not None:
        mask = mask & keep(v * u, down_threshold)
    grad_gate = torch.where(mask, grad * u * ACTIVATION_GRADS[activation](g), 0)
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
) -> Tensor:
    """The whole gated MLP with its mask; arguments as in :func:`cats_ext.ops.sparse_mlp`."""

    def linear(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(a.to(compute_dtype), w.to(compute_dtype), None if b is None else b.to(compute_dtype))

    g = linear(x, w_gate, gate_bias)
    u = linear(x, w_up, up_bias)
    h = gated_threshold_ref(g, u, threshold, down_threshold, activation, compute_dtype)
    return linear(h, w_down_t.t(), down_bias).to(x.dtype)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of ``[..., H]``, rounded to x's dtype before and after the weight, as in transformers."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def sparse_mlp_step_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """:func:`sparse_mlp_ref` of the normalised x, not rounded: float32."""
    operands = (rms_norm_ref(x, norm_weight, norm_eps), w_gate, w_up, w_down_t)
    biases = (None if b is None else b.float() for b in (gate_bias, up_bias))
    return sparse_mlp_ref(*(t.float() for t in operands), threshold, down_threshold, activation, *biases)


def sparse_mlp_counts_ref(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """int64 ``[3]``: token-neuron pairs evaluated, kept by ``threshold``, and kept by ``down_threshold`` too."""
    g = F.linear(x.float(), w_gate.float(), None if gate_bias is None else gate_bias.float())
    u = F.linear(x.float(), w_up.float(), None if up_bias is None else up_bias.float())
    return gated_threshold_counts_ref(g, u, threshold, down_threshold, activation)


def gated_threshold_counts_ref(
    gate: Tensor, up: Tensor, threshold: Tensor, down_threshold: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """As :func:`sparse_mlp_counts_ref`, from the projections ``gate`` and ``up`` of shape ``[..., I]``."""
    v = ACTIVATIONS[activation](gate.float())
    kept = keep(v, threshold)
    kept_down = kept if down_threshold is None else kept & keep(v * up.float(), down_threshold)
    return torch.stack([torch.tensor(v.numel(), device=v.device), kept.sum(), kept_down.sum()])
