"""The masked product of a gated MLP, ``act(gate) * up`` of the kept neurons: its autograd, and one function to call.

``torch.ops.cats.gated_threshold`` has a derivative, which costs the host time even where nobody asks for it.
``gated_threshold_forward`` has none: it is the same kernel below autograd. :func:`masked_product` chooses between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from cats_ext.ops import definitions as ops
from cats_ext.ops import reference

# Bound at import: a lookup in torch's large modules at each call misses the processor's cache between layers.
_transforms_are_active = torch._C._are_functorch_transforms_active


def masked_product(
    gate: Tensor,
    up: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None,
    activation: str,
    counts: Tensor | None = None,
) -> Tensor:
    """``act(gate) * up`` of the neurons above their thresholds, and 0 elsewhere. Differentiable by ``gate`` and ``up``.

    Small layers wait for the host. ``gated_threshold`` goes through the dispatcher's autograd keys, whose code is cold
    between layers: inside a model the call took 57 to 59 us, and 10 in a loop. So it is used only where it is needed,
    by torch.compile and functorch; otherwise the autograd function or the op below autograd is called directly
    (bench/results/h100/decode_host.log).

    Args:
        gate, up: ``[..., I]``, float32, float16, bfloat16 or float64.
        threshold, down_threshold: float32, ``[]`` or ``[I]``.
        activation: silu, gelu, gelu_tanh or relu.
        counts: int64 ``[3]``, added to: token-neuron pairs evaluated, kept by ``threshold``, kept by both.

    Returns:
        ``[..., I]`` in the dtype of ``gate``.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    if counts is not None:
        with torch.no_grad():
            counts += reference.gated_threshold_counts_ref(gate, up, threshold, down_threshold, activation)
    if is_compiling() or _transforms_are_active():
        return ops.gated_threshold(gate, up, threshold, down_threshold, activation)
    if is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _apply(gate, up, (threshold, down_threshold, activation))
    return ops.gated_threshold_forward(gate, up, threshold, down_threshold, activation)


class _GatedThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, mask):
        threshold, down_threshold, activation = mask
        ctx.save_for_backward(gate, up, threshold, down_threshold)
        ctx.activation = activation
        return ops.gated_threshold_forward(gate, up, threshold, down_threshold, activation)

    @staticmethod
    def backward(ctx, grad_h):
        if is_grad_enabled():  # create_graph
            return _backward_once(ctx, grad_h)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, grad_h)


def _backward(ctx, grad_h: Tensor) -> tuple[Tensor, Tensor, None]:
    return *ops.gated_threshold_backward(grad_h, *ctx.saved_tensors, ctx.activation), None


_backward_once = torch.autograd.function.once_differentiable(_backward)  # a second derivative is an error

# What Function.apply calls after it has looked for functorch's transforms, which takes as long as all the rest of it.
_apply = super(torch.autograd.Function, _GatedThreshold).apply


def _gated_threshold_autograd(gate, up, threshold, down_threshold=None, activation="silu"):
    if is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedThreshold.apply(gate, up, (threshold, down_threshold, activation))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.cats.gated_threshold.default(gate, up, threshold, down_threshold, activation)


# torch.library.register_autograd takes more of the host's time, which small models wait for in training.
_library = torch.library.Library("cats", "FRAGMENT")  # the registration lives as long as this object
_library.impl("gated_threshold", _gated_threshold_autograd, "Autograd")
