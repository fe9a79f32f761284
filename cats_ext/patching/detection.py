"""Finds the gated MLPs of a model by their structure, and refuses by name what the op would not compute.

A gated MLP is a module with the children gate_proj, up_proj, down_proj (or gate_up_proj, down_proj) and an activation,
or a block of such MLPs, the experts of a mixture, whose weights are parameters [E, 2I, H] and [E, H, I] of those names.
Some modules have these names and compute something else: they clamp, scale or normalise. So each one is also run on a
few vectors and compared with ``down(act(gate) * up)``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.wrappers import only_aligns_devices

SEPARATE = ("gate_proj", "up_proj", "down_proj")
MERGED = ("gate_up_proj", "down_proj")
ACTIVATION_NAMES = ("act_fn", "activation_fn")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_PROBED_EXPERTS = (0, 1, 2, -1)  # modulo their number
PROBE_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output; others 1e-4


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP of a model: where it is and what it computes."""

    name: str
    module: nn.Module
    activation: str
    merged: bool
    experts: int | None = None  # how many of them are in one module

    @property
    def down_owner(self) -> nn.Module:
        """The module that holds the down projection's weight."""
        return self.module if self.experts else self.module.down_proj

    @property
    def down_weight(self) -> Tensor:
        """``[H, I]``, or of experts ``[E, H, I]``."""
        return self.module.down_proj if self.experts else self.module.down_proj.weight

    @property
    def intermediate_size(self) -> int:
        return self.down_weight.shape[-1]

    @property
    def hidden_size(self) -> int:
        return self.down_weight.shape[-2]

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
    check_module(model)
    named = model.named_modules(remove_duplicate=False)
    candidates = [(name, module) for name, module in named if _projections(module) is not None]
    if not candidates:
        raise ValueError(
            f"model of class {type(model).__name__} has no gated MLP: no module with the children "
            f"{', '.join(SEPARATE)} or {', '.join(MERGED)}"
        )
    times_seen = Counter(id(module) for _, module in candidates)
    shared = _sharing_memory(model)
    mlps = []
    for name, module in candidates:
        try:
            if times_seen[id(module)] > 1:
                raise ValueError("it is used in more than one place of the model")
            mlps.append(_describe(name, module, shared))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}) cannot run sparsely: {error}") from error
    return mlps


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def recognise_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in ``ACTIVATIONS`` of the function that ``function`` computes; None if it is none of them.

    Values are compared, not classes: libraries have several classes for one function (transformers has two for SiLU and
    three for the tanh GELU). Exact and tanh GELU differ by up to 5e-4, which is enough to distinguish them.
    """
    points = torch.linspace(-12, 12, 2401)
    try:
        with torch.no_grad():
            values = function(points.clone())
    except _OUT_OF_MEMORY:
        raise
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


def _sharing_memory(model: nn.Module) -> set[int]:
    """The ids of the parameters and buffers whose memory overlaps that of another name in the model."""
    named = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    spans = sorted((*_span(tensor), id(tensor)) for _, tensor in named if tensor.numel())
    shared: set[int] = set()
    space, end, longest = None, 0, 0  # of the span so far that reaches furthest
    for own_space, own_start, own_end, tensor in spans:
        if own_space == space and own_start < end:
            shared |= {longest, tensor}
        if own_space != space or own_end > end:
            space, end, longest = own_space, own_end, tensor
    return shared


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Where a tensor's memory begins and ends; what has none of its own is told apart by its object."""
    if tensor.device.type == "meta" or type(tensor.data) is not Tensor:
        return "object", id(tensor), id(tensor) + 1
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _describe(name: str, module: nn.Module, shared: set[int]) -> GatedMLP:
    names = _projections(module)
    if "forward" in vars(module) and not only_aligns_devices(module):
        raise ValueError("its forward has been replaced on the instance (offloading hook or another patch)")
    in_one_tensor = any(n in module._parameters for n in names)
    if in_one_tensor:
        _check_experts(module, names, shared)
    activation_name = next((n for n in ACTIVATION_NAMES if hasattr(module, n)), None)
    if activation_name is None:
        raise ValueError(f"it has none of the attributes {', '.join(ACTIVATION_NAMES)}")
    others = {*module._modules, *module._parameters} - {*names, activation_name}
    if others:
        raise ValueError(f"it has further children: {', '.join(sorted(others))}")
    if not in_one_tensor:
        _check_linears(module, names, shared)
    function = getattr(module, activation_name)
    activation = recognise_activation(function)
    if activation is None:
        label = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"its activation {label} is none of {', '.join(ACTIVATIONS)}")
    experts = len(module.down_proj) if in_one_tensor else None
    mlp = GatedMLP(name, module, activation, names == MERGED, experts)
    _check_formula(mlp)
    return mlp


