"""Finds the gated MLPs of a model by their structure, and refuses by name what the op would not compute.

A gated MLP is a module with the children gate_proj, up_proj, down_proj (or gate_up_proj, down_proj) and an activation.
That many modules share these names and still compute something else (clamped, scaled or normalised variants) is why
each one is also run on a few vectors and compared with ``down(act(gate) * up)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cats_ext.integrations.accelerate import only_aligns_devices
from cats_ext.reference import ACTIVATIONS

SEPARATE = ("gate_proj", "up_proj", "down_proj")
MERGED = ("gate_up_proj", "down_proj")
ACTIVATION_NAMES = ("act_fn", "activation_fn")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PROBE_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output; others 1e-4


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP of a model: where it is and what it computes."""

    name: str
    module: nn.Module
    activation: str
    merged: bool

    @property
    def down(self) -> nn.Linear:
        return self.module.down_proj

    @property
    def intermediate_size(self) -> int:
        return self.down.in_features

    @property
    def hidden_size(self) -> int:
        return self.down.out_features

    def gate_and_up(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The gate's and the up projection's output, from the outputs of the child modules by name."""
        if self.merged:
            gate, up = outputs["gate_up_proj"].chunk(2, dim=-1)
            return gate, up
        return outputs["gate_proj"], outputs["up_proj"]


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """All gated MLPs of ``model`` in its own order.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: there is none, or one of them cannot run sparsely; the message names the module and the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = model.named_modules(remove_duplicate=False)
    candidates = [(name, module) for name, module in named if _projections(module) is not None]
    if not candidates:
        raise ValueError(
            f"model of class {type(model).__name__} has no gated MLP: no module with the children "
            f"{', '.join(SEPARATE)} or {', '.join(MERGED)}"
        )
    times_seen = Counter(id(module) for _, module in candidates)
    uses = _tensor_uses(model)
    mlps = []
    for name, module in candidates:
        try:
            if times_seen[id(module)] > 1:
                raise ValueError("it is used in more than one place of the model")
            mlps.append(_describe(name, module, uses))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}) cannot run sparsely: {error}") from error
    return mlps


def recognise_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in ``ACTIVATIONS`` of the function that ``function`` computes; None if it is none of them.

    Judged by values rather than by class: libraries have many classes for the same function (two for SiLU, three for
    the tanh GELU in transformers alone). Exact and tanh GELU differ by up to 5e-4, so they are told apart.
    """
    points = torch.linspace(-12, 12, 2401)
    try:
        with torch.no_grad():
            values = function(points.clone())
    except Exception:  # a function that cannot take a plain vector is not one of ours
        return None
    for name, reference in ACTIVATIONS.items():
        if torch.is_tensor(values) and torch.allclose(values, reference(points), rtol=1e-5, atol=1e-5):
            return name
    return None


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the projections if ``module`` looks like a gated MLP or like a block of experts, else None."""
    for names in (SEPARATE, MERGED):
        if all(name in module._modules or name in module._parameters for name in names):
            return names
    return None


def _tensor_uses(model: nn.Module) -> Counter:
    """How many names each parameter or buffer memory has in the model."""
    uses: Counter = Counter()
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        uses.update(_memory(tensor) for _, tensor in named)
    return uses


def _memory(tensor: Tensor) -> object:
    return id(tensor) if tensor.device.type == "meta" or type(tensor.data) is not Tensor else tensor.data_ptr()


def _describe(name: str, module: nn.Module, uses: Counter) -> GatedMLP:
    names = _projections(module)
    merged = names == MERGED
    if any(n in module._parameters for n in names):
        raise ValueError(
            "it is a mixture of experts in one tensor. Which experts a token takes only the device knows, and the "
            "sparse kernel is given the weights of one MLP"
        )
    if "forward" in vars(module) and not only_aligns_devices(module):
        raise ValueError("its forward has been replaced on the instance (offloading hook or another patch)")
    activation_name = next((n for n in ACTIVATION_NAMES if hasattr(module, n)), None)
    if activation_name is None:
        raise ValueError(f"it has none of the attributes {', '.join(ACTIVATION_NAMES)}")
    others = set(module._modules) - {*names, activation_name}
    if others:
        raise ValueError(f"it has further children: {', '.join(sorted(others))}")
    for projection in names:
        _check_linear(projection, getattr(module, projection), uses)
    _check_shapes(module, names, merged)
    function = getattr(module, activation_name)
    activation = recognise_activation(function)
    if activation is None:
        label = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"its activation {label} is none of {', '.join(ACTIVATIONS)}")
    mlp = GatedMLP(name, module, activation, merged)
    _check_formula(mlp)
    return mlp


