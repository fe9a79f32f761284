"""CatsMLP: a model's own gated MLP module with the sparse forward.

Patching changes the class of the module and nothing around it: name, parent, children, parameters, hooks and state
dict stay the same objects, and taking the class back undoes it. The down projection's weight keeps its shape [H, I]
and its Parameter; its memory is laid out with one contiguous row a neuron, which both the sparse kernel and the dense
products read, so there is one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from cats_ext.functional import MOST_KERNEL_TOKENS, deterministic, kernel_fits, masked_product, needs_grad
from cats_ext.ops import definitions as ops
from cats_ext.patching.accelerate import only_aligns_devices, rebind_forward
from cats_ext.patching.detection import GatedMLP
from cats_ext.patching.wrappers import under_idle_adapter
from cats_ext.thresholds.config import CatsConfig, LayerConfig

# Looked up once: between two calls the processor forgets where things are in torch's large modules.
_transforms_are_active = torch._C._are_functorch_transforms_active


class CatsForm(NamedTuple):
    """What ``forward`` asks of a patched module at each call.

    A tuple of constants on the module itself: torch.compile's guards then see that the module's dictionary has not
    changed and look no further. An object that can change would have them look at everything in every layer above it.
    """

    hidden_size: int
    activation: str
    merged: bool
    dense_prefill: bool
    tracking: bool = False


@dataclass
class CatsState:
    """What a patched module knows besides its children and form: where it belongs, how to become what it was."""

    original_class: type[nn.Module]
    down_owner: nn.Module  # of the weight that was laid out, also if an adapter has been put in its place
    down_strides: tuple[int, ...]  # of its weight before
    config: CatsConfig  # one for all modules of a model
    name: str  # of this module in the config
    experts_per_token: int = 1  # as last seen while tracking
    masking: bool = True  # in the call of experts under way

    @property
    def target(self) -> LayerConfig:
        """The sparsity that the config aims at in this module."""
        return self.config.layers[self.name]

    @property
    def down_weight(self) -> nn.Parameter:
        return self.down_owner.down_proj if self.target.experts else self.down_owner.weight


class CatsMLP(nn.Module):
    """A gated MLP that computes only the neurons above their thresholds; made from a dense one by ``apply_cats``.

    Few tokens without gradients run ``torch.ops.cats.sparse_mlp`` on the children's weights; many tokens the products
    of the dense layer, with the mask applied between them. Whenever a projection is not a bare ``nn.Linear`` (an
    adapter at work, a hook), the children are called as modules.

    ``threshold``, ``down_threshold`` (float32, ``[]`` or ``[I]``) and ``counts`` (int64 ``[3]``) are buffers outside
    the state dict. They follow the module from device to device and keep their dtype when the model is cast.
    """

    cats: CatsState
    cats_form: CatsForm
    threshold: Tensor
    down_threshold: Tensor | None
    counts: Tensor

    def forward(self, x: Tensor) -> Tensor:
        # Runs once a layer and token, so its host time counts. Dictionaries are read directly: nn.Module's attribute
        # lookup costs more than the checks themselves.
        buffers, children = self._buffers, self._modules
        hidden_size, activation, merged, dense_prefill, tracking = self.cats_form
        if dense_prefill and x.dim() > 1 and x.shape[-2] > 1:
            return self.cats.original_class.forward(self, x)
        # For many tokens on CUDA no further question; elsewhere some dtypes take the kernel for any number.
        fits = (x.numel() <= MOST_KERNEL_TOKENS * hidden_size or not x.is_cuda) and kernel_fits(x, hidden_size)
        threshold, down_threshold = buffers["threshold"], buffers["down_threshold"]
        counts = buffers["counts"] if tracking else None
        if fits:
            weights = None
            if (linear := _bare_linear(children["down_proj"])) is not None:
                if merged:
                    weights = _merged_weights(children["gate_up_proj"])
                else:
                    weights = _separate_weights(children["gate_proj"], children["up_proj"])
            if weights is not None:
                w_gate, w_up, gate_bias, up_bias = weights
                w_down, down_bias = linear._parameters["weight"], linear._parameters["bias"]
                rows = w_down.stride(0) == 1  # one contiguous row a neuron
                if rows and not (is_grad_enabled() and needs_grad(x, w_down, down_bias, *weights)):
                    rule = threshold, down_threshold, activation, gate_bias, up_bias, down_bias, deterministic()
                    if counts is not None:
                        return ops.sparse_mlp_counted(x, w_gate, w_up, w_down.t(), counts, *rule)
                    return ops.sparse_mlp(x, w_gate, w_up, w_down.t(), *rule)
        elif not (merged or tracking or is_compiling()):
            gate, up, down = children["gate_proj"], children["up_proj"], children["down_proj"]
            grad = is_grad_enabled()
            if _are_plain(gate, up, down) and not (grad and _have_backward_hooks(gate, up, down)):
                # As below, without the host's time for calling modules, which prompts of a few hundred tokens wait for.
                gate, up, down = gate._parameters, up._parameters, down._parameters
                g, u = F.linear(x, gate["weight"], gate["bias"]), F.linear(x, up["weight"], up["bias"])
                if grad or _transforms_are_active():
                    h = ops.eager_gated_threshold(g, u, threshold, down_threshold, activation)
                else:
                    h = ops.gated_threshold_forward(g, u, threshold, down_threshold, activation)
                return F.linear(h, down["weight"], down["bias"])
        if merged:
            gate, up = children["gate_up_proj"](x).chunk(2, dim=-1)
        else:
            gate, up = children["gate_proj"](x), children["up_proj"](x)
        return children["down_proj"](masked_product(gate, up, threshold, down_threshold, activation, counts))

    def kernel_operands(self) -> tuple[Tensor | str | None, ...] | None:
        """What ``ops.sparse_mlp`` takes for this module after x, but for ``deterministic``.

        None where a projection has to be called as a module or its weight has another layout.
        """
        children, down = self._modules, _bare_linear(self.down_proj)
        if down is None or down.weight.stride(0) != 1:
            return None
        if self.cats_form.merged:
            weights = _merged_weights(children["gate_up_proj"])
        else:
            weights = _separate_weights(children["gate_proj"], children["up_proj"])
        if weights is None:
            return None
        rule = self.threshold, self.down_threshold, self.cats_form.activation
        return *weights[:2], down.weight.t(), *rule, *weights[2:], down.bias

    def track(self, enabled: bool) -> None:
        """Count neurons from the next call on, or stop."""
        self.cats_form = self.cats_form._replace(tracking=enabled)

    @torch.inference_mode()  # where the buffers may have been made, and where any tensor may be written to
    def set_thresholds(self, config: CatsConfig) -> None:
        """Take over the thresholds of ``config``, which have the same shapes, in place."""
        cats = self.cats
        self.threshold.copy_(config.thresholds[cats.name])
        if self.down_threshold is not None:
            self.down_threshold.copy_(config.down_thresholds[cats.name])
        cats.config = config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CatsMLP:
        """Moves and casts the module as ever, except that the thresholds keep float32 and their exact values."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        rule = "one threshold" if self.down_threshold is None else "two thresholds"
        target = self.cats.target
        return f"{rule}, target sparsity up {target.up_sparsity:.3f}, down {target.down_sparsity:.3f}"


