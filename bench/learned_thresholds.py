"""Thresholds learned while a model is tuned: one factor a layer for each of the two thresholds, at a budget of bytes.

A mask has no gradient by its threshold; its expectation has. The pseudo-derivative is that of JumpReLU autoencoders
(arXiv 2407.14435, eq. 11 and 12): a rectangle of ``width`` around the threshold stands for the density there. A
quadratic price keeps the share of MLP weights that a token reads at the budget, so layers trade with each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from cats_ext import modules, ops, reference
from cats_ext.patching import sparse_mlps


class LearnThresholds(TrainerCallback):
    """Adam on the factors' logarithms, at a rate that falls to 0; the thresholds in use are always the learned ones."""

    def __init__(self, budget: float, rate: float = 0.01, width: float = 0.2, price: float = 1000.0) -> None:
        self.budget, self.rate, self.width, self.price = budget, rate, width, price

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.layers = list(sparse_mlps(model).values())
        self.first = [(mlp.threshold.clone(), mlp.down_threshold.clone()) for mlp in self.layers]
        device = self.layers[0].threshold.device
        self.factors = [torch.zeros(2, device=device, requires_grad=True) for _ in self.layers]
        self.index = {mlp.threshold.data_ptr(): i for i, mlp in enumerate(self.layers)}
        self.read = torch.zeros(len(self.layers), device=device)  # share of the weights, by layer, of this batch
        self.optimizer = torch.optim.Adam(self.factors, lr=self.rate)
        self.product, modules.masked_product = modules.masked_product, self.masked_product

    def masked_product(self, gate: Tensor, up: Tensor, threshold: Tensor, *rest: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.product(gate, up, threshold, *rest)
        layer = self.index[threshold.data_ptr()]
        return _Learned.apply(gate, up, self.factors[layer], threshold, rest[0], rest[1], self, layer)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 - state.global_step / state.max_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for mlp, factor, (threshold, down_threshold) in zip(self.layers, self.factors, self.first, strict=True):
            up, down = factor.exp()
            mlp.threshold.copy_(threshold * up)
            mlp.down_threshold.copy_(down_threshold * down)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        modules.masked_product = self.product


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, factor, threshold, down_threshold, activation, learner, layer):
        ctx.save_for_backward(gate, up, threshold, down_threshold)
        ctx.activation, ctx.learner, ctx.layer = activation, learner, layer
        counts = reference.gated_threshold_counts_ref(gate, up, threshold, down_threshold, activation)
        learner.read[layer] = (1 + (counts[1] + counts[2]) / counts[0]) / 3
        return ops.gated_threshold(gate, up, threshold, down_threshold, activation)

    @staticmethod
    def backward(ctx, grad_h):
        gate, up, threshold, down_threshold = ctx.saved_tensors
        learner, width = ctx.learner, 2 * ctx.learner.width
        grads = ops.gated_threshold_backward(grad_h, gate, up, threshold, down_threshold, ctx.activation)
        v = reference.ACTIVATIONS[ctx.activation](gate.float())
        h = v * up.float()
        kept, down_kept = (reference.keep(x, t) for x, t in ((v, threshold), (h, down_threshold)))
        near, down_near = ((x.abs() - t).abs() < learner.width * t for x, t in ((v, threshold), (h, down_threshold)))
        change = grad_h.float() * h  # of the loss, for a neuron that is kept instead of dropped
        by_up, by_down = near & down_kept, down_near & kept
        loss = torch.stack([(change * by_up).sum(), (change * by_down).sum()])
        read = torch.stack([near.sum() + by_up.sum(), by_down.sum()]) / (3 * v.numel() * len(learner.layers))
        over = learner.price * (learner.read.mean() - learner.budget)
        return *grads, -(loss + over * read) / width, None, None, None, None, None