def _check_linear(projection: str, linear: nn.Module, uses: Counter) -> None:
    kind = type(linear)
    if kind is not nn.Linear:
        raise ValueError(
            f"{projection} is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear (quantised layers are not "
            "supported; adapters are added after patching, or merged before)"
        )
    if linear.weight.is_meta:
        raise ValueError(f"{projection}.weight is on the meta device: load the weights first, without offloading")
    if linear.weight.numel() == 0:
        raise ValueError(f"{projection}.weight must not be empty, got shape {list(linear.weight.shape)}")
    if type(linear.weight.data) is not Tensor:
        raise ValueError(f"{projection}.weight is a {type(linear.weight.data).__name__}, not a plain tensor")
    if linear.weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{projection}.weight must be float32, float16, bfloat16 or float64, got {linear.weight.dtype}"
        )
    if linear.weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{projection}.weight must be on cpu or cuda, got {linear.weight.device}")
    if uses[_memory(linear.weight)] > 1:
        raise ValueError(f"{projection}.weight is shared with another module (tied weights)")


def _check_shapes(module: nn.Module, names: tuple[str, ...], merged: bool) -> None:
    first, down = getattr(module, names[0]), module.down_proj
    rows = down.in_features * (2 if merged else 1)
    expected = (rows, down.out_features)
    for projection in names[:-1]:
        weight = getattr(module, projection).weight
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{projection}.weight must have shape {list(expected)} to fit down_proj.weight "
                f"{list(down.weight.shape)}, got {list(weight.shape)}"
            )
    for projection in names[1:]:
        weight = getattr(module, projection).weight
        if (weight.dtype, weight.device) != (first.weight.dtype, first.weight.device):
            raise ValueError(
                f"{projection}.weight is {weight.dtype} on {weight.device}, but {names[0]}.weight is "
                f"{first.weight.dtype} on {first.weight.device}"
            )


@torch.no_grad()
def _check_formula(mlp: GatedMLP) -> None:
    """Run the module on four vectors: two of unit variance, two that drive the gate far out, where clamps act.

    In training mode, so that dropout shows too: the masked path would leave it out.
    """
    module, weight = mlp.module, mlp.down.weight
    act = ACTIVATIONS[mlp.activation]

    def children(x: Tensor) -> tuple[Tensor, Tensor]:
        names = MERGED[:1] if mlp.merged else SEPARATE[:2]
        return mlp.gate_and_up({name: getattr(module, name)(x) for name in names})

    x = torch.randn(4, mlp.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    gate = children(x)[0].float()
    x[2:] *= (32 / gate.pow(2).mean().sqrt().clamp(min=1e-3)).to(x.dtype)
    gate, up = children(x)
    expected = mlp.down(act(gate) * up)
    was_training, module.training = module.training, True
    try:
        got = module.forward(x)
    except Exception as error:
        raise ValueError(f"its forward fails on one tensor [tokens, hidden_size]: {error}") from error
    finally:
        module.training = was_training
    tolerance = _PROBE_TOLERANCE.get(weight.dtype, 1e-4)
    for want, have in zip(expected.float(), got.float(), strict=True):
        # Where float16 overflows far out, it does so in both.
        difference = (want - have).nan_to_num(0, 0, 0).abs().max()
        if difference > tolerance * want.nan_to_num(0, 0, 0).abs().max():
            raise ValueError(
                "its forward is not down(act(gate) * up): it clamps, scales or normalises in between, or has dropout"
            )
