"""compensated_rows: the outputs change less than by rounding to the nearest values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cats_ext.rows import FORMATS, QuantizedLinear, quantize_rows
from cats_ext.rows.compensation import compensated_rows


def correlated(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, 24) @ torch.randn(24, columns) / 5 + 0.2 * torch.randn(rows, columns)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128_zp", "int8_g64", "fp8_e4m3"])
@pytest.mark.parametrize("input_rows", [False, True])
def test_outputs_change_less(name, input_rows):
    row_format, x = FORMATS[name], correlated(1000, 384)
    dense = nn.Linear(384, 256, bias=False)
    plain = QuantizedLinear.from_linear(dense, row_format, input_rows=input_rows)
    better = QuantizedLinear.from_linear(dense, row_format, input_rows=input_rows, moment=x.t() @ x / len(x))
    assert better.weight.shape == plain.weight.shape and better.row_format == row_format
    with torch.no_grad():
        errors = [(linear(x) - dense(x)).square().mean() for linear in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("input_rows", [False, True])
def test_inputs_without_correlation_are_rounded_to_the_nearest(input_rows):
    row_format, weight = FORMATS["int8_g32"], torch.randn(64, 96)
    rows = weight.t() if input_rows else weight
    assert torch.equal(
        compensated_rows(weight, row_format, torch.eye(96), input_rows=input_rows), quantize_rows(rows, row_format)
    )


@pytest.mark.parametrize("moment", [torch.zeros(64, 64), torch.ones(64, 64), -torch.eye(64)])
def test_any_finite_moment_gives_rows(moment):
    weight = torch.randn(32, 64)
    packed = compensated_rows(weight, FORMATS["int4_g32"], moment)
    error = FORMATS["int4_g32"].unpack(packed, 64) - weight
    assert error.abs().max() < 2


def test_refusals():
    weight, row_format = torch.randn(64, 32), FORMATS["int4_g32"]
    with pytest.raises(ValueError, match=r"moment must have shape \[32, 32\], got \[64, 64\]"):
        compensated_rows(weight, row_format, torch.eye(64))
    with pytest.raises(ValueError, match="moment must be finite, got 1 values"):
        compensated_rows(
            weight, row_format, torch.eye(32).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan))
        )
    weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="weight must be finite, got 1 values"):
        compensated_rows(weight, row_format, torch.eye(32))
