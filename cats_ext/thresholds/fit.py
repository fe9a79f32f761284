"""Whether thresholds belong to a model: the names, the shapes and a sample of the weights of its gated MLPs.

The sample is a few hundred elements of each MLP, so that it costs no time and no memory with a large model. It is
compared exactly, up to a change of dtype: both sides are rounded to one of ``_ROUNDINGS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn

from cats_ext.parallel.ranks import Shard
from cats_ext.thresholds.rules import check_tensor

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SAMPLES = 128  # of each projection
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: multiples of it are spread evenly, in no pattern


class MLPShape(Protocol):
    """What a config needs of a model's gated MLP; ``patching.detection.GatedMLP`` has it."""

    name: str
    module: nn.Module
    activation: str
    experts: int | None
    shard: Shard | None

    def bare(self) -> nn.Module: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...


def difference(left: Iterable[str], right: Iterable[str], left_name: str, right_name: str) -> str:
    """The names that only one side has, three of each at most."""
    parts = []
    for only, other, label in ((left, set(right), left_name), (right, set(left), right_name)):
        names = [name for name in only if name not in other]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"only in {label}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


# --- weights --------------------------------------------------------------------------------------------------------


def sample_weights(weight: Callable[[str], Tensor | None], first: int = 0, neurons: int | None = None) -> Tensor:
    """Elements of the gate, up and down projection at fixed places, float32 ``[3, SAMPLES]`` on the CPU.

    Args:
        weight: gives the weight of ``gate_proj``, ``up_proj`` and ``down_proj``, ``[I, H]`` or ``[H, I]``, or of
            ``gate_up_proj``, with the gate's rows first, if it returns None for ``gate_proj``; of experts with a
            dimension of experts before. However gate and up are stored, the sample is the same. Of packed rows, uint8
            ``[I, bytes]`` each, it is of their bytes.
        first, neurons: of an MLP that has ``neurons`` neurons, the weights are those from ``first`` on (tensor
            parallelism). The sample then has the places among them only.
    """
    down = weight("down_proj").detach()
    if down.dtype != torch.uint8:
        down = down.mT  # by neuron, as packed rows are
    gate, up = weight("gate_proj"), weight("up_proj")
    if gate is None:
        gate, up = weight("gate_up_proj").detach().split(down.shape[-2], dim=-2)
    samples = []
    for tensor in (gate, up, down):
        *experts, own, width = tensor.shape
        places = torch.tensor(_places(torch.Size((*experts, neurons or own, width))))
        places = places[_are_within(places, first, own)]
        places[:, -2] -= first
        samples.append(tensor.detach()[places.unbind(1)].float().cpu())
    return torch.stack(samples)


def sample_all_ranks(weight: Callable[[str], Tensor | None], shard: Shard | None) -> Tensor:
    """As :func:`sample_weights`, of an MLP of which this rank has a part. All ranks have to call it."""
    if shard is None:
        return sample_weights(weight)
    own = sample_weights(weight, shard.first, shard.total)
    hidden_size = weight("down_proj").shape[0]
    places = torch.tensor(_places(torch.Size((shard.total, hidden_size))))
    sample = torch.zeros(len(PROJECTIONS), SAMPLES)
    sample[:, _are_within(places, shard.first, shard.neurons)] = own
    return shard.sum(sample)


def _are_within(places: Tensor, first: int, count: int) -> Tensor:
    """Which of the places belong to ``count`` neurons from ``first`` on."""
    return (places[:, -2] >= first) & (places[:, -2] < first + count)


def weight_of(module: nn.Module, projection: str) -> Tensor | None:
    """The weight of a module's own projection, also under an adapter; None if there is none of that name."""
    child = getattr(module, projection, None)
    child = getattr(child, "base_layer", child)
    return child if child is None or isinstance(child, Tensor) else child.weight


def check_mlp_weights(mlp: MLPShape, expected: Tensor) -> None:
    """Raise ValueError unless ``expected`` is a sample of the weights of ``mlp``, or of what this rank has of them."""
    part = () if mlp.shard is None else (mlp.shard.first, mlp.shard.total)
    advice = (
        "calibrate this model, or pass check_weights=False to apply_cats if the thresholds of the other one are wanted"
    )
    check_weights(mlp.name, expected, partial(weight_of, mlp.bare()), *part, advice=advice)


def check_weights(
    name: str,
    expected: Tensor,
    weight: Callable[[str], Tensor | None],
    first: int = 0,
    neurons: int | None = None,
    *,
    advice: str = "calibrate this model and save it again",
) -> None:
    """Raise ValueError unless ``expected`` is a sample of the weights of the MLP ``name``, as far as they are here.

    Args:
        weight, first, neurons: as for :func:`sample_weights`.
    """
    if neurons is not None:
        down = weight("down_proj")
        count, width = down.shape if down.dtype == torch.uint8 else down.mT.shape  # packed rows, or dense
        places = torch.tensor(_places(torch.Size((neurons, width))))
        expected = expected[:, _are_within(places, first, count)]
    for projection, want, have in zip(PROJECTIONS, expected, sample_weights(weight, first, neurons), strict=True):
        if not _same(want, have):
            raise ValueError(
                f"config is for other weights than the model's: {projection} of {name} differs in "
                f"{int((want != have).sum())} of {len(want)} sampled elements; {advice}"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two samples are of the same weights, each in some dtype."""
    if any(torch.equal(a.to(dtype), b.to(dtype)) for dtype in _ROUNDINGS):
        return True
    # One in float16 and the other in bfloat16, both rounded from float32.
    for half, brain in ((a, b), (b, a)):
        if torch.equal(half, half.half().float()) and torch.equal(brain, brain.bfloat16().float()):
            return torch.allclose(half, brain, rtol=2**-7, atol=2**-24)
    return False


def check_sample(name: str, sample: Tensor) -> None:
    """Raise unless ``sample`` is one of :func:`sample_weights`."""
    check_tensor(name, sample, (torch.float32,), [(len(PROJECTIONS), SAMPLES)])


@lru_cache
def _places(shape: torch.Size) -> list[list[int]]:
    """Of ``SAMPLES`` elements spread over a tensor of this shape, the indices."""
    count, places = shape.numel(), []
    for k in range(SAMPLES):
        rest, place = ((k * _GOLDEN + _GOLDEN // 2) % 2**64 * count) >> 64, []
        for size in reversed(shape):
            rest, index = divmod(rest, size)
            place.append(index)
        places.append(place[::-1])
    return places
