"""CatsMLP: a model's own gated MLP module with the sparse forward.

Patching changes the class of the module and nothing around it: name, parent, children, parameters, hooks and state
dict stay the same objects, and taking the class back undoes it (``surgery.py``). The down projection's weight keeps
its shape [H, I] and its Parameter; its memory is laid out with one contiguous row a neuron, which both the sparse
kernel and the dense products read, so there is one copy of the weights. So is the gate's, with one contiguous row an
input, where inputs have a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cats_ext.ops.dispatch import DENSE, KERNEL, MASKED, Operands, choose
from cats_ext.parallel.ranks import Shard
from cats_ext.parallel.sharding import local
from cats_ext.patching.detection import ACTIVATION_NAMES
from cats_ext.patching.projections import KINDS
from cats_ext.patching.wrappers import is_observed
from cats_ext.thresholds.config import CatsConfig, LayerConfig


class ForwardSettings(NamedTuple):
    """What ``forward`` reads of a patched module at each call.

    A tuple of constants on the module itself: torch.compile's guards then see that the module's dictionary has not
    changed and look no further. An object that can change would have them look at everything in every layer above it.
    """

    hidden_size: int
    activation: str | None  # None: the module's own is called, because it has been replaced
    own_activation: str | None  # attribute of the module's own, whose hooks count; None where ReLU is computed instead
    projections: str  # in KINDS: a class is no constant for the guards
    dense_prefill: bool
    tracking: bool = False
    exact: bool = False  # only exact zeros are skipped: where the kernel is not taken, the dense model's forward is


@dataclass
class CatsState:
    """What a patched module knows besides its children and settings: where it belongs, how to become what it was."""

    original_class: type[nn.Module]
    own_activation: Callable[[Tensor], Tensor]  # of the module, when it was patched
    relufied: bool  # computes ReLU instead of it
    down_owner: nn.Module  # of the weight that was laid out, also if an adapter has been put in its place
    down_strides: tuple[int, ...]  # of its weight before
    config: CatsConfig  # one for all modules of a model
    name: str  # of this module in the config
    experts_per_token: int = 1  # as last seen while tracking
    masking: bool = True  # in the call of experts in progress
    matrices: int = 3  # of the whole MLP; 2 without a gate
    shard: Shard | None = None  # the neurons that this rank has, if it has not all
    gate_owner: nn.Module | None = None  # of the gate's weight, where that was laid out too
    gate_strides: tuple[int, ...] = ()  # of it before

    @property
    def target(self) -> LayerConfig:
        """The sparsity that the config aims at in this module."""
        return self.config.layers[self.name]

    @property
    def down_weight(self) -> Tensor:
        return self.down_owner.down_proj if self.target.experts else local(self.down_owner.weight)

    @property
    def layouts(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The weights that were laid out, the down projection's first, and their strides before."""
        down = self.down_weight, self.down_strides
        return [down] if self.gate_owner is None else [down, (self.gate_owner.weight, self.gate_strides)]

    def own(self, threshold: Tensor | None) -> Tensor | None:
        """Of a threshold of the config, the part that belongs to the neurons that are here."""
        return threshold if self.shard is None else self.shard.own(threshold)

    def whole(self, threshold: Tensor) -> Tensor:
        """What :meth:`own` has taken its part of; all ranks have to call it."""
        return threshold if self.shard is None else self.shard.whole(threshold)


