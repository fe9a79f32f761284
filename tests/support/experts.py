"""A reference and random inputs of routed experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.models import HIDDEN


def experts_ref(x, chosen, routing, gate_up, down, threshold, down_threshold, act=F.silu):
    """The formula of ``cats::sparse_experts``, token by token and expert by expert; ``down`` is ``[E, H, I]``."""
    y = torch.zeros_like(x)
    for t, experts in enumerate(chosen.tolist()):
        for k, e in enumerate(experts):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            v = act(gate)
            h = torch.where(v.abs() >= threshold, v * up, 0)
            if down_threshold is not None:
                h = torch.where(h.abs() >= down_threshold, h, 0)
            y[t] += routing[t, k] * (down[e] @ h)
    return y


def routed(count, experts=4, each=2, device="cpu", dtype=torch.float32):
    """Random tokens ``[count, HIDDEN]``, the experts of each ``[count, each]`` and their weights."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, HIDDEN, generator=generator)
    chosen = torch.rand(count, experts, generator=generator).argsort(-1)[:, :each]
    routing = torch.rand(count, each, generator=generator)
    return x.to(device, dtype), chosen.to(device), routing.to(device, dtype)
