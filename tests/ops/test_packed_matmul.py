"""torch.ops.cats.packed_matmul, products of packed rows with many tokens, and where layers take it."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DEVICES
from support.packed_rows import matmul_difference, random_rows
from torch import Tensor

from cats_ext import ops
from cats_ext.rows import FORMATS, QuantizedLinear
from cats_ext.rows import product as rows_product
from cats_ext.rows.product import MAX_PRODUCT_TOKENS, has_product, packed_product, product_fits

GPU = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def case(name: str, tokens: int, rows: int, columns: int, input_rows: bool, dtype, device: str) -> tuple:
    """The arguments of a call."""
    g = torch.Generator().manual_seed(tokens + rows + columns)
    packed = random_rows(FORMATS[name], rows, columns, 1.0, g).to(device)
    x = torch.randn(tokens, rows if input_rows else columns, generator=g).to(device, dtype)
    bias = torch.randn(columns if input_rows else rows, generator=g).to(device, dtype) if tokens % 2 else None
    return x, packed, name, columns, input_rows, bias


def check(arguments: tuple) -> Tensor:
    y = ops.packed_matmul(*arguments)
    assert not matmul_difference(*arguments, y)
    return y


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_formula(name, input_rows, dtype, device):
    group = FORMATS[name].group_size or 8
    others = [(5, 72, 1000), (70, 136, 96), (33, 200, 160), (9, 24, 192)]  # with a last chunk that is padded
    for tokens, rows, columns in [(1, 8, 128), (33, 200, 384), (70, 136, 1152), *others]:
        if columns % group == 0:
            check(case(name, tokens, rows, columns, input_rows, dtype, device))


# Tiles of 32, 64, 128 and 256 tokens, and one CTA or several for a tile: which of them a shape takes depends on the
# number of multiprocessors.
@GPU
@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_zp", "int8_g64", "fp8_e4m3"])
@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("tokens", [1, 32, 57, 64, 100, 128, 200, 256, 300, 512, 1024])
def test_shapes_of_models(name, input_rows, tokens):
    for rows, columns in [(2816, 1024), (14336, 4096)] if tokens % 2 == 0 else [(4864, 896)]:
        check(case(name, tokens, rows, columns, input_rows, torch.bfloat16, "cuda"))


@GPU
@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_the_same_bits_in_every_run_and_in_a_graph(input_rows):
    arguments = case("int4_g128", 40, 4096, 2048, input_rows, torch.bfloat16, "cuda")
    y = check(arguments)
    x = arguments[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.packed_matmul(*arguments)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, y) and torch.equal(ops.packed_matmul(*arguments), y)
    x.mul_(-2)
    graph.replay()
    assert torch.equal(captured, -2 * y)


# A race between the copy engine and the warps that read what it brings would show here, and not in one run of a shape.
@GPU
@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_zp", "int8_g64", "fp8_e4m3"])
@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_the_same_bits_in_every_run_of_many_shapes(name, input_rows):
    g = torch.Generator().manual_seed(len(name))
    number = lambda most: int(torch.randint(1, most + 1, (), generator=g))  # noqa: E731
    for _ in range(40):
        rows, columns = (8 * number(320), 128 * number(16)) if not input_rows else (8 * number(256), 128 * number(20))
        arguments = case(name, number(700), rows, columns, input_rows, torch.bfloat16, "cuda")
        y = ops.packed_matmul(*arguments)
        for _ in range(30):
            assert torch.equal(ops.packed_matmul(*arguments), y), (len(arguments[0]), rows, columns)


@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_layouts_of_x(input_rows, device):
    x, rows, name, columns, _, bias = case("int8_g128", 24, 256, 128, input_rows, torch.bfloat16, device)
    y = ops.packed_matmul(x, rows, name, columns, input_rows, bias)
    wider = torch.cat([x.new_zeros(24, 1), x, x.new_zeros(24, 2)], 1)[:, 1:-2]  # not from multiples of 16 bytes on
    assert torch.equal(ops.packed_matmul(wider, rows, name, columns, input_rows, bias), y)
    moved = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    assert torch.equal(ops.packed_matmul(moved, rows, name, columns, input_rows, bias), y)
    batch = ops.packed_matmul(x.view(2, 12, -1).transpose(0, 1), rows, name, columns, input_rows, bias)
    assert torch.equal(batch.transpose(0, 1).reshape(y.shape), y)
    assert torch.equal(ops.packed_matmul(x[0], rows, name, columns, input_rows, bias), y[0])
    assert ops.packed_matmul(x[:0], rows, name, columns, input_rows, bias).shape == (0, y.shape[1])
    gap = torch.nn.functional.pad(rows, (16, 32))[:, 16 : 16 + rows.shape[1]]
    assert torch.equal(ops.packed_matmul(x, gap, name, columns, input_rows, bias), y)


@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_infinite_values_stay_in_their_token(input_rows, device):
    x, rows, name, columns, _, _ = case("int4_g64", 8, 256, 192, input_rows, torch.bfloat16, device)
    y = ops.packed_matmul(x, rows, name, columns, input_rows)
    x[2, 5], x[3, 0] = torch.inf, torch.nan
    spoilt = ops.packed_matmul(x, rows, name, columns, input_rows)
    assert not spoilt[2].isfinite().all() and spoilt[3].isnan().all()
    rest = [0, 1, 4, 5, 6, 7]
    assert torch.equal(spoilt[rest], y[rest])


@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_opcheck(input_rows, device):
    torch.library.opcheck(
        ops.packed_matmul, case("int4_g32_zp", 3, 64, 96, input_rows, torch.float16, device), test_utils=OPCHECKS
    )


OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")

WRONG = [
    ({"x": torch.zeros(2, 576, dtype=torch.float64)}, r"x must be float32, float16 or bfloat16, got torch\.float64"),
    (
        {"x": torch.zeros(2, 512, dtype=torch.bfloat16)},
        r"x must have last dimension 576, columns, got .*512",
    ),
    ({"row_format": "int3"}, r"row_format must be one of int4_g32, .*, got 'int3'"),
    ({"columns": 0}, r"columns must be positive and below 2\^31, got 0"),
    ({"columns": 2**32 + 576}, r"columns must be positive and below 2\^31, got 4294967872"),
    ({"input_rows": True}, r"x must have last dimension 8, as many as rows, got shape \[2, 576\]"),
    ({"rows": torch.zeros(2, 336, dtype=torch.int8)}, r"rows must be .*uint8"),
    ({"bias": torch.zeros(9, dtype=torch.bfloat16)}, r"bias must .*8"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_errors(changes, message, place):
    x, rows, name, columns, input_rows, bias = case("int4_g64", 2, 8, 576, False, torch.bfloat16, "cpu")
    arguments = {
        "x": x, "rows": rows, "row_format": name, "columns": columns, "input_rows": input_rows, "bias": bias,
    } | changes  # fmt: skip
    if place == "meta":
        arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^packed_matmul: {message}"):
        ops.packed_matmul(**arguments)


@GPU
def test_errors_on_a_gpu():
    x, rows, name, columns, _, bias = case("int4_g64", 3, 16, 576, False, torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match=r"packed_matmul: the kernel needs .* got torch.float32"):
        ops.packed_matmul(x.float(), rows, name, columns, False, bias.float())
    with pytest.raises(RuntimeError, match=r"packed_matmul: the kernel needs .* multiples of 8 .* got .*, 576 and 12"):
        ops.packed_matmul(x, rows[:12], name, columns)
    moved = torch.cat([rows.new_zeros(3), rows.flatten()])[3:].view(rows.shape)
    with pytest.raises(RuntimeError, match="packed_matmul: rows must have rows that start at multiples of 16 bytes"):
        ops.packed_matmul(x, moved, name, columns)
    with pytest.raises(RuntimeError, match=r"packed_matmul: rows must be .*cuda"):
        ops.packed_matmul(x, rows.cpu(), name, columns)


# --- where layers take it ---------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("input_rows", [False, True], ids=["outputs", "inputs"])
def test_a_layer_multiplies_with_its_rows(input_rows, monkeypatch):
    """Eager, compiled, and not where a gradient is needed, under autocast, or for more tokens than pays."""
    taken = []
    monkeypatch.setattr(rows_product, "product_fits", lambda *args: taken.append(product_fits(*args)) or taken[-1])
    dense = torch.nn.Linear(256, 384, device="cuda", dtype=torch.bfloat16)
    layer = QuantizedLinear.from_linear(dense, FORMATS["int4_g128"], input_rows=input_rows).requires_grad_(False)
    x = torch.randn(2, 9, 256, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x, layer.unpacked(x.dtype), layer.bias)
    close = dict(rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(layer(x), expected, **close)
    assert taken == [True] and has_product(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    taken.clear()
    many = torch.randn(MAX_PRODUCT_TOKENS + 1, 256, device="cuda", dtype=torch.bfloat16)
    layer(many)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        layer(x)
    learnt = x.clone().requires_grad_()
    layer(learnt).sum().backward()
    assert taken == [False] * 3
    torch.testing.assert_close(learnt.grad, layer.unpacked(x.dtype).sum(0).expand_as(x), rtol=2**-5, atol=2**-5)


def test_where_a_gradient_is_needed_the_op_is_not_taken(monkeypatch):
    monkeypatch.setattr(rows_product, "has_product", lambda x: True)
    x, bias = torch.randn(3, 64), torch.randn(8)
    assert product_fits(x, 8, 64) and product_fits(x, 8, 64, bias)
    learnt = bias.clone().requires_grad_()
    assert not product_fits(x, 8, 64, learnt) and not product_fits(x.clone().requires_grad_(), 8, 64, bias)
    with torch.no_grad():
        assert product_fits(x, 8, 64, learnt)
    assert not product_fits(x, 12, 64, bias) and not product_fits(x, 8, 60, bias)
    assert not product_fits(torch.randn(MAX_PRODUCT_TOKENS + 1, 64), 8, 64, bias)


def test_without_a_kernel_the_rows_are_unpacked():
    x, rows, name, columns, input_rows, bias = case("int4_g64", 5, 24, 192, False, torch.float32, "cpu")
    assert not has_product(x) and not product_fits(x, 24, columns)
    expected = torch.nn.functional.linear(x, FORMATS[name].unpack(rows, columns), bias)
    assert torch.equal(packed_product(x, rows, FORMATS[name], columns, input_rows=input_rows, bias=bias), expected)
