"""Rounding to packed rows: the error is that of the format, special groups, importance, and errors."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DEVICES

from cats_ext.rows import FORMATS, RowFormat, quantize_rows

INF, NAN = float("inf"), float("nan")
# of normal weights, relative; the theory for 16 levels at their best spacing is 0.107
ERROR = {"int4_g32": 0.083, "int4_g64": 0.092, "int4_g128": 0.099, "int4_g32_zp": 0.0735, "int4_g64_zp": 0.0845}
ERROR |= {"int4_g128_zp": 0.0935, "int8_g32": 0.0055, "int8_g64": 0.0062, "int8_g128": 0.0068, "fp8_e4m3": 0.0268}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def row_format(request) -> RowFormat:
    return request.param


def rounded(weight, row_format, importance=None):
    return row_format.unpack(quantize_rows(weight, row_format, importance), weight.shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_the_format_s(row_format, dtype, device):
    weight = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)
    packed = quantize_rows(weight, row_format)
    assert packed.dtype == torch.uint8 and packed.device == weight.device
    assert packed.shape == (64, row_format.row_bytes(1152))
    error = row_format.unpack(packed, 1152) - weight.float()
    assert error.norm() < ERROR[row_format.name] * weight.float().norm()


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("_zp")])
def test_zero_points_leave_little_error_in_means_and_size(name):
    form = FORMATS[name]
    weight = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    errors = (rounded(weight, form) - weight).unflatten(1, (-1, form.group_size))
    of_independent_errors = errors.square().mean().div(form.group_size).sqrt()
    assert errors.mean(2).square().mean().sqrt() < 0.6 * of_independent_errors
    assert (errors.flatten(1) * weight).sum().abs() < 0.002 * weight.square().sum()


def test_rows_are_rounded_in_chunks(row_format, monkeypatch):
    weight = torch.randn(7, 256)
    whole = quantize_rows(weight, row_format)
    monkeypatch.setattr("cats_ext.rows.rounding._CHUNK", 512)
    assert torch.equal(quantize_rows(weight, row_format), whole)


def test_what_the_format_holds_is_kept(row_format):
    """Weights that are packed already come back as they are, or nearer than a float16 scale can tell."""
    weight = rounded(torch.randn(8, 256), row_format)
    again = rounded(weight, row_format)
    assert (again - weight).norm() < 0.03 * weight.norm()


def test_zeros_stay_zeros(row_format):
    weight = torch.randn(4, 256)
    weight[1], weight[2, 128:] = 0, 0
    result = rounded(weight, row_format)
    assert result[1].count_nonzero() == 0 and result[2, 128:].count_nonzero() == 0
    assert result[2, :128].count_nonzero() > 100


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-5, 60000.0])
def test_constant_groups(row_format, value):
    result = rounded(torch.full((2, 256), value), row_format)
    torch.testing.assert_close(result, torch.full((2, 256), value), rtol=1e-2, atol=2**-25)


def test_tiny_weights_are_within_the_smallest_scale(row_format):
    weight = torch.randn(2, 256) * 1e-7
    assert (rounded(weight, row_format) - weight).abs().max() <= 2**-24


def test_importance_chooses_the_scale(row_format):
    """A column that matters alone has less error than in the mean of all."""
    if row_format.type == "fp8":
        pytest.skip("the error of a floating-point format hardly depends on its scale")
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.full((128,), 1e-3)
    importance[::32] = 1
    errors = [(rounded(weight, row_format, i) - weight)[:, ::32].norm() for i in (None, importance)]
    assert errors[1] < 0.9 * errors[0]


INT4, ZP = RowFormat.parse("int4_g64"), RowFormat.parse("int4_g64_zp")
W = torch.ones(2, 64)
ERRORS = {
    "dtype": (lambda: quantize_rows(W.int(), INT4), r"weight must be .* \[I, H\], got torch.int32 \[2, 64\]"),
    "shape": (lambda: quantize_rows(W[0], INT4), r"weight must be .* \[I, H\], got torch.float32 \[64\]"),
    "groups": (
        lambda: quantize_rows(torch.ones(2, 96), INT4),
        "columns must be a positive multiple of the group size of int4_g64, got 96",
    ),
    "NaN": (lambda: quantize_rows(W * NAN, INT4), "weight must be finite, got 128 values that are NaN or infinite"),
    "infinite": (
        lambda: quantize_rows(torch.cat((W, W * INF)), ZP),
        "weight must be finite, got 128 values that are NaN or infinite",
    ),
    "scale": (
        lambda: quantize_rows(W * 1e6, INT4),
        "weight must have scales within float16's 65504 in int4_g64, got 135000",
    ),
    "scale, zero points": (
        lambda: quantize_rows(W * 1e6, ZP),
        "weight must have scales within float16's 65504 in int4_g64_zp, got 72000",
    ),
    "importance's shape": (
        lambda: quantize_rows(W, INT4, torch.ones(2)),
        r"importance must have shape \[64\], got \[2\]",
    ),
    "importance NaN": (
        lambda: quantize_rows(W, INT4, torch.full((64,), NAN)),
        "importance must be finite, got 64 values that are NaN or infinite",
    ),
    "negative importance": (
        lambda: quantize_rows(W, INT4, -torch.ones(64)),
        "importance must not be negative, got -1.0",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
