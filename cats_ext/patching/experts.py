"""CatsExperts: a block of experts of a mixture (Mixtral, Qwen 3 MoE and others) with the sparse forward.

The weights of all experts are two parameters, as transformers has them since version 5. Which experts a token goes
through stays the router's choice; each of them skips its neurons below the thresholds, which are one for all experts
of a layer: experts that few tokens of the calibration were routed to have too few for thresholds of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops import experts as expert_ops
from cats_ext.ops.definitions import masked_product
from cats_ext.ops.dispatch import DENSE, KERNEL, choose_experts
from cats_ext.patching.mlp import CatsMLP


class CatsExperts(CatsMLP):
    """Experts that compute only the neurons above their thresholds; made from dense ones by ``apply_cats``.

    Few tokens without gradients run ``torch.ops.cats.sparse_experts``. Otherwise transformers' own products run, with
    the mask between them: grouped or batched as the model is configured, or a loop over the experts. Counting
    neurons does too. ``threshold`` and ``down_threshold`` are float32 ``[]``.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` and, of each token, its experts and their weights ``[T, K]``; returns ``[T, H]``."""
        cats, settings, x = self.cats, self.forward_settings, hidden_states
        operands = self.operands()
        implementation = choose_experts(
            x, top_k_weights, operands, counted=settings.tracking, dense_prefill=settings.dense_prefill
        )
        dense = implementation == DENSE or (settings.exact and implementation != KERNEL and not settings.tracking)
        cats.masking = not dense  # for _apply_gate
        if dense:
            return cats.original_class.forward(self, x, top_k_index, top_k_weights)
        if top_k_weights.shape != top_k_index.shape:  # of all experts, in early versions of transformers
            top_k_weights = top_k_weights.gather(-1, top_k_index)
        if implementation == KERNEL:
            mask = self.threshold, self.down_threshold, settings.activation
            return expert_ops.sparse_experts(x, top_k_index, top_k_weights, *operands, *mask)
        if settings.tracking:
            cats.experts_per_token = top_k_index.shape[-1]
        return self._masked(x, top_k_index, top_k_weights)

    def operands(self) -> tuple[Tensor, Tensor] | None:
        """``w_gate_up`` ``[E, 2 I, H]`` and ``w_down_t`` ``[E, I, H]``; None if a module has to be called."""
        parameters = self._parameters
        if not isinstance(self.activation(), str):
            return None
        if "gate_up_proj" not in parameters or "down_proj" not in parameters:
            return None
        return parameters["gate_up_proj"], parameters["down_proj"].mT

    def _masked(self, x: Tensor, experts: Tensor, routing: Tensor) -> Tensor:
        implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
        if implementation in (None, "eager"):
            return self._one_by_one(x, experts, routing)
        # Both leave the gate to the module's _apply_gate.
        from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

        run = batched_mm_experts_forward if implementation == "batched_mm" else grouped_mm_experts_forward
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
        counts = self.counts if self.forward_settings.tracking else None
        return masked_product(gate, up, self.threshold, self.down_threshold, self.activation(), counts)