def _check_experts(module: nn.Module, names: tuple[str, ...], shared: set[int]) -> None:
    """Raise ValueError unless the parameters are those of experts of one shape, all of them here."""
    if names != MERGED or any(n not in module._parameters for n in names):
        raise ValueError("it is a mixture of experts whose weights are not gate_up_proj and down_proj, a tensor each")
    gate_up, down = (module._parameters[n] for n in names)
    for n, weight in zip(names, (gate_up, down), strict=True):
        _check_weight(n, weight, shared)
    expected = (len(down), 2 * down.shape[-1], down.shape[-2]) if down.dim() == 3 else None
    if tuple(gate_up.shape) != expected:
        raise ValueError(
            "it is a mixture of experts whose gate_up_proj and down_proj must have shapes [E, 2 I, H] and [E, H, I], "
            f"got {list(gate_up.shape)} and {list(down.shape)}"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError("it has only a part of the experts (expert parallelism)")
    _check_alike(gate_up, down, names)


def _check_weight(name: str, weight: Tensor, shared: set[int]) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the weights first, without offloading")
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(weight.shape)}")
    if type(weight.data) is not Tensor:
        raise ValueError(f"{name} is a {type(weight.data).__name__}, not a plain tensor")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {weight.dtype}")
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on cpu or cuda, got {weight.device}")
    if id(weight) in shared:
        raise ValueError(f"{name} shares memory with another weight of the model (tied weights)")


def _check_alike(first: Tensor, other: Tensor, names: tuple[str, str]) -> None:
    if (other.dtype, other.device) != (first.dtype, first.device):
        raise ValueError(
            f"{names[1]} is {other.dtype} on {other.device}, but {names[0]} is {first.dtype} on {first.device}"
        )


def _check_linears(module: nn.Module, names: tuple[str, ...], shared: set[int]) -> None:
    """Raise ValueError unless the projections are bare ``nn.Linear`` modules that fit each other."""
    for projection in names:
        linear = getattr(module, projection)
        kind = type(linear)
        if kind is not nn.Linear:
            raise ValueError(
                f"{projection} is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear (quantised layers are not "
                "supported; adapters are added after patching, or merged before)"
            )
        _check_weight(f"{projection}.weight", linear.weight, shared)
    first, down = getattr(module, names[0]), module.down_proj
    expected = (down.in_features * (2 if names == MERGED else 1), down.out_features)
    for projection in names[:-1]:
        weight = getattr(module, projection).weight
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{projection}.weight must have shape {list(expected)} to fit down_proj.weight "
                f"{list(down.weight.shape)}, got {list(weight.shape)}"
            )
    for projection in names[1:]:
        _check_alike(first.weight, getattr(module, projection).weight, (f"{names[0]}.weight", f"{projection}.weight"))


@torch.no_grad()
def _check_formula(mlp: GatedMLP) -> None:
    """Run the module on four vectors: two of unit variance, and two that give large gate values, which clamps change.

    In training mode, because the masked path has no dropout. A shallow copy is set to it, so that an interrupt leaves
    the module itself as it was.
    """
    module, weight = mlp.module, mlp.down_weight
    act = ACTIVATIONS[mlp.activation]
    x = torch.randn(4, mlp.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    gate = _gate_and_up(mlp, x)[0].float()
    x[2:] *= (32 / gate.pow(2).mean().sqrt().clamp(min=1e-3)).to(x.dtype)
    gate, up = _gate_and_up(mlp, x)
    expected, routing = _down(mlp, act(gate) * up), ()
    if mlp.experts:
        chosen = torch.tensor(_PROBED_EXPERTS, device=weight.device)[:, None] % mlp.experts
        routing = chosen, torch.full_like(chosen, 0.5, dtype=x.dtype)
        expected = expected / 2
    probe = copy.copy(module)
    probe.training = True
    try:
        got = type(module).forward(probe, x, *routing)  # not a hook's, which is bound to the module itself
    except _OUT_OF_MEMORY:
        raise
    except Exception as error:
        kind = "tokens, experts and their weights" if routing else "one tensor [tokens, hidden_size]"
        raise ValueError(f"its forward fails on {kind}: {error}") from error
    tolerance = PROBE_TOLERANCE.get(weight.dtype, 1e-4)
    for want, have in zip(expected.float(), got.float(), strict=True):
        # Where large values overflow float16, they do so in both.
        difference = (want - have).nan_to_num(0, 0, 0).abs().max()
        if difference > tolerance * want.nan_to_num(0, 0, 0).abs().max():
            raise ValueError(
                "its forward is not down(act(gate) * up): it clamps, scales or normalises in between, or has dropout"
            )


def _gate_and_up(mlp: GatedMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the four vectors that are probed; of experts, each of another one's."""
    module = mlp.module
    if mlp.experts:
        rows = [module.gate_up_proj[e % mlp.experts] @ row for e, row in zip(_PROBED_EXPERTS, x, strict=True)]
        return torch.stack(rows).chunk(2, dim=-1)
    return mlp.gate_and_up({name: getattr(module, name)(x) for name in (MERGED[:1] if mlp.merged else SEPARATE[:2])})


def _down(mlp: GatedMLP, h: Tensor) -> Tensor:
    if mlp.experts:
        weight = mlp.module.down_proj
        return torch.stack([weight[e % mlp.experts] @ row for e, row in zip(_PROBED_EXPERTS, h, strict=True)])
    return mlp.module.down_proj(h)
