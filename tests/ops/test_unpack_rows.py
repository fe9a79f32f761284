"""torch.ops.cats.unpack_rows against PyTorch's own operations, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DEVICES, DTYPES
from support.packed_rows import HIDDEN, random_rows
from torch import Tensor

from cats_ext import ops
from cats_ext.ops.reference import unpack_rows_ref
from cats_ext.rows import FORMATS, QuantizedLinear, RowFormat


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def rows_of(form: RowFormat, columns: int, device: str, count: int = 5) -> Tensor:
    return random_rows(form, count, columns, 1.0, torch.Generator().manual_seed(columns)).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_formula(name, dtype, device):
    form = FORMATS[name]
    for columns in HIDDEN[form.group_size]:
        rows = rows_of(form, columns, device)
        out = ops.unpack_rows(rows, name, columns, dtype)
        assert out.shape == (5, columns) and out.dtype == dtype and out.is_contiguous()
        assert torch.equal(out.cpu(), unpack_rows_ref(rows.cpu(), name, columns, dtype)), columns


def test_codes_of_fp8_that_are_no_numbers(device):
    """Of damaged rows: packing refuses them."""
    rows = FORMATS["fp8_e4m3"].pack(torch.ones(3, 256).to(torch.float8_e4m3fn), torch.full((3, 1), 0.5)).to(device)
    rows[1, 16 + 7], rows[2, 16 + 255] = 0x7F, 0xFF
    out = ops.unpack_rows(rows, "fp8_e4m3", 256, torch.float16)
    expected = torch.full((3, 256), 0.5, dtype=torch.float16)
    expected[1, 7] = expected[2, 255] = torch.nan
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["int4_g32_zp", "int8_g64", "fp8_e4m3"])
def test_parts_of_larger_tensors(name, device):
    form = FORMATS[name]
    rows = rows_of(form, 1088, device, count=262_150 if device == "cuda" else 70)  # more than a grid's 65,535 times 4
    whole = ops.unpack_rows(rows, name, 1088, torch.bfloat16)
    assert torch.equal(whole[-9:].cpu(), unpack_rows_ref(rows[-9:].cpu(), name, 1088, torch.bfloat16))
    assert torch.equal(ops.unpack_rows(rows[3:9:2], name, 1088, torch.bfloat16), whole[3:9:2])
    wider = torch.nn.functional.pad(rows[:9], (16, 32))[:, 16 : 16 + rows.shape[1]]
    assert torch.equal(ops.unpack_rows(wider, name, 1088, torch.bfloat16), whole[:9])
    assert ops.unpack_rows(rows[:0], name, 1088, torch.bfloat16).shape == (0, 1088)


def test_rows_that_begin_anywhere():
    """As in a file that is mapped into memory. Kernels on CUDA read words, so there it is an error."""
    rows = rows_of(FORMATS["int4_g64"], 576, "cpu")
    moved = torch.cat([rows.new_zeros(3), rows.flatten()])[3:].view(rows.shape)
    assert torch.equal(
        ops.unpack_rows(moved, "int4_g64", 576, torch.float16), FORMATS["int4_g64"].unpack(rows, 576, torch.float16)
    )


@pytest.mark.gpu
def test_rows_that_begin_anywhere_are_refused_on_a_gpu():
    rows = rows_of(FORMATS["int4_g64"], 576, "cuda")
    moved = torch.cat([rows.new_zeros(3), rows.flatten()])[3:].view(rows.shape)
    with pytest.raises(RuntimeError, match="unpack_rows: rows must start at multiples of 16 bytes"):
        ops.unpack_rows(moved, "int4_g64", 576, torch.float16)


@pytest.mark.parametrize("name", ["int4_g64_zp", "int8_g32", "fp8_e4m3"])
def test_opcheck(name, device):
    rows = rows_of(FORMATS[name], 576, device)
    torch.library.opcheck(ops.unpack_rows, (rows, name, 576, torch.bfloat16))


@pytest.mark.parametrize("input_rows", [False, True])
def test_a_compiled_layer_unpacks_inside_the_graph(input_rows, device):
    dense = torch.nn.Linear(128, 256, bias=False, device=device)
    layer = QuantizedLinear.from_linear(dense, FORMATS["int4_g64"], input_rows=input_rows)
    x = torch.randn(3, 128, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


WRONG = [
    ({"row_format": "int3"}, r"row_format must be one of int4_g32, .*, got 'int3'"),
    ({"columns": 0}, r"columns must be a positive multiple of 64 below 2\^31 for int4_g64, got 0"),
    ({"columns": 96}, r"columns must be a positive multiple of 64 below 2\^31 for int4_g64, got 96"),
    ({"columns": 2**32 + 576}, r"columns must be a positive multiple of 64 below 2\^31 for int4_g64, got 4294967872"),
    ({"columns": 704}, r"rows must be torch\.uint8 of shape \[I, 416\], .* rows of 704 .*, got torch\.uint8 of"),
    ({"dtype": torch.float64}, r"dtype must be float32, float16 or bfloat16, got torch\.float64"),
    ({"rows": torch.zeros(2, 336, dtype=torch.int8)}, r"rows must be torch\.uint8 .*, got torch\.int8 of shape"),
    ({"rows": torch.zeros(2, 704, dtype=torch.uint8)[:, ::2]}, "rows must .* have unit stride in their last dimension"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_errors(changes, message, place):
    rows = rows_of(FORMATS["int4_g64"], 576, "cpu")
    arguments = {"rows": rows, "row_format": "int4_g64", "columns": 576, "dtype": torch.bfloat16} | changes
    if place == "meta":  # with the same strides
        t = arguments["rows"]
        arguments["rows"] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=place)
    with pytest.raises(RuntimeError, match=f"^unpack_rows: {message}"):
        ops.unpack_rows(**arguments)
