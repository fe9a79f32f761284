"""Rounding with error compensation (GPTQ, arXiv 2210.17323): what one input's weights lose, later ones make up for.

The inputs of a layer are rounded one after the other. The error of each is spread over those that follow, by the second
moments of what the layer gets in use, so that the outputs change least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cats_ext.rows.formats import RowFormat
from cats_ext.rows.rounding import check_finite, nearest, search_scales

BLOCK = 128  # inputs whose errors are spread over the later ones together; a multiple of every group size
_DAMPING = 0.01  # added to the diagonal, as a share of its mean: the paper's
_MOST_DAMPING = 1.0


def compensated_rows(weight: Tensor, row_format: RowFormat, moment: Tensor, *, input_rows: bool = False) -> Tensor:
    """As :func:`cats_ext.rows.quantize_rows`, with error compensation.

    Args:
        weight: ``[O, N]`` of a linear layer with N inputs, float32, float16 or bfloat16, finite.
        moment: float32 ``[N, N]``, the mean of ``x x^T`` over the layer's inputs, or its multiple.
        input_rows: whether there is a packed row for each input, with its groups along the outputs.

    Returns:
        uint8 ``[O, row_format.row_bytes(N)]``, or of input rows ``[N, row_format.row_bytes(O)]``.

    Raises:
        ValueError: an argument has a wrong shape or is not finite, or a scale is too large for float16.
    """
    outputs, inputs = weight.shape
    if moment.shape != (inputs, inputs):
        raise ValueError(f"moment must have shape {[inputs, inputs]}, got {list(moment.shape)}")
    check_finite("weight", weight)
    check_finite("moment", moment)
    w, moment = weight.to(torch.float32, copy=True), moment.to(weight.device, torch.float32)
    spread, importance = _spread(moment), moment.diagonal()
    rounder = (_InputRows if input_rows else _OutputRows)(w, row_format, importance)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        rounder.begin(first, last)
        errors = torch.empty(outputs, last - first, device=w.device)
        for i in range(first, last):
            error = (w[:, i] - rounder.round(i)) / spread[i, i]
            w[:, i + 1 : last].addr_(error, spread[i, i + 1 : last], alpha=-1)
            errors[:, i - first] = error
        w[:, last:].addmm_(errors, spread[first:last, last:], alpha=-1)
    return rounder.pack()


def _spread(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse moment: row i has the shares of input i's error that later ones get."""
    diagonal = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    while damping <= _MOST_DAMPING:
        damped = moment.clone()
        damped.diagonal().add_(damping * diagonal)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and factor.isfinite().all():
            return factor
        damping *= 10
    return torch.eye(len(moment), device=moment.device)  # no compensation


class _OutputRows:
    """Rounds a row for each output. A group is some inputs of it; its scale is searched at the first one's turn.

    Args:
        w: float32 ``[O, N]``, which the errors of earlier inputs are added to meanwhile.
        importance: ``[N]``, weights of the inputs' squared errors in the search for scales.
    """

    def __init__(self, w: Tensor, row_format: RowFormat, importance: Tensor) -> None:
        self.w, self.row_format, self.importance = w, row_format, importance
        self.columns = row_format.group_size or w.shape[1]
        self.q: list[Tensor] = []
        self.fields: list[tuple[Tensor, Tensor | None]] = []

    def begin(self, first: int, last: int) -> None:
        pass

    def round(self, i: int) -> Tensor:
        if i % self.columns == 0:
            group = slice(i, i + self.columns)
            weights = self.importance[group] + self.importance.mean() * _DAMPING
            self.fields.append(search_scales(self.w[:, None, group], self.row_format, weights))
        q = nearest(self.w[:, i, None, None], *self.fields[-1], self.row_format)
        self.q.append(q[:, 0, 0])
        return self.row_format.decode(q, *self.fields[-1])[:, 0, 0]

    def pack(self) -> Tensor:
        scales, zeros = zip(*self.fields, strict=True)
        zeros = None if zeros[0] is None else torch.cat(zeros, 1)
        return self.row_format.pack(torch.stack(self.q, 1), torch.cat(scales, 1), zeros)


class _InputRows:
    """Rounds a row for each input: all its groups at once. The scales of a block's rows are searched when it begins."""

    def __init__(self, w: Tensor, row_format: RowFormat, importance: Tensor) -> None:
        self.w, self.row_format = w, row_format
        self.groups = row_format.groups(len(w))
        self.packed: list[Tensor] = []

    def begin(self, first: int, last: int) -> None:
        rows = self.w[:, first:last].t().unflatten(1, (self.groups, -1))
        self.first, self.q = first, []
        self.scales, self.zeros = search_scales(rows, self.row_format, rows.new_ones(()))

    def round(self, i: int) -> Tensor:
        row = slice(i - self.first, i - self.first + 1)
        fields = self.scales[row], None if self.zeros is None else self.zeros[row]
        q = nearest(self.w[:, i].unflatten(0, (1, self.groups, -1)), *fields, self.row_format)
        self.q.append(q.flatten(1))
        if len(self.q) == len(self.scales):
            self.packed.append(self.row_format.pack(torch.cat(self.q), self.scales, self.zeros))
        return self.row_format.decode(q, *fields).flatten()

    def pack(self) -> Tensor:
        return torch.cat(self.packed)
