"""Distillation: a sparse model under adapters is drawn to the predictions of the dense model that it was made from.

The dense model is the same weights with masking and adapters off, so there is no second copy of it. It is run once
more a step, without gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.patching import masking_disabled

if TYPE_CHECKING:
    from peft import PeftModel

_POSITIONS = 1024  # whose logits are in float32 at a time


@torch.no_grad()
def dense_logits(model: PeftModel, input_ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of the dense model behind the adapters of ``model``, whose base is patched."""
    adapters = model.base_model
    adapters.disable_adapter_layers()  # disable_adapter() walks over the whole model to see how it is, every time
    try:
        with masking_disabled(model):
            return model(input_ids=input_ids, use_cache=False).logits
    finally:
        adapters.enable_adapter_layers()


class _Divergence(torch.autograd.Function):
    """Mean over positions; the gradient, softmax(sparse) - softmax(dense), is all that is kept for backward."""

    @staticmethod
    def forward(ctx, dense: Tensor, sparse: Tensor) -> Tensor:
        gradient, total = torch.empty_like(sparse), sparse.new_zeros((), dtype=torch.float32)
        for p, q, into in zip(
            dense.split(_POSITIONS), sparse.split(_POSITIONS), gradient.split(_POSITIONS), strict=True
        ):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
            into.copy_((log_q.exp() - log_p.exp()) / len(sparse))
        ctx.save_for_backward(gradient)
        return total / len(sparse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad


def divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """Kullback-Leibler divergence of ``sparse`` from ``dense``, logits ``[..., V]``: the mean in nats a position.

    Computed in float32; differentiable by ``sparse``.
    """
    return _Divergence.apply(dense.flatten(0, -2), sparse.flatten(0, -2))
