"""Finds the MLPs of a model that are exactly zero for many inputs, and how much of each need not be read.

A down projection whose input has zeros can skip their rows whatever computes that input, so no formula has to be known
for it. In a gated MLP that is known to compute down(act(gate) * up), the up rows of zeros are skipped too. An MLP whose
whole formula is known is computed in one call of exact_mlp.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from cats_ext.ops.reference import EXACT_ACTIVATIONS
from cats_ext.patching.detection import (
    ACTIVATION_NAMES,
    PROBE_TOLERANCE,
    GatedMLP,
    OtherFormulaError,
    check_weight,
    describe,
    label_of,
    looks_gated,
    recognise_activation,
    sharing_memory,
)
from cats_ext.patching.exact.modules import ExactDown, ExactMLP, gaussian_multipliers, gaussian_top_k
from cats_ext.patching.mlp import CatsMLP, PatchedMLP
from cats_ext.patching.projections import KINDS, kind_of
from cats_ext.patching.wrappers import only_aligns_devices

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")  # attributes of modules
DOWN = ("down_proj", "fc2", "dense_4h_to_h", "wo")
_GATES = ("gate_proj", "gate_up_proj", "wi_1")
_LEAST_ZEROS = 0.1  # of values between -3 and 3; those of ReLU are 0.5, of GELU and SiLU one value


@dataclass(frozen=True)
class ExactLayer:
    """One MLP with an activation that is exactly zero for many inputs."""

    name: str  # of the module that is patched
    module: nn.Module  # this one
    kind: type[PatchedMLP]  # what it becomes: CatsMLP, ExactMLP or ExactDown
    activation: str
    matrices: int  # of the whole MLP: 3, or 2 without a gate
    down_owner: nn.Module
    mlp: GatedMLP | None = None  # if it is one
    projections: str = "separate"  # in KINDS
    formula: str | None = None  # what exact_mlp calls the activation, if that computes all of it
    multipliers: dict[torch.dtype, float] = field(default_factory=dict)  # as of ExactState
    relu_up: bool = False

    @property
    def down_weight(self) -> Tensor:
        """``[H, I]``, or of experts ``[E, H, I]``."""
        return self.mlp.down_weight if self.mlp else self.down_owner.weight

    @property
    def skipped(self) -> str:
        """What of a zero neuron is not read."""
        return "up and down rows" if self.matrices == 3 and self.kind is not ExactDown else "down rows"

    @property
    def down_name(self) -> str:
        """What errors call it."""
        return self.kind.down_name(self.name, self.projections)


def find_exact_layers(model: nn.Module) -> tuple[list[ExactLayer], dict[str, str]]:
    """The MLPs that gain, in the model's order, and by name why others with such an activation do not.

    Raises:
        ValueError: none gains; the message says what there is instead.
    """
    shared = sharing_memory(model)
    layers, refused, activations = [], {}, Counter()
    for name, module in model.named_modules():
        function = next((f for n in ACTIVATIONS if callable(f := getattr(module, n, None))), None)
        if function is None or not any(n in module._modules or n in module._parameters for n in DOWN):
            continue
        sparsity = _gaussian_sparsity(module)
        activation = recognise_activation(function, EXACT_ACTIVATIONS) or label_of(function)
        if not sparsity and zeros_of(function) < _LEAST_ZEROS:
            activations[activation] += 1
            continue
        try:
            layers.append(_describe_exact(name, module, function, activation, sparsity, shared))
        except ValueError as error:
            refused[name] = str(error)
    if not layers:
        others = ", ".join(f"{activation} in {count}" for activation, count in activations.items())
        found = f"its activations are {others}" if others else "it has no MLP with a known activation"
        if refused:
            name, reason = next(iter(refused.items()))
            found = f"{name} has such an activation, but {reason}"
        raise ValueError(
            f"model of class {type(model).__name__} has no MLP that is exactly zero for many inputs, so that nothing "
            f"can be skipped without changing it: {found}"
        )
    return layers, refused


def zeros_of(function: Callable[[Tensor], Tensor]) -> float:
    """The share of values between -3 and 3 at which ``function`` is exactly zero; 0 if it takes no plain vector."""
    points = torch.linspace(-3, 3, 601)
    try:
        with torch.no_grad():
            values = function(points.clone())
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # not an elementwise function of a CPU tensor
        return 0.0
    if not torch.is_tensor(values) or values.shape != points.shape:
        return 0.0
    return (values == 0).double().mean().item()


def _gaussian_sparsity(module: nn.Module) -> float:
    """The share that Gemma 3n's MLPs set to zero, token by token; 0 for other modules."""
    return float(getattr(module, "activation_sparsity", 0.0)) if hasattr(module, "_gaussian_topk") else 0.0


