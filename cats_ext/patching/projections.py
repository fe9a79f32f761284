"""What the projections of a patched module are: children, separate or merged, dense, packed rows, or a rank's part.

Each kind looks its children up at every call, since PEFT replaces them. An adapter at work, a hook or a replaced
forward means that a child has to be called; one that only moves inputs to its device (accelerate) or an idle adapter
does not. A module with other projections is one more kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, is_grad_enabled, nn
from torch.nn.functional import linear as linear_product

from cats_ext.ops import definitions as ops
from cats_ext.ops.dispatch import (
    ColumnsOfGate,
    Mask,
    Operands,
    Projections,
    column_rows_fit,
    deterministic,
    needs_grad,
    packed_kernel_fits,
)
from cats_ext.parallel.sharding import is_sharded, local
from cats_ext.patching.wrappers import (
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    only_aligns_devices,
    under_idle_adapter,
)
from cats_ext.rows import QuantizedLinear


class SeparateProjections(Projections):
    """The children gate_proj, up_proj and down_proj (Llama and its relatives). The source is the module's children."""

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> Operands | None:
        found = readable_linears(source["gate_proj"], source["up_proj"], source["down_proj"])
        if found is None:
            return None
        gate, up, down = (linear._parameters for linear in found)
        w_down = down["weight"]
        if w_down.stride(0) != 1:  # not one contiguous row a neuron
            return None
        return (gate["weight"], up["weight"], w_down.t()), (gate["bias"], up["bias"], down["bias"])

    @staticmethod
    def gate_up(source: dict[str, nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
        return call_linear(source["gate_proj"], x), call_linear(source["up_proj"], x)

    @staticmethod
    def down(source: dict[str, nn.Module], h: Tensor) -> Tensor:
        return call_linear(source["down_proj"], h)


class ColumnProjections(ColumnsOfGate, SeparateProjections):
    """As :class:`SeparateProjections`, of a gate that gets only the inputs above their threshold."""

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> Operands | None:
        operands = SeparateProjections.operands(source)
        if operands is None:
            return None
        (w_gate, w_up, w_down_t), biases = operands
        weights = w_gate.t(), w_up, w_down_t
        if w_gate.stride(0) != 1 or not column_rows_fit(weights):
            return None
        return weights, biases

    @staticmethod
    def gate_up(source: dict[str, nn.Module], x: Tensor, for_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gate = call_linear(source["gate_proj"], x if for_gate is None else for_gate)
        return gate, call_linear(source["up_proj"], x)


class MergedProjections(SeparateProjections):
    """The children gate_up_proj, with the gate's rows before those of up, and down_proj (Phi-3)."""

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> Operands | None:
        found = readable_linears(source["gate_up_proj"], source["down_proj"])
        if found is None:
            return None
        gate_up, down = (linear._parameters for linear in found)
        w_down, bias = down["weight"], gate_up["bias"]
        if w_down.stride(0) != 1:
            return None
        w_gate, w_up = gate_up["weight"].chunk(2)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        return (w_gate, w_up, w_down.t()), (gate_bias, up_bias, down["bias"])

    @staticmethod
    def gate_up(source: dict[str, nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = call_linear(source["gate_up_proj"], x).chunk(2, dim=-1)
        return gate, up


class PlainProjections(Projections):
    """Two children and no gate. Of the operands, the gate's are those of the child ``up``, and up's are None."""

    up, down_name = "up_proj", "down_proj"

    @classmethod
    def operands(cls, source: dict[str, nn.Module]) -> Operands | None:
        found = readable_linears(source[cls.up], source[cls.down_name])
        if found is None:
            return None
        up, down = (linear._parameters for linear in found)
        w_down = down["weight"]
        if w_down.stride(0) != 1:
            return None
        return (up["weight"], None, w_down.t()), (up["bias"], None, down["bias"])

    @classmethod
    def gate_up(cls, source: dict[str, nn.Module], x: Tensor) -> tuple[Tensor, None]:
        return call_linear(source[cls.up], x), None


class FcProjections(PlainProjections):
    """As :class:`PlainProjections`, of children that are called fc1 and fc2."""

    up, down_name = "fc1", "fc2"


class PackedOperands(NamedTuple):
    """As :data:`Operands`, with the names of the rows' formats."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    formats: tuple[str, str, str]


class PackedProjections(SeparateProjections):
    """As :class:`SeparateProjections`, of children that hold packed rows."""

    kernel_fits = staticmethod(packed_kernel_fits)

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> PackedOperands | None:
        found = readable_linears(source["gate_proj"], source["up_proj"], source["down_proj"], kind=QuantizedLinear)
        if found is None:
            return None
        weights, biases = zip(*((p["weight"], p["bias"]) for p in (f._parameters for f in found)), strict=True)
        return PackedOperands(weights, biases, tuple(linear.row_format.name for linear in found))

    @staticmethod
    def kernel(x: Tensor, operands: PackedOperands, mask: Mask, counts: Tensor | None) -> Tensor:
        weights, biases, formats = operands
        if counts is not None:
            return ops.sparse_mlp_packed_counted(x, *weights, counts, *formats, *mask, *biases, deterministic())
        return ops.sparse_mlp_packed(x, *weights, *formats, *mask, *biases, deterministic())


class PackedMergedProjections(MergedProjections):
    """As :class:`MergedProjections`, of children that hold packed rows."""

    kernel_fits = staticmethod(packed_kernel_fits)

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> PackedOperands | None:
        found = readable_linears(source["gate_up_proj"], source["down_proj"], kind=QuantizedLinear)
        if found is None:
            return None
        gate_up, down = found
        bias = gate_up._parameters["bias"]
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        name = gate_up.row_format.name
        weights = *gate_up._parameters["weight"].chunk(2), down._parameters["weight"]
        return PackedOperands(
            weights, (gate_bias, up_bias, down._parameters["bias"]), (name, name, down.row_format.name)
        )

    kernel = PackedProjections.kernel


class ShardedOperands(NamedTuple):
    """As :data:`Operands`, of this rank's neurons, with the group over which the outputs are summed up."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    group: dist.ProcessGroup


class ShardedProjections(SeparateProjections):
    """As :class:`SeparateProjections`, of children that transformers' tensor parallelism has left this rank's part of.

    The children themselves take and give plain tensors, and the down projection sums up over the ranks. Their
    parameters are DTensors, whose part is read without autograd: where a gradient is needed, the children are called.
    """

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> ShardedOperands | None:
        found = readable_linears(source["gate_proj"], source["up_proj"], source["down_proj"], forward=is_sharded)
        if found is None or any(needs_grad(*linear._parameters.values()) for linear in found):
            return None
        (w_gate, w_up, w_down), biases = zip(*map(_own_parameters, found), strict=True)
        if w_down.stride(0) != 1:
            return None
        return ShardedOperands((w_gate, w_up, w_down.t()), biases, found[-1].weight.device_mesh.get_group())

    @staticmethod
    def kernel(x: Tensor, operands: ShardedOperands, mask: Mask, counts: Tensor | None) -> Tensor:
        weights, (gate_bias, up_bias, down_bias), group = operands
        y = Projections.kernel(x, (weights, (gate_bias, up_bias, None)), mask, counts)
        dist.all_reduce(y, group=group)
        return y if down_bias is None else y + down_bias


class ShardedMergedProjections(MergedProjections):
    """As :class:`ShardedProjections`, of gate_up_proj, which has the rows of this rank's neurons of both."""

    @staticmethod
    def operands(source: dict[str, nn.Module]) -> ShardedOperands | None:
        found = readable_linears(source["gate_up_proj"], source["down_proj"], forward=is_sharded)
        if found is None or any(needs_grad(*linear._parameters.values()) for linear in found):
            return None
        (gate_up, bias), (w_down, down_bias) = map(_own_parameters, found)
        if w_down.stride(0) != 1:
            return None
        biases = *((None, None) if bias is None else bias.chunk(2)), down_bias
        return ShardedOperands((*gate_up.chunk(2), w_down.t()), biases, found[-1].weight.device_mesh.get_group())

    kernel = ShardedProjections.kernel


# By the name in a module's ForwardSettings.
KINDS: dict[str, type[Projections]] = {
    "separate": SeparateProjections,
    "columns": ColumnProjections,
    "merged": MergedProjections,
    "plain": PlainProjections,
    "plain_fc": FcProjections,
    "packed": PackedProjections,
    "packed_merged": PackedMergedProjections,
    "sharded": ShardedProjections,
    "sharded_merged": ShardedMergedProjections,
}


def kind_of(merged: bool, packed: bool, sharded: bool = False, columns: bool = False) -> str:
    """The name in ``KINDS``; with ``columns`` of a gate that is read by them, which is none of the others."""
    if columns:
        return "columns"
    if not (packed or sharded):
        return "merged" if merged else "separate"
    return ("packed" if packed else "sharded") + ("_merged" if merged else "")


def _own_parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """What this rank has of the weight and the bias."""
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    return local(weight), None if bias is None else local(bias)


def readable_linears(
    *modules: nn.Module,
    kind: type[nn.Module] = nn.Linear,
    forward: Callable[[nn.Module], bool] = only_aligns_devices,
) -> list[nn.Module] | None:
    """Each module's linear layer, of this class exactly; None if one of the modules has to be called instead.

    Args:
        forward: whether one that has been set on the instance may be left out.
    """
    if FORWARD_HOOKS or FORWARD_PRE_HOOKS:
        return None
    found = []
    for module in modules:
        linear = module
        if type(linear) is not kind:
            linear = under_idle_adapter(module)
            if type(linear) is not kind:
                return None
        # Attributes, not items of __dict__, for which torch.compile's guards would look at every layer.
        if linear._forward_hooks or linear._forward_pre_hooks:
            return None
        if "forward" in linear.__dict__ and not forward(linear):
            return None
        found.append(linear)
    return found


def call_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``, without the host's time for calling a module where it is an ``nn.Linear`` and nothing is on it.

    Prompts of a few hundred tokens wait for that time.
    """
    if (  # is_observed, without the time of a call
        type(linear) is not nn.Linear
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or FORWARD_HOOKS
        or FORWARD_PRE_HOOKS
        or "forward" in linear.__dict__
        or (
            is_grad_enabled()
            and (linear._backward_hooks or linear._backward_pre_hooks or BACKWARD_HOOKS or BACKWARD_PRE_HOOKS)
        )
    ):
        return linear(x)
    parameters = linear._parameters
    return linear_product(x, parameters["weight"], parameters["bias"])
