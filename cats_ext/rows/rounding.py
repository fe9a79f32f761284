"""Rounding weights to packed rows: to the nearest value, with the scale of each group chosen by its squared error.

Scales are searched among those that cut a group's extremes by some factor. The best ones do cut, which leaves weights
smaller, all of them a little, and groups' means off: over a model's layers both add up. So scales with zero
points are fitted to the integers afterwards, until little of either is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cats_ext.rows.formats import CENTRE, RowFormat

# Scales that are tried, relative to the one at which the extreme of a group is just representable.
CLIPS = {
    "int4": tuple(1.08 - 0.04 * i for i in range(12)),
    "int8": (1.0, 0.98, 0.95, 0.9),
    "fp8": (1.0, 0.95, 0.9, 0.8, 0.7, 0.6),
}
FITS = 6  # times that integers, and scales and zero points fitted to them, take turns
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
# Also the scale of a group of zeros; float16's other small ones are multiples of it.
SMALLEST_SCALE = {"int4": 2.0**-24, "int8": 2.0**-24, "fp8": 2.0**-126}
_CHUNK = 1 << 22  # weights that are searched at a time, for the memory


def quantize_rows(weight: Tensor, row_format: RowFormat, importance: Tensor | None = None) -> Tensor:
    """``weight`` rounded to packed rows.

    Args:
        weight: ``[I, H]`` float32, float16 or bfloat16: of the down projection its transpose, one row a neuron.
        importance: ``[H]``, not negative: weights of the columns' squared errors. By default all are 1.

    Returns:
        uint8 ``[I, row_format.row_bytes(H)]`` on the device of ``weight``.

    Raises:
        ValueError: an argument has a wrong shape or dtype or is not finite, H is no multiple of the group size, or a
            scale is too large for float16.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weight must be float32, float16 or bfloat16 [I, H], got {weight.dtype} {list(weight.shape)}")
    rows, columns = weight.shape
    groups = row_format.groups(columns)
    check_finite("weight", weight)
    if importance is None:
        importance = weight.new_ones((), dtype=torch.float32).expand(columns)
    if importance.shape != (columns,):
        raise ValueError(f"importance must have shape [{columns}], got {list(importance.shape)}")
    check_finite("importance", importance)
    if (importance < 0).any():
        raise ValueError(f"importance must not be negative, got {float(importance.min())}")
    importance = importance.to(weight.device, torch.float32).reshape(groups, -1)

    packed = weight.new_empty(rows, row_format.row_bytes(columns), dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        values = weight[first : first + step].float().unflatten(1, (groups, -1))
        scales, zeros = search_scales(values, row_format, importance)
        q = nearest(values, scales, zeros, row_format)
        packed[first : first + step] = row_format.pack(q.flatten(1), scales, zeros)
    return packed


def search_scales(values: Tensor, row_format: RowFormat, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points with the least squared error of rounding, in the dtype that they are stored in.

    Args:
        values: float32 ``[I, groups, columns]``, finite.
        importance: weights of the squared errors, which broadcast with ``values``.

    Returns:
        ``[I, groups]`` each; the zero points are None without them.

    Raises:
        ValueError: a scale is too large for float16.
    """
    scales, zeros, least = None, None, None
    for clip in CLIPS[row_format.type]:
        new_scales, new_zeros = _scales(values, row_format, clip)
        q = nearest(values, new_scales, new_zeros, row_format)
        error = (row_format.decode(q, new_scales, new_zeros) - values).square_().mul_(importance).sum(2)
        if least is None:
            scales, zeros, least = new_scales, new_zeros, error
            continue
        better = error < least
        scales, least = torch.where(better, new_scales, scales), torch.where(better, error, least)
        zeros = None if zeros is None else torch.where(better, new_zeros, zeros)
    if zeros is not None:
        for _ in range(FITS):
            scales, zeros = _fitted(values, scales, zeros, row_format, importance)
    return scales, zeros


def nearest(values: Tensor, scales: Tensor, zeros: Tensor | None, row_format: RowFormat) -> Tensor:
    """``values`` ``[I, groups, columns]`` rounded to what is stored with these scales, none of which is zero."""
    q = values / scales.float().unsqueeze(2)
    if row_format.type == "fp8":
        return q.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if row_format.type == "int8":
        return q.round_().clamp_(-128, 127).to(torch.int8)
    return q.add_(CENTRE if zeros is None else zeros.float().unsqueeze(2)).round_().clamp_(0, 15).to(torch.uint8)


def _scales(values: Tensor, row_format: RowFormat, clip: float) -> tuple[Tensor, Tensor | None]:
    """Scales at which ``clip`` times the extremes of a group are just representable, and the zero points."""
    low, high = values.amin(2), values.amax(2)
    if row_format.zero_points:
        low, high = low.clamp_(max=0) * clip, high.clamp_(min=0) * clip
        scales = (high - low).div_(15)
    elif row_format.type == "fp8":
        scales = torch.maximum(high, -low).mul_(clip / FP8_MAX)
    else:  # negative where the largest value is, so that it gets the lowest of the integers, which has no counterpart
        scales = torch.where(high > -low, high, low).mul_(clip / (-8 if row_format.type == "int4" else -128))
    smallest = SMALLEST_SCALE[row_format.type]
    if row_format.type == "fp8":
        return scales.clamp_(min=smallest), None
    # Rounded up where float16 has few digits, so that extremes are not cut off.
    stored = scales.abs().div_(smallest).ceil_().clamp_(min=1).mul_(smallest).copysign_(scales).half()
    if stored.isinf().any():
        raise ValueError(
            f"weight must have scales within float16's 65504 in {row_format.name}, got {float(scales.abs().max()):g}"
        )
    return stored, (-low / stored.float()).half() if row_format.zero_points else None


def _fitted(
    values: Tensor, scales: Tensor, zeros: Tensor, row_format: RowFormat, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Those with which the integers of the given ones have the values' mean, and neither stretch nor shrink them.

    So the error is uncorrelated with the values. Where that is no float16, as in a group with nothing to fit to, the
    given ones stay.
    """
    q = nearest(values, scales, zeros, row_format).float()
    weights = importance.expand_as(values)
    total = weights.sum(2, keepdim=True)
    mean_q, mean = ((weights * t).sum(2, keepdim=True) / total for t in (q, values))
    weighted = weights * (values - mean)
    new_scales = ((weighted * (values - mean)).sum(2) / (weighted * (q - mean_q)).sum(2)).half()
    new_zeros = (mean_q.squeeze(2) - mean.squeeze(2) / new_scales.float()).half()
    fits = (new_scales.abs() > SMALLEST_SCALE[row_format.type]) & new_scales.isfinite() & new_zeros.isfinite()
    return torch.where(fits, new_scales, scales), torch.where(fits, new_zeros, zeros)


def check_finite(name: str, t: Tensor) -> None:
    finite = t.isfinite()
    if not finite.all():
        raise ValueError(f"{name} must be finite, got {int((~finite).sum())} values that are NaN or infinite")
