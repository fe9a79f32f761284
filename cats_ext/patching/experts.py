"""CatsExperts: a block of experts of a mixture (Mixtral, Qwen 3 MoE and others) with the sparse forward.

The weights of all experts are two parameters, as transformers has them since version 5. Which experts a token goes
through stays the router's choice; each of them skips its neurons below the thresholds, which are one for all experts
of a layer: experts that few tokens of the calibration were routed to have too few for thresholds of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.functional import experts_fit, masked_product, needs_grad
from cats_ext.ops import experts as expert_ops
from cats_ext.patching.mlp import CatsMLP

# transformers' ways to run experts that leave the gate to the module's _apply_gate
_GROUPED, _BATCHED = "grouped_mm", "batched_mm"


class CatsExperts(CatsMLP):
    """Experts that compute only the neurons above their thresholds; made from dense ones by ``apply_cats``.

    Few tokens without gradients run ``torch.ops.cats.sparse_experts``. Otherwise transformers' own products run, with
    the mask between them: grouped or batched as the model is configured, or a loop over the experts. Counting
    neurons takes that way too. ``threshold`` and ``down_threshold`` are float32 ``[]``.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` and, of each token, its experts and their weights ``[T, K]``; returns ``[T, H]``."""
        cats, form, x = self.cats, self.cats_form, hidden_states
        cats.masking = not (form.dense_prefill and len(x) > 1)
        if not cats.masking:
            return cats.original_class.forward(self, x, top_k_index, top_k_weights)
        if top_k_weights.shape != top_k_index.shape:  # of all experts, in early versions of transformers
            top_k_weights = top_k_weights.gather(-1, top_k_index)
        if not form.tracking and _kernel_fits(self, x, top_k_weights):
            return expert_ops.sparse_experts(
                x,
                top_k_index,
                top_k_weights,
                self.gate_up_proj,
                self.down_proj.mT,
                self.threshold,
                self.down_threshold,
                form.activation,
            )
        if form.tracking:
            cats.experts_per_token = top_k_index.shape[-1]
        return self._masked(x, top_k_index, top_k_weights)

    def _masked(self, x: Tensor, experts: Tensor, routing: Tensor) -> Tensor:
        way = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if way in (None, "eager"):
            return self._one_by_one(x, experts, routing)
        from transformers.integrations import moe

        run = moe.batched_mm_experts_forward if way == _BATCHED else moe.grouped_mm_experts_forward
        return run(self, x, experts, routing)

    def _one_by_one(self, x: Tensor, experts: Tensor, routing: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            h = self._apply_gate(F.linear(x[token], self.gate_up_proj[expert]))
            out = F.linear(h, self.down_proj[expert]) * routing[token, place, None]
            y.index_add_(0, token, out.to(y.dtype))
        return y

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The masked product, called by transformers' products of experts between the two projections."""
        if not self.cats.masking:
            return self.cats.original_class._apply_gate(self, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        counts = self.counts if self.cats_form.tracking else None
        return masked_product(gate, up, self.threshold, self.down_threshold, self.cats_form.activation, counts)


def _kernel_fits(module: CatsExperts, x: Tensor, routing: Tensor) -> bool:
    parameters = module._parameters
    if "gate_up_proj" not in parameters or "down_proj" not in parameters:  # an adapter is at work
        return False
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    return (
        experts_fit(x)
        and (not x.is_cuda or expert_ops.triton_installed())
        and down.stride(-2) == 1  # one contiguous row a neuron
        and not (torch.is_grad_enabled() and needs_grad(x, routing, gate_up, down))
    )