def _describe_exact(
    name: str, module: nn.Module, function: Callable, activation: str, sparsity: float, shared: set[int]
) -> ExactLayer:
    reason = "its projections are parameters, not modules (experts without a gate)"
    if looks_gated(module):
        try:
            return _describe_gated(name, module, function, activation, sparsity, shared)
        except ValueError as error:
            reason = str(error)
    down_name = next((n for n in DOWN if n in module._modules), None)
    if down_name is None:
        raise ValueError(reason)
    down = module._modules[down_name]
    if not isinstance(down, nn.Linear):
        raise ValueError(f"{down_name} is a {type(down).__module__}.{type(down).__name__}, not a torch.nn.Linear")
    if "forward" in vars(down) and not only_aligns_devices(down):
        raise ValueError(f"the forward of {down_name} has been replaced on the instance")
    check_weight(f"{down_name}.weight", down.weight, shared)
    plain = _plain_projections(module, function) if activation in EXACT_ACTIVATIONS else None
    if plain is not None:
        return ExactLayer(name, module, ExactMLP, activation, 2, down, projections=plain, formula=activation)
    if type(down) is not nn.Linear and not _is_linear(down):
        raise ValueError(f"{down_name} is a {type(down).__module__}.{type(down).__name__} and computes something else")
    return ExactLayer(
        name=f"{name}.{down_name}" if name else down_name,
        module=down,
        kind=ExactDown,
        activation=activation,
        matrices=3 if any(n in module._modules for n in _GATES) else 2,
        down_owner=down,
    )


@torch.no_grad()
def _plain_projections(module: nn.Module, act: Callable[[Tensor], Tensor]) -> str | None:
    """The kind of its projections, if ``module`` has two, an activation, nothing else, and computes down(act(up)).

    It is run on four vectors in training mode, as gated MLPs are; two of them give large values.
    """
    own = next((n for n in ACTIVATION_NAMES if getattr(module, n, None) is act), None)
    for kind in ("plain", "plain_fc"):
        names = KINDS[kind].up, KINDS[kind].down_name
        linears = [module._modules.get(n) for n in names]
        if any(type(linear) is not nn.Linear or linear.weight.is_meta for linear in linears):
            continue
        up, down = linears
        if own is None or {*module._modules, *module._parameters} - {*names, own}:
            return None
        weight = up.weight
        alike = (weight.dtype, weight.device, weight.shape) == (
            down.weight.dtype,
            down.weight.device,
            down.weight.t().shape,
        )
        replaced = "forward" in vars(module) and not only_aligns_devices(module)
        if not alike or type(weight.data) is not Tensor or replaced:
            return None
        x = torch.randn(4, up.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
        x[2:] *= (32 / up(x).float().pow(2).mean().sqrt().clamp(min=1e-3)).to(x.dtype)
        probe = copy.copy(module)
        probe.training = True
        try:
            have = type(module).forward(probe, x)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # it takes something else than one tensor [tokens, hidden_size]
            return None
        want = down(act(up(x))).float()
        if not torch.is_tensor(have) or have.shape != want.shape:
            return None
        difference, largest = (t.nan_to_num(0, 0, 0).abs().amax(-1) for t in (want - have.float(), want))
        return kind if (difference <= PROBE_TOLERANCE.get(x.dtype, 1e-4) * largest).all() else None
    return None


@torch.no_grad()
def _is_linear(down: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes the same (Falcon's rounds once more)."""
    if tuple(down.weight.shape) != (down.out_features, down.in_features):
        return False
    h = torch.randn(2, down.in_features, generator=torch.Generator().manual_seed(0)).to(down.weight)
    want, have = (f(h).float() for f in (partial(nn.Linear.forward, down), partial(type(down).forward, down)))
    return torch.is_tensor(have) and torch.allclose(have, want, rtol=5e-2, atol=5e-2 * want.abs().max().item())


def _describe_gated(
    name: str, module: nn.Module, function: Callable, activation: str, sparsity: float, shared: set[int]
) -> ExactLayer:
    relu_up, formula = False, activation if activation in EXACT_ACTIVATIONS else None
    if not sparsity and activation == "relu":
        try:
            mlp = describe(name, module, shared)
            return ExactLayer(name, module, CatsMLP, activation, 3, mlp.down_owner, mlp)
        except OtherFormulaError:
            relu_up, activation = True, "relu of gate and up"
    multipliers: dict[torch.dtype, float] = {}
    act = function
    if sparsity:
        multipliers = gaussian_multipliers(sparsity, next(module.parameters()).device)
        act = partial(_top_k_activation, function, multipliers)
        activation = f"{activation} of the largest {1 - sparsity:.3g}"
    mlp = describe(name, module, shared, act, torch.relu if relu_up else None)
    if mlp.packed:
        raise ValueError(f"its weights are packed rows and its activation is {activation}, not relu")
    if mlp.experts:
        raise ValueError(f"it is a mixture of experts with the activation {activation}, not relu")
    return ExactLayer(
        name,
        module,
        ExactMLP,
        activation,
        3,
        mlp.down_owner,
        mlp,
        kind_of(mlp.merged, False),
        formula,
        multipliers,
        relu_up,
    )


def _top_k_activation(function: Callable, multipliers: dict[torch.dtype, float], gate: Tensor) -> Tensor:
    return function(gaussian_top_k(gate, multipliers[gate.dtype]))
