"""The op of routed experts for few tokens: a mixture's MLPs, each token through those it was routed to.

On the CPU each expert with tokens is one call of ``cats::sparse_mlp``. On CUDA, Triton kernels read the chosen experts
on the device, so that the host does not wait and a graph can capture the op.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from cats_ext.ops import definitions as ops
from cats_ext.ops.reference import ACTIVATIONS

torch.library.define(
    "cats::sparse_experts",
    "(Tensor x, Tensor experts, Tensor routing, Tensor w_gate_up, Tensor w_down_t, Tensor threshold, "
    "Tensor? down_threshold=None, str activation='silu') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
sparse_experts = torch.ops.cats.sparse_experts
"""``y[t] = sum_k routing[t, k] MLP_e(x[t])`` with ``e = experts[t, k]``, each MLP as in ``cats::sparse_mlp``.

Args:
    x: ``[T, H]``, float32, float16 or bfloat16.
    experts, routing: int64 and floating point ``[T, K]``. An index outside ``[0, E)`` is an error on the CPU and gives
        NaN on CUDA.
    w_gate_up: ``[E, 2 I, H]``, of each expert the gate's rows before those of up.
    w_down_t: ``[E, I, H]``, the down projections with one contiguous row a neuron.
    threshold, down_threshold: float32 ``[]``, for all experts.

Returns:
    ``[T, H]`` in x's dtype, summed in float32 in a fixed order: the same bits in every run.
"""


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _mistake(x, experts, routing, w_gate_up, w_down_t, threshold, down_threshold=None, activation="silu") -> str | None:
    """What is wrong with the arguments of a call, if anything is."""
    tensors = dict(x=x, experts=experts, routing=routing, w_gate_up=w_gate_up, w_down_t=w_down_t, threshold=threshold)
    absent = next((name for name, t in tensors.items() if t is None), None)
    if absent is not None:
        return f"{absent} must be a tensor, got None"
    if x.dtype not in ops.SPARSE_DTYPES:
        return f"x must be float32, float16 or bfloat16, got {x.dtype}"
    if x.dim() != 2:
        return f"x must have shape [T, H], got {list(x.shape)}"
    if w_down_t.dim() != 3:
        return f"w_down_t must have shape [E, I, H], got {list(w_down_t.shape)}"
    count, intermediate, hidden = w_down_t.shape
    if x.shape[1] != hidden:
        return f"x must have shape [T, {hidden}], got {list(x.shape)}"
    for name, w, rows in (("w_gate_up", w_gate_up, 2 * intermediate), ("w_down_t", w_down_t, intermediate)):
        if w.dtype != x.dtype:
            return f"{name} must have x's dtype {x.dtype}, got {w.dtype}"
        if w.device != x.device:
            return f"{name} must be on x's device {x.device}, got {w.device}"
        if tuple(w.shape) != (count, rows, hidden):
            return f"{name} must have shape {[count, rows, hidden]}, got {list(w.shape)}"
        if hidden != 1 and w.stride(2) != 1:
            return f"{name} must have unit stride in its last dimension, got {list(w.stride())}"
    if experts.dtype != torch.int64 or experts.dim() != 2 or experts.shape[0] != x.shape[0]:
        return f"experts must be int64 [{x.shape[0]}, K], got {experts.dtype} {list(experts.shape)}"
    if not routing.is_floating_point() or routing.shape != experts.shape:
        return f"routing must be floating point {list(experts.shape)}, got {routing.dtype} {list(routing.shape)}"
    thresholds = {"threshold": threshold}
    if down_threshold is not None:
        thresholds["down_threshold"] = down_threshold
    for name, t in thresholds.items():
        if t.dtype != torch.float32 or t.dim() != 0:
            return f"{name} must be float32 of shape [], got {t.dtype} {list(t.shape)}"
    for name, t in {"experts": experts, "routing": routing, **thresholds}.items():
        if t.device != x.device:
            return f"{name} must be on x's device {x.device}, got {t.device}"
    if activation not in ACTIVATIONS:
        return f"activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'"
    return None


def _check(*arguments) -> None:
    mistake = _mistake(*arguments)
    if mistake is not None:
        raise RuntimeError(f"sparse_experts: {mistake}")


def _fake(x, *arguments):
    _check(x, *arguments)
    return x.new_empty(x.shape)


def _sparse_experts_cpu(
    x: Tensor, experts: Tensor, routing: Tensor, w_gate_up: Tensor, w_down_t: Tensor, *mask: Tensor | str | None
) -> Tensor:
    _check(x, experts, routing, w_gate_up, w_down_t, *mask)
    (tokens, per_token), (count, intermediate, hidden) = experts.shape, w_down_t.shape
    out = x.new_empty(tokens * per_token, hidden)
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(experts.flatten().tolist()):
        places.setdefault(expert, []).append(place)
    for expert, where in places.items():
        if not 0 <= expert < count:
            raise RuntimeError(f"sparse_experts: experts must be in [0, {count}), got {expert}")
        w_gate_up_e = w_gate_up.select(0, expert)  # select and narrow: indexing takes twice the host time
        w_gate, w_up = w_gate_up_e.narrow(0, 0, intermediate), w_gate_up_e.narrow(0, intermediate, intermediate)
        rows = x if tokens == 1 else x[[place // per_token for place in where]]
        y = ops.sparse_mlp(rows, w_gate, w_up, w_down_t.select(0, expert), *mask)
        if len(where) == 1:
            out.narrow(0, where[0], 1).copy_(y)
        else:
            out[where] = y.expand(len(where), hidden)
    return (out.view(tokens, per_token, hidden).float() * routing.float()[:, :, None]).sum(1).to(x.dtype)


def _sparse_experts_cuda(*arguments) -> Tensor:
    from cats_ext.ops.triton_experts import launch

    _check(*arguments)
    return launch(*arguments)


def _refuse_transforms(*arguments) -> Tensor:
    raise RuntimeError("sparse_experts: it has no derivatives and no batching rule, call the patched module instead")


_library = torch.library.Library("cats", "FRAGMENT")  # what is registered lives as long as this
_library.impl("sparse_experts", _refuse_transforms, "FuncTorchDynamicLayerFrontMode")
ops.refuse_other_layouts(_library, "sparse_experts")
torch.library.register_fake("cats::sparse_experts", _fake)
torch.library.register_kernel("cats::sparse_experts", "cpu", _sparse_experts_cpu)
torch.library.register_kernel("cats::sparse_experts", "cuda", _sparse_experts_cuda)