def _bare_linear(module: nn.Module) -> nn.Linear | None:
    """The Linear whose weight gives what calling ``module`` gives; None where ``module`` has to be called."""
    linear = module if type(module) is nn.Linear else under_idle_adapter(module)
    if (
        type(linear) is nn.Linear
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and ("forward" not in linear.__dict__ or only_aligns_devices(linear))
    ):
        return linear
    return None


def _are_plain(gate: nn.Module, up: nn.Module, down: nn.Module) -> bool:
    """Whether all are Linear and nothing is on them but what waits for gradients."""
    if not (type(gate) is nn.Linear and type(up) is nn.Linear and type(down) is nn.Linear):
        return False
    g, u, d = gate.__dict__, up.__dict__, down.__dict__
    return not (
        (g["_forward_hooks"] or u["_forward_hooks"] or d["_forward_hooks"])
        or (g["_forward_pre_hooks"] or u["_forward_pre_hooks"] or d["_forward_pre_hooks"])
        or ("forward" in g or "forward" in u or "forward" in d)
    )


def _have_backward_hooks(*modules: nn.Module) -> bool:
    return any(module._backward_hooks or module._backward_pre_hooks for module in modules)


def _separate_weights(gate: nn.Module, up: nn.Module) -> tuple[Tensor | None, ...] | None:
    """``w_gate, w_up`` and their biases, or None where a projection has to be called as a module."""
    gate, up = _bare_linear(gate), _bare_linear(up)
    if gate is None or up is None:
        return None
    gate, up = gate._parameters, up._parameters
    return gate["weight"], up["weight"], gate["bias"], up["bias"]


