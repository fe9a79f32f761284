"""What the gate, up and down projections of a patched module are: children, separate or merged, dense or packed rows.

Each kind looks its children up at every call, since PEFT replaces them. An adapter at work, a hook or a replaced
forward means that a child has to be called; one that only moves inputs to its device (accelerate) or an idle adapter
does not. A module with other projections (parallel linears) is one more kind.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, is_grad_enabled, nn
from torch.nn.functional import linear as linear_product

from cats_ext.ops import definitions as ops
from cats_ext.ops.dispatch import MAX_PACKED_TOKENS, Mask, Operands, Projections, deterministic
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


class PackedOperands(NamedTuple):
    """As :data:`Operands`, with the names of the rows' formats."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    formats: tuple[str, str, str]


class PackedProjections(SeparateProjections):
    """As :class:`SeparateProjections`, of children that hold packed rows."""

    max_tokens = MAX_PACKED_TOKENS

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

    max_tokens = MAX_PACKED_TOKENS

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


# By the name in a module's ForwardSettings.
KINDS: dict[str, type[Projections]] = {
    "separate": SeparateProjections,
    "merged": MergedProjections,
    "packed": PackedProjections,
    "packed_merged": PackedMergedProjections,
}


def kind_of(merged: bool, packed: bool) -> str:
    """The name in ``KINDS``."""
    return ("packed_merged" if merged else "packed") if packed else ("merged" if merged else "separate")


def readable_linears(*modules: nn.Module, kind: type[nn.Module] = nn.Linear) -> list[nn.Module] | None:
    """Each module's linear layer, of this class exactly; None if one of the modules has to be called instead."""
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
        if "forward" in linear.__dict__ and not only_aligns_devices(linear):
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
