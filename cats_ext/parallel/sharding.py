"""What transformers' tensor parallelism makes of the projections of an MLP, which it is not imported for.

``from_pretrained(..., tp_plan=...)`` makes each parameter a DTensor, which has this rank's part of it, and replaces
``forward`` on the layer (``TensorParallelLayer.install_forward``). The gate and up projection get the whole input and
give this rank's neurons; the down projection takes these, and adds up the products of all ranks.
"""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from cats_ext.parallel.ranks import Shard

# Of the projections: the style of the plan, and the layouts with which its input and output are plain tensors.
_STYLES: dict[str, tuple[str, str, dict[str, str]]] = {
    "gate_proj": ("colwise", "ColwiseParallel", {"input_layouts": "Replicate()", "output_layouts": "Shard(dim=-1)"}),
    "up_proj": ("colwise", "ColwiseParallel", {"input_layouts": "Replicate()", "output_layouts": "Shard(dim=-1)"}),
    "gate_up_proj": ("packed_colwise", "PackedColwiseParallel", {"split_factor": "2"}),
    "down_proj": ("rowwise", "RowwiseParallel", {"input_layouts": "Shard(dim=-1)", "output_layouts": "Replicate()"}),
}


def is_sharded(layer: nn.Module) -> bool:
    """Whether the ``forward`` set on the instance is that of tensor parallelism. Asked at each call of an MLP."""
    forward = layer.__dict__.get("forward")
    return type(forward) is FunctionType and forward.__code__.co_name == "tp_forward"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, the tensor itself: ``to_local`` may make another one. Others as they are."""
    return getattr(tensor, "_local_tensor", tensor)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that ``model`` is spread over; None if it is no model, or not tensor-parallel."""
    if not isinstance(model, nn.Module):
        return None
    hooks = (_hook(layer) for layer in model.modules() if is_sharded(layer))
    return next((hook["mesh"].get_group() for hook in hooks if "mesh" in hook), None)  # norms of heads have none


def gathered_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole weights of a tensor-parallel model, on a rank that is to ``keep`` them; all ranks have to call it."""
    gathered = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            gathered[name] = whole
    return gathered


def check_on_one_rank(model: nn.Module, function: str) -> None:
    """Raise ValueError if ``model``, an argument of ``function``, is tensor-parallel."""
    if group_of(model) is not None:
        raise ValueError(f"model of class {type(model).__name__} is tensor-parallel, which {function} does not support")


def find_shard(module: nn.Module, names: tuple[str, ...]) -> Shard | None:
    """The neurons that this rank has of an MLP whose projections have these names; None if it has them all.

    Raises:
        ValueError: the projections are sharded in a way in which a rank does not have the whole weights of a neuron.
    """
    layers = {name: module._modules[name] for name in names}
    if not any(map(is_sharded, layers.values())):
        return None
    for name, layer in layers.items():
        _check_style(name, layer)
    weight, mesh = layers["down_proj"].weight, _hook(layers["down_proj"])["mesh"]
    ranks, rank, total = mesh.size(), mesh.get_local_rank(), weight.shape[1]
    if total % ranks:
        raise ValueError(f"the number of ranks must divide its {total} neurons, got {ranks}")
    neurons = total // ranks
    return Shard(mesh.get_group(), local(weight).device, rank * neurons, neurons, total)


def _check_style(name: str, layer: nn.Module) -> None:
    style, kind, layouts = _STYLES[name]
    hook = _hook(layer) if is_sharded(layer) else {}
    found = hook.get("self")
    fits = (
        type(found).__name__ == kind
        and getattr(found, "use_local_output", False)
        and all(repr(getattr(found, key, None)) == layout for key, layout in layouts.items())
        and getattr(hook["original_forward"], "__func__", None) is type(layer).forward
        and all(hasattr(parameter, "to_local") for parameter in layer.parameters())
    )
    if not fits:
        raise ValueError(
            f"its tensor-parallel plan must have {style!r} for {name} and nothing else on it, got "
            f"{'no rule' if found is None else describe_style(found)}"
        )


def describe_style(style: Any) -> str:
    layouts = (f"{key}={getattr(style, key)}" for key in ("input_layouts", "output_layouts") if hasattr(style, key))
    return f"{type(style).__name__}({', '.join(layouts)})"


def _hook(layer: nn.Module) -> dict[str, Any]:
    """The variables of the ``forward`` that tensor parallelism has set: ``self``, ``mesh``, ``original_forward``."""
    forward = layer.__dict__["forward"]
    return dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))


def with_bare_layers(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A shallow copy of a sharded MLP that computes this rank's part of its output, without the down projection's bias.

    Its forward does not communicate.
    """
    bare = copy.copy(module)
    bare._modules = module._modules | {name: _bare(module._modules[name], name != "down_proj") for name in names}
    return bare


def _bare(layer: nn.Linear, with_bias: bool) -> nn.Linear:
    weight = local(layer.weight)
    bias = local(layer.bias) if with_bias and layer.bias is not None else None
    bare = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    bare.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        bare.bias = nn.Parameter(bias, requires_grad=False)
    return bare