def _merged_weights(gate_up: nn.Module) -> tuple[Tensor | None, ...] | None:
    gate_up = _bare_linear(gate_up)
    if gate_up is None:
        return None
    bias = gate_up._parameters["bias"]
    return *gate_up._parameters["weight"].chunk(2), *((None, None) if bias is None else bias.chunk(2))


def make_sparse(mlp: GatedMLP, config: CatsConfig, neuron_rows: bool = True) -> None:
    """Turn one dense module into a :class:`CatsMLP`. If interrupted, :func:`make_dense` undoes what was done.

    Without ``neuron_rows`` the weight's memory stays as it is, and the module takes the dense path.
    """
    module, weight = mlp.module, mlp.down_weight
    # First of all, so that make_dense knows what there is to undo.
    module.cats = CatsState(
        type(module),
        mlp.down_owner,
        weight.stride(),
        config,
        mlp.name,
    )
    module.cats_form = CatsForm(mlp.hidden_size, mlp.activation, mlp.merged, dense_prefill=not config.sparse_prefill)
    if neuron_rows:
        weight.data = weight.data.mT.contiguous().mT
    thresholds = {"threshold": config.thresholds[mlp.name], "down_threshold": config.down_thresholds.get(mlp.name)}
    with torch.inference_mode(False):  # they are written to later, also outside of it
        for name, value in thresholds.items():
            copy = None if value is None else value.detach().to(weight.device, torch.float32, copy=True)
            module.register_buffer(name, copy, persistent=False)
        module.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device=weight.device), persistent=False)
    set_class(module, sparse_class(module))


def sparse_class(module: nn.Module) -> type[CatsMLP]:
    """What a module that has been made sparse computes as."""
    if module.cats.target.experts is None:
        return CatsMLP
    from cats_ext.patching.experts import CatsExperts

    return CatsExperts


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` does, under a hook too; its state stays."""
    module.__class__ = kind
    module.cats_form = module.cats_form._replace()  # another object: compiled models look at the module again
    rebind_forward(module)


def make_dense(module: nn.Module) -> None:
    """Turn a :class:`CatsMLP`, whole or half made, back into what it was. Safe to call again if interrupted."""
    state: CatsState | None = vars(module).get("cats")
    if state is None:
        return
    if "cats_form" in vars(module):
        set_class(module, state.original_class)
        del module.cats_form
    for name in ("threshold", "down_threshold", "counts"):
        if name in module._buffers:
            delattr(module, name)
    weight = state.down_weight
    if weight.stride() != state.down_strides:
        dense = torch.empty_strided(weight.shape, state.down_strides, dtype=weight.dtype, device=weight.device)
        weight.data = dense.copy_(weight.data)
    del module.cats
