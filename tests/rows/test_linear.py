"""QuantizedLinear computes as an nn.Linear with the weights that it holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cats_ext.rows import FORMATS, QuantizedLinear, RowFormat


@pytest.mark.parametrize("name", ["int4_g64", "int4_g32_zp", "int8_g128", "fp8_e4m3"])
@pytest.mark.parametrize("input_rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_as_linear_with_its_weights(name, input_rows, bias):
    torch.manual_seed(0)
    dense = nn.Linear(256, 384, bias=bias)
    quantized = QuantizedLinear.from_linear(dense, FORMATS[name], input_rows=input_rows)
    x = torch.randn(2, 3, 256)
    expected = nn.functional.linear(x, quantized.unpacked(torch.float32), dense.bias)
    assert torch.equal(quantized(x), expected)
    error = (quantized(x) - dense(x)).norm() / dense(x).norm()
    assert 0 < error < {"int4": 0.2, "int8": 0.01, "fp8": 0.05}[quantized.row_format.type]
    assert quantized.bias is dense.bias
    assert len(quantized.weight) == (256 if input_rows else 384)


def test_state_dict_goes_into_a_new_one():
    quantized = QuantizedLinear.from_linear(nn.Linear(128, 64), RowFormat.parse("int4_g64_zp"))
    other = QuantizedLinear(128, 64, quantized.row_format, bias=True)
    other.load_state_dict(quantized.state_dict())
    x = torch.randn(4, 128)
    assert torch.equal(other(x), quantized(x))
    assert not other.weight.requires_grad


def test_refuses_rows_without_whole_groups_and_other_widths():
    with pytest.raises(ValueError, match=r"columns must be a positive multiple of the group size of int8_g64.*100"):
        QuantizedLinear(100, 64, RowFormat.parse("int8_g64"))
    quantized = QuantizedLinear.from_linear(nn.Linear(128, 64), RowFormat.parse("int8_g64"))
    with pytest.raises(ValueError, match=r"x must have 128 columns, got \[1, 64\]"):
        quantized(torch.zeros(1, 64))
