"""Finds the gated MLPs of a model by their structure, and refuses by name what the op would not compute.

A gated MLP is a module with the children gate_proj, up_proj, down_proj (or gate_up_proj, down_proj) and an activation,
or a block of such MLPs, the experts of a mixture, whose weights are parameters [E, 2I, H] and [E, H, I] of those names.
The projections are all ``nn.Linear``, of which tensor parallelism may have left a part here, or all
``QuantizedLinear``. Some modules have these names and compute something
else: they clamp, scale or normalise. So each one is also run on a few vectors and compared with
``down(act(gate) * up)``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.parallel.ranks import Shard
from cats_ext.parallel.sharding import find_shard, local, with_bare_layers
from cats_ext.patching.wrappers import only_aligns_devices
from cats_ext.rows import QuantizedLinear
from cats_ext.rows.formats import ROW_ALIGNMENT

SEPARATE = ("gate_proj", "up_proj", "down_proj")
MERGED = ("gate_up_proj", "down_proj")
ACTIVATION_NAMES = ("act_fn", "activation_fn")
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_PROBED_EXPERTS = (0, 1, 2, -1)  # modulo their number
_PROBED_NEURONS = 32  # of packed rows, which take long to unpack
PROBE_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output; others 1e-4


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP of a model: where it is and what it computes."""

    name: str
    module: nn.Module
    activation: str
    merged: bool
    experts: int | None = None  # how many of them are in one module
    shard: Shard | None = None  # the neurons that this rank has, if it has not all

    @property
    def down_owner(self) -> nn.Module:
        """The module that holds the down projection's weight."""
        return self.module if self.experts else self.module.down_proj

    @property
    def packed(self) -> bool:
        """Whether the projections hold packed rows."""
        return isinstance(self.module.down_proj, QuantizedLinear)

    @property
    def down_weight(self) -> Tensor:
        """``[H, I]``, or of experts ``[E, H, I]``; packed rows are ``[I, bytes]``. Of this rank's neurons."""
        return self.module.down_proj if self.experts else local(self.module.down_proj.weight)

    def dense_down_weight(self) -> Tensor:
        """``[H, I]`` as it is computed with; packed rows are unpacked to float32 at each call."""
        return self.module.down_proj.unpacked(torch.float32) if self.packed else self.down_weight

    @property
    def intermediate_size(self) -> int:
        """I, on all ranks."""
        return self.neurons if self.shard is None else self.shard.total

    @property
    def neurons(self) -> int:
        """How many of them this rank has."""
        return self.module.down_proj.in_features if self.packed else self.down_weight.shape[-1]

    @property
    def hidden_size(self) -> int:
        return self.module.down_proj.out_features if self.packed else self.down_weight.shape[-2]

    def gate_and_up(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The gate's and the up projection's output, from the outputs of the child modules by name."""
        if self.merged:
            gate, up = outputs["gate_up_proj"].chunk(2, dim=-1)
            return gate, up
        return outputs["gate_proj"], outputs["up_proj"]

    def bare(self) -> nn.Module:
        """The module as this rank has it: with plain weights, and without what sums up the ranks' outputs."""
        return self.module if self.shard is None else with_bare_layers(self.module, MERGED if self.merged else SEPARATE)


class OtherFormulaError(ValueError):
    """A module has the parts of a gated MLP, but computes something else."""


def find_gated_mlps(model: nn.Module) -> list[GatedMLP]:
    """All gated MLPs of ``model`` in its own order.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: there is none, or one of them cannot run sparsely; the message names the module and the reason.
    """
    check_module(model)
    named = model.named_modules(remove_duplicate=False)
    candidates = [(name, module) for name, module in named if looks_gated(module)]
    if not candidates:
        raise ValueError(
            f"model of class {type(model).__name__} has no gated MLP: no module with the children "
            f"{', '.join(SEPARATE)} or {', '.join(MERGED)}"
        )
    times_seen = Counter(id(module) for _, module in candidates)
    shared = sharing_memory(model)
    mlps = []
    for name, module in candidates:
        try:
            if times_seen[id(module)] > 1:
                raise ValueError("it is used in more than one place of the model")
            mlps.append(describe(name, module, shared))
        except ValueError as error:
            raise ValueError(f"{name} ({type(module).__name__}) cannot run sparsely: {error}") from error
    return mlps


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def recognise_activation(
    function: Callable[[Tensor], Tensor], known: dict[str, Callable[[Tensor], Tensor]] = ACTIVATIONS
) -> str | None:
    """The name in ``known`` of the function that ``function`` computes; None if it is none of them.

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
    for name, reference in known.items():
        if torch.is_tensor(values) and torch.allclose(values, reference(points), rtol=1e-5, atol=1e-5):
            return name
    return None


def looks_gated(module: nn.Module) -> bool:
    """Whether ``module`` has the children of a gated MLP or the parameters of a block of experts."""
    return projection_names(module) is not None


def projection_names(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the projections if ``module`` looks like a gated MLP or like a block of experts, else None."""
    for names in (SEPARATE, MERGED):
        if all(name in module._modules or name in module._parameters for name in names):
            return names
    return None


def sharing_memory(model: nn.Module) -> set[int]:
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


def describe(
    name: str,
    module: nn.Module,
    shared: set[int],
    act: Callable[[Tensor], Tensor] | None = None,
    up_act: Callable[[Tensor], Tensor] | None = None,
) -> GatedMLP:
    """The gated MLP that ``module``, which has the children of one, is.

    Args:
        shared: what :func:`sharing_memory` says of its model.
        act: computes the activations from the gate's output; None: the module's own, one of ``ACTIVATIONS``.
        up_act: what the up projection's output goes through; None: nothing.

    Raises:
        ValueError: it is none, and why; an :class:`OtherFormulaError` if its parts are those of one.
    """
    names = projection_names(module)
    if "forward" in vars(module) and not only_aligns_devices(module):
        raise ValueError(
            "its forward has been replaced on the instance (tensor parallelism, an offloading hook or another patch)"
        )
    in_one_tensor = any(n in module._parameters for n in names)
    if in_one_tensor:
        _check_experts(module, names, shared)
    activation_name = next((n for n in ACTIVATION_NAMES if hasattr(module, n)), None)
    if activation_name is None:
        raise ValueError(f"it has none of the attributes {', '.join(ACTIVATION_NAMES)}")
    others = {*module._modules, *module._parameters} - {*names, activation_name}
    if others:
        raise ValueError(f"it has further children: {', '.join(sorted(others))}")
    shard = None if in_one_tensor else find_shard(module, names)
    if not in_one_tensor:
        _check_linears(module, names, shared, shard)
    function = getattr(module, activation_name)
    activation = recognise_activation(function)
    if activation is None:
        activation = label_of(function)
        if act is None:
            raise ValueError(f"its activation {activation} is none of {', '.join(ACTIVATIONS)}")
    experts = len(module.down_proj) if in_one_tensor else None
    mlp = GatedMLP(name, module, activation, names == MERGED, experts, shard)
    _check_formula(mlp, act or ACTIVATIONS[activation], up_act)
    return mlp


def label_of(function: Callable[[Tensor], Tensor]) -> str:
    """What an activation that has no name in ``ACTIVATIONS`` is called."""
    return getattr(function, "__name__", type(function).__name__)


def _check_experts(module: nn.Module, names: tuple[str, ...], shared: set[int]) -> None:
    """Raise ValueError unless the parameters are those of experts of one shape, all of them here."""
    if names != MERGED or any(n not in module._parameters for n in names):
        raise ValueError("it is a mixture of experts whose weights are not gate_up_proj and down_proj, a tensor each")
    gate_up, down = (module._parameters[n] for n in names)
    for n, weight in zip(names, (gate_up, down), strict=True):
        check_weight(n, weight, shared)
    expected = (len(down), 2 * down.shape[-1], down.shape[-2]) if down.dim() == 3 else None
    if tuple(gate_up.shape) != expected:
        raise ValueError(
            "it is a mixture of experts whose gate_up_proj and down_proj must have shapes [E, 2 I, H] and [E, H, I], "
            f"got {list(gate_up.shape)} and {list(down.shape)}"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError("it has only a part of the experts (expert parallelism)")
    _check_alike(gate_up, down, names)


def check_weight(name: str, weight: Tensor, shared: set[int], dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES) -> None:
    """Raise ValueError unless ``weight`` is one that can be computed with where it is; ``shared`` has ids of others."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the weights first, without offloading")
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(weight.shape)}")
    if type(weight.data) is not Tensor:
        raise ValueError(f"{name} is a {type(weight.data).__name__}, not a plain tensor")
    if weight.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {' or '.join(filter(None, (', '.join(others), last)))}, got {weight.dtype}")
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on cpu or cuda, got {weight.device}")
    if id(weight) in shared:
        raise ValueError(f"{name} shares memory with another weight of the model (tied weights)")


def _check_alike(first: Tensor, other: Tensor, names: tuple[str, str]) -> None:
    if (other.dtype, other.device) != (first.dtype, first.device):
        raise ValueError(
            f"{names[1]} is {other.dtype} on {other.device}, but {names[0]} is {first.dtype} on {first.device}"
        )


def _check_linears(module: nn.Module, names: tuple[str, ...], shared: set[int], shard: Shard | None) -> None:
    """Raise ValueError unless the projections are bare layers of one kind that fit each other."""
    if shard is not None:
        tied = next((name for name in names if id(getattr(module, name).weight) in shared), None)
        if tied is not None:
            raise ValueError(f"{tied}.weight shares memory with another weight of the model (tied weights)")
        module = with_bare_layers(module, names)
    packed = isinstance(getattr(module, names[0]), QuantizedLinear)
    for projection in names:
        linear = getattr(module, projection)
        kind = type(linear)
        if kind is not (QuantizedLinear if packed else nn.Linear):
            others = f", but {names[0]} is a QuantizedLinear" if packed else (
                ", not a torch.nn.Linear (other quantised layers are not supported; adapters are added after patching, "
                "or merged before)"
            )  # fmt: skip
            raise ValueError(f"{projection} is a {kind.__module__}.{kind.__name__}{others}")
        check_weight(f"{projection}.weight", linear.weight, shared, (torch.uint8,) if packed else WEIGHT_DTYPES)
        if packed:
            _check_rows(projection, linear)
    first, down = getattr(module, names[0]), module.down_proj
    expected = (down.in_features * (2 if names == MERGED else 1), down.out_features)
    for projection in names[:-1]:
        linear = getattr(module, projection)
        shape = (linear.out_features, linear.in_features) if packed else tuple(linear.weight.shape)
        if shape != expected:
            raise ValueError(
                f"{projection}.weight must have shape {list(expected)} to fit down_proj.weight "
                f"{[down.out_features, down.in_features]}, got {list(shape)}"
            )
    for projection in names[1:]:
        _check_alike(first.weight, getattr(module, projection).weight, (f"{names[0]}.weight", f"{projection}.weight"))


def _check_rows(projection: str, linear: QuantizedLinear) -> None:
    """Raise ValueError unless each packed row is a neuron's."""
    if linear.input_rows != (projection == "down_proj"):
        wanted, got = ("in", "out") if projection == "down_proj" else ("out", "in")
        raise ValueError(f"{projection} must have a packed row for each {wanted}put, got one for each {got}put")
    if tuple(linear.weight.shape) != linear.weight_shape:
        raise ValueError(
            f"{projection}.weight must have shape {list(linear.weight_shape)} for {linear.row_format.name}, got "
            f"{list(linear.weight.shape)}"
        )
    if linear.weight.data_ptr() % ROW_ALIGNMENT:
        raise ValueError(
            f"{projection}.weight must start at a multiple of {ROW_ALIGNMENT} bytes: copy it "
            "(weight.data = weight.data.clone())"
        )


@torch.no_grad()
def _check_formula(
    mlp: GatedMLP, act: Callable[[Tensor], Tensor], up_act: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Run the module on four vectors: two of unit variance, and two that give large gate values, which clamps change.

    In training mode, because the masked path has no dropout. A shallow copy is set to it, so that an interrupt leaves
    the module itself as it was. Of packed rows, the copy has a few neurons only.
    """
    probe = copy.copy(mlp.bare())
    probe.training = True
    if mlp.packed:
        probe._modules = probe._modules | _few_neurons(mlp)
    mlp = replace(mlp, module=probe, shard=None)
    module, weight = probe, mlp.down_weight
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
    x = torch.randn(4, mlp.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, dtypes[0] if dtypes else torch.float32)
    gate = _gate_and_up(mlp, x)[0].float()
    x[2:] *= (32 / gate.pow(2).mean().sqrt().clamp(min=1e-3)).to(x.dtype)
    gate, up = _gate_and_up(mlp, x)
    expected, routing = _down(mlp, act(gate) * (up_act(up) if up_act else up)), ()
    if mlp.experts:
        chosen = torch.tensor(_PROBED_EXPERTS, device=weight.device)[:, None] % mlp.experts
        routing = chosen, torch.full_like(chosen, 0.5, dtype=x.dtype)
        expected = expected / 2
    try:
        got = type(module).forward(probe, x, *routing)  # not a hook's, which is bound to the module itself
    except _OUT_OF_MEMORY:
        raise
    except Exception as error:
        kind = "tokens, experts and their weights" if routing else "one tensor [tokens, hidden_size]"
        raise ValueError(f"its forward fails on {kind}: {error}") from error
    tolerance = PROBE_TOLERANCE.get(x.dtype, 1e-4)
    for want, have in zip(expected.float(), got.float(), strict=True):
        # Where large values overflow float16, they do so in both.
        difference = (want - have).nan_to_num(0, 0, 0).abs().max()
        if difference > tolerance * want.nan_to_num(0, 0, 0).abs().max():
            raise OtherFormulaError(
                "its forward is not down(act(gate) * up): it clamps, scales or normalises in between, or has dropout"
            )


def _few_neurons(mlp: GatedMLP) -> dict[str, QuantizedLinear]:
    """Projections with the packed rows of the first neurons alone."""
    count = min(_PROBED_NEURONS, mlp.intermediate_size)
    first = torch.arange(count, device=mlp.down_weight.device)
    both = torch.cat((first, first + mlp.intermediate_size))
    return {
        name: getattr(mlp.module, name).with_rows(both if name == MERGED[0] else first)
        for name in (MERGED if mlp.merged else SEPARATE)
    }


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