class PatchedMLP(nn.Module):
    """What a patched module has beside its forward: the state, and what keeps it right while the module is used.

    ``threshold``, ``down_threshold`` (float32, ``[]`` or ``[I]``), ``input_threshold`` (float32 ``[]``) and ``counts``
    (int64 ``[3]``, or ``[4]`` with an input threshold) are buffers outside the state dict. They follow the module from
    device to device and keep their dtype when the model is cast. Of a tensor-parallel model, they are for the neurons
    of this rank.
    """

    cats: CatsState
    forward_settings: ForwardSettings
    threshold: Tensor
    down_threshold: Tensor | None
    input_threshold: Tensor | None
    counts: Tensor

    @classmethod
    def down_name(cls, name: str, projections: str) -> str:
        """What the down projection of the module ``name``, with projections of ``KINDS``, is called in errors."""
        own = KINDS[projections].down_name
        return f"{name}.{own}" if name else own

    def layouts(self, name: str) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """``CatsState.layouts`` of the module ``name``, by what errors call the projections."""
        names = self.down_name(name, self.forward_settings.projections), f"{name}.gate_proj" if name else "gate_proj"
        return dict(zip(names, self.cats.layouts, strict=False))

    def track(self, enabled: bool) -> None:
        """Count neurons from the next call on, or stop."""
        self.forward_settings = self.forward_settings._replace(tracking=enabled)

    @torch.inference_mode()  # where the buffers may have been made, and where any tensor may be written to
    def set_thresholds(self, config: CatsConfig) -> None:
        """Take over the thresholds of ``config``, which have the same shapes, in place."""
        cats = self.cats
        self.threshold.copy_(cats.own(config.thresholds[cats.name]))
        if self.down_threshold is not None:
            self.down_threshold.copy_(cats.own(config.down_thresholds[cats.name]))
        if self.input_threshold is not None:
            self.input_threshold.copy_(config.input_thresholds[cats.name])
        cats.config = config

    def read_activation(self) -> None:
        """Let the settings follow the module's activation, which may have been replaced."""
        cats = self.cats
        name = next(name for name in ACTIVATION_NAMES if hasattr(self, name))
        if getattr(self, name) is not cats.own_activation:
            activation, own = None, name
        else:
            activation, own = cats.target.activation, None if cats.relufied else name
        self.forward_settings = self.forward_settings._replace(activation=activation, own_activation=own)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ACTIVATION_NAMES:
            self.read_activation()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatchedMLP:
        """Moves and casts the module as ever, except that the thresholds keep float32 and their exact values."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class CatsMLP(PatchedMLP):
    """A gated MLP that computes only the neurons above their thresholds; made from a dense one by ``apply_cats``.

    Few tokens without gradients run ``torch.ops.cats.sparse_mlp``, of packed rows ``sparse_mlp_packed`` and with a
    threshold of inputs ``sparse_mlp_columns``, on the children's weights; many tokens the products of the dense layer,
    with the mask applied between them. Whenever a projection is not a bare layer (an adapter at work, a hook), the
    children are called as modules, and so is an activation that has been replaced or has a hook.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        # Runs once a layer and token, so its host time counts. Dictionaries are read directly: nn.Module's attribute
        # lookup costs more than the checks themselves.
        buffers, children = self._buffers, self._modules
        hidden_size, activation, own, kind, dense_prefill, tracking, exact = self.forward_settings
        projections = KINDS[kind]
        implementation, operands = choose(x, hidden_size, projections, children, dense_prefill)
        if implementation == DENSE or (exact and implementation == MASKED and not tracking):
            return self.cats.original_class.forward(self, x)
        counts = buffers["counts"] if tracking else None
        if implementation == KERNEL and activation is not None:
            module = children.get(own)  # hooks for all modules are seen by the projections
            if module is None or not (module._forward_hooks or module._forward_pre_hooks):
                return projections.kernel(x, operands, projections.mask(buffers, activation), counts)
        h = projections.hidden(children, x, projections.mask(buffers, self.activation()), counts)
        return projections.down(children, h)

    def activation(self) -> str | Callable[[Tensor], Tensor]:
        """What is computed: a name, or the module's own where it has been replaced or a hook has to see it."""
        _, activation, own, *_ = self.forward_settings
        module = self._modules.get(own)
        if activation is None:
            return getattr(self, own) if module is None else module
        return activation if module is None or not is_observed(module) else module

    def operands(self) -> Operands | None:
        """The dense weights and biases that the kernel reads; None if there are none, or a module has to be called."""
        if not isinstance(self.activation(), str) or self.forward_settings.projections not in ("separate", "merged"):
            return None
        return KINDS[self.forward_settings.projections].operands(self._modules)

    def extra_repr(self) -> str:
        target = self.cats.target
        shares = f"target sparsity up {target.up_sparsity:.3f}, down {target.down_sparsity:.3f}"
        if self.input_threshold is not None:
            return f"three thresholds, {shares}, input {target.input_sparsity:.3f}"
        return f"{'one threshold' if self.down_threshold is None else 'two thresholds'}, {shares}"
