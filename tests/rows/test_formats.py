"""Packed rows: names and sizes as the compiled library has them, packing without loss, and errors."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DEVICES
from torch import Tensor

from cats_ext import ops
from cats_ext.native.library import LIBRARIES
from cats_ext.rows import FORMATS, RowFormat

INF, NAN = float("inf"), float("nan")
WIDTHS = [32, 64, 128, 160, 576, 1024, 1152, 4096]
needs_library = pytest.mark.skipif(not LIBRARIES["_C"].loaded, reason="asks the compiled library")


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def row_format(request) -> RowFormat:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def random_fields(row_format: RowFormat, hidden: int, rows: int = 5, device: str = "cpu") -> list[Tensor]:
    """Every value of q, and scales of both signs and all sizes."""
    groups = row_format.groups(hidden)
    if row_format.type == "int4":
        q = torch.randint(16, (rows, hidden), dtype=torch.uint8)
    elif row_format.type == "int8":
        q = torch.randint(-128, 128, (rows, hidden), dtype=torch.int8)
    else:
        q = (torch.randn(rows, hidden) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.randn(rows, groups) * torch.logspace(-6, 2, groups)
    fields = [q, scales if row_format.type == "fp8" else scales.half()]
    if row_format.zero_points:
        fields.append(torch.rand(rows, groups).mul(15).half())
    return [t.to(device) for t in fields]


def exact(row_format: RowFormat, fields: list[Tensor], hidden: int) -> Tensor:
    """The weights in float64, by the formula of csrc/row_format.h."""
    q, scales, *zeros = (t.double().cpu() for t in fields)
    columns = hidden // scales.shape[1]
    zero = zeros[0].repeat_interleave(columns, 1) if zeros else 8.0 if row_format.type == "int4" else 0.0
    return (q - zero) * scales.repeat_interleave(columns, 1)


def test_names(row_format):
    assert RowFormat.parse(row_format.name) is row_format
    assert RowFormat(row_format.type, row_format.group_size, row_format.zero_points) == row_format
    assert list(FORMATS) == [f.name for f in FORMATS.values()]


@needs_library
def test_the_library_has_the_same_names():
    x, w = torch.ones(1, 128), torch.zeros(2, 80, dtype=torch.uint8)
    with pytest.raises(RuntimeError) as error:
        ops.sparse_mlp_packed(x, w, w, w, "int5", "int4_g128", "int4_g128", torch.tensor(0.0))
    assert str(error.value).splitlines()[0] == (
        f"sparse_mlp_packed: gate_format must be one of {', '.join(FORMATS)}, got 'int5'"
    )


@needs_library
@pytest.mark.parametrize("hidden", WIDTHS)
def test_the_library_has_the_same_sizes(row_format, hidden):
    if row_format.group_size and hidden % row_format.group_size:
        pytest.skip("no multiple of the group size")
    x, w = torch.ones(1, hidden, device="meta"), torch.zeros(2, 16, dtype=torch.uint8, device="meta")
    threshold = torch.zeros((), device="meta")
    wanted = rf"w_gate must have shape \[2, {row_format.row_bytes(hidden)}\], the bytes of rows of {hidden} columns"
    with pytest.raises(RuntimeError, match=wanted):
        ops.sparse_mlp_packed(x, w, w, w, *[row_format.name] * 3, threshold)


@pytest.mark.parametrize(
    ("name", "hidden", "row_bytes"),
    [  # by hand: tiles' scales and data
        ("int4_g128", 4096, 4 * (16 + 512)),
        ("int4_g128_zp", 4096, 4 * (32 + 512)),
        ("int4_g32_zp", 1024, 128 + 512),
        ("int4_g64", 576, 32 + 320),
        ("int8_g128", 4096, 8 * (16 + 512)),
        ("int8_g64", 576, 16 + 512 + 16 + 128),
        ("int8_g32", 32, 32 + 128),
        ("fp8_e4m3", 1000, 16 + 512 + 16 + 512),
    ],
)
def test_row_bytes(name, hidden, row_bytes):
    assert RowFormat.parse(name).row_bytes(hidden) == row_bytes


@pytest.mark.parametrize("hidden", WIDTHS)
def test_packing_loses_nothing(row_format, hidden, device):
    if row_format.group_size and hidden % row_format.group_size:
        pytest.skip("no multiple of the group size")
    fields = random_fields(row_format, hidden, device=device)
    packed = row_format.pack(*fields)
    assert packed.is_contiguous() and packed.shape == (5, row_format.row_bytes(hidden))
    assert packed.device == fields[0].device
    back = row_format.fields(packed, hidden)
    assert back.zeros is None or row_format.zero_points
    for given, got in zip(fields, back, strict=False):
        assert got.dtype == given.dtype and torch.equal(got.float(), given.float())
    weights = row_format.unpack(packed, hidden)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double().cpu(), exact(row_format, fields, hidden), rtol=2**-24, atol=0)


def test_where_columns_and_scales_are():
    """Bytes of a row by hand, in the second of two tiles."""
    q = torch.zeros(1, 1152, dtype=torch.uint8)
    q[0, 1024], q[0, 1027] = 3, 15
    scales, zeros = torch.zeros(1, 9).half(), torch.zeros(1, 9).half()
    scales[0, 8], zeros[0, 8] = 1.0, 2.0
    row = RowFormat.parse("int4_g128_zp").pack(q, scales, zeros)[0]
    assert row[544:548].tolist() == [0x00, 0x3C, 0x00, 0x40]  # fp16 1.0 and 2.0, after 32 + 512 bytes
    assert row[576:578].tolist() == [0x03, 0xF0]
    assert row.count_nonzero() == 4

    q = torch.zeros(1, 600).to(torch.float8_e4m3fn)
    q[0, 513] = -1.0
    row = RowFormat.parse("fp8_e4m3").pack(q, torch.full((1, 1), 2.0))[0]
    assert row[:4].tolist() == row[528:532].tolist() == [0x00, 0x00, 0x00, 0x40]  # fp32 2.0
    assert row[544 + 1] == 0xB8 and row.count_nonzero() == 3


INT4, ZP, INT8, FP8 = (RowFormat.parse(n) for n in ("int4_g32", "int4_g32_zp", "int8_g32", "fp8_e4m3"))
Q4, Q8, F8 = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 64)
F8 = F8.to(torch.float8_e4m3fn)
S = torch.ones(2, 2).half()
ERRORS = {
    "a name": (lambda: RowFormat.parse("int4"), r"row format must be one of int4_g32, .*, fp8_e4m3, got 'int4'"),
    "a type": (lambda: RowFormat("int3", 64), "type must be one of int4, int8, fp8, got 'int3'"),
    "a group size": (lambda: RowFormat("int4", 48), "group_size of int4 must be one of 32, 64, 128, got 48"),
    "fp8 groups": (lambda: RowFormat("fp8", 64), "group_size of fp8 must be one of 0, got 64"),
    "int8 zeros": (lambda: RowFormat("int8", 64, True), "zero_points must be False for int8, got True"),
    "H": (lambda: INT4.groups(48), "columns must be a positive multiple of the group size of int4_g32, got 48"),
    "no H": (lambda: FP8.groups(0), "columns must be a positive number, got 0"),
    "q's dtype": (
        lambda: INT4.pack(Q8, S),
        r"q must be torch.uint8 \[I, H\] for int4_g32, got torch.int8 \[2, 64\]",
    ),
    "q's shape": (lambda: INT8.pack(Q8[0], S), r"q must be torch.int8 \[I, H\] for int8_g32, got torch.int8 \[64\]"),
    "q's range": (lambda: INT4.pack(Q4 + 16, S), "q must be 0 to 15 for int4_g32, got 16"),
    "q NaN": (lambda: FP8.pack((F8.float() + NAN).to(F8.dtype), torch.ones(2, 1)), "q must not be NaN for fp8_e4m3"),
    "scales' dtype": (
        lambda: INT4.pack(Q4, S.float()),
        r"scales must be torch.float16 \[2, 2\] on cpu for int4_g32, got torch.float32 \[2, 2\] on cpu",
    ),
    "scales' shape": (
        lambda: FP8.pack(F8, torch.ones(2)),
        r"scales must be torch.float32 \[2, 1\] on cpu for fp8_e4m3, got torch.float32 \[2\] on cpu",
    ),
    "infinite scales": (lambda: INT8.pack(Q8, S * INF), "scales must be finite, got inf"),
    "no zeros": (lambda: ZP.pack(Q4, S), "zeros must be given for int4_g32_zp, got None"),
    "zeros": (lambda: INT4.pack(Q4, S, S), "zeros must be None for int4_g32, got torch.float16"),
    "zeros' shape": (
        lambda: ZP.pack(Q4, S, S[:1]),
        r"zeros must be torch.float16 \[2, 2\] on cpu for int4_g32_zp, got torch.float16 \[1, 2\] on cpu",
    ),
    "infinite zeros": (lambda: ZP.pack(Q4, S, -S * INF), "zeros must be finite, got -inf"),
    "packed": (
        lambda: INT4.unpack(Q4, 64),
        r"packed must be torch.uint8 \[I, 128\] for 64 columns in int4_g32, got torch.uint8 \[2, 64\]",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()
