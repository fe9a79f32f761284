"""torch.ops.cats.packed_linear_step against the formula in fp64 on the weights that the packed rows stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.op_cases import DEVICES, normal
from support.packed_rows import HIDDEN, random_rows
from torch import Tensor

from cats_ext import ops
from cats_ext.ops.plan import MAX_PACKED_INPUTS, packed_linear_supported
from cats_ext.rows import FORMATS, RowFormat

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 6e-3}  # relative, of the whole row
WIDTHS = [(name, k) for name, form in FORMATS.items() for k in [*HIDDEN[form.group_size], 4096, 5120]]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean() + 1e-5) * weight


def make_rows(name: str, inputs: int, outputs: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    return [random_rows(FORMATS[name], n, inputs, inputs**-0.5, generator) for n in outputs]


class Call:
    """Arguments by name, on the CPU, and the fp64 result. form: which optional ones are there."""

    def __init__(self, name: str, inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, form: str = "") -> None:
        rows = make_rows(name, inputs, outputs)
        x, delta, norm = (normal(inputs, seed=s).to(dtype) for s in range(3))
        residual = normal(sum(outputs), seed=5).to(dtype)
        biases = [normal(n, seed=n).to(dtype) for n in outputs] if "bias" in form else []
        delta = delta.float() if "float delta" in form else delta
        self.arguments: dict[str, Any] = dict(
            x=x, delta=delta if "delta" in form else None, norm_weight=norm if "norm" in form else None, norm_eps=1e-5,
            weights=rows, row_format=name, biases=biases, residual=residual if "residual" in form else None,
            largest=None, total=None, y=torch.empty(sum(outputs), dtype=dtype),
            x_new=torch.empty(inputs, dtype=dtype) if "delta" in form else None,
        )  # fmt: skip
        self.row = x + delta.to(dtype) if "delta" in form else x
        inner = self.row.double()
        if "norm" in form:  # rounded as the model rounds it
            inner = ops.reference.rms_norm_ref(self.row, norm, 1e-5).double()
        self.expected = self.product(inner)

    def product(self, row: Tensor) -> Tensor:
        a = self.arguments
        weights = torch.cat([RowFormat.parse(a["row_format"]).unpack(w, row.numel()) for w in a["weights"]]).double()
        y = F.linear(row, weights)
        if a["biases"]:
            y = (y + torch.cat(a["biases"]).double()).to(a["y"].dtype).double()
        return y if a["residual"] is None else y.to(a["y"].dtype).double() + a["residual"].double()

    def run(self, device: str, **changed: Any) -> Tensor:
        there = {k: self.to(v, device) for k, v in (self.arguments | changed).items()}
        ops.packed_linear_step(**there)
        if there["x_new"] is not None:
            assert torch.equal(there["x_new"].cpu(), self.row)
        return there["y"].cpu()

    @staticmethod
    def to(value: Any, device: str) -> Any:
        if isinstance(value, list):
            return [v.to(device) for v in value]
        return value.to(device) if isinstance(value, Tensor) else value


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.1e}"


def served(device: str, name: str, inputs: int, dtype: torch.dtype) -> bool:
    return packed_linear_supported(torch.empty(0, device=device), inputs, dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("name", "inputs"), WIDTHS)
def test_equals_the_formula(name, inputs, dtype, device):
    call = Call(name, inputs, (37,), dtype)
    if not served(device, name, inputs, dtype):
        with pytest.raises(RuntimeError, match="packed_linear_step: cudaErrorNotSupported"):
            call.run(device)
        return
    assert_near(call.run(device), call.expected)


@pytest.mark.parametrize("form", ["norm", "norm, delta, bias", "norm, float delta", "residual", "residual, bias"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forms(name, dtype, form, device):
    call = Call(name, 640, (100,) if "residual" in form else (64, 33, 7), dtype, form)
    assert_near(call.run(device), call.expected)


@pytest.mark.parametrize("outputs", [(2,), (16,), (5000,), (17, 1), (1, 16, 4096), (128, 128, 128)])
@pytest.mark.parametrize(("name", "inputs"), [("int4_g128", 1024), ("int8_g64", 4096), ("fp8_e4m3", 8)])
def test_outputs(name, inputs, outputs, device):
    call = Call(name, inputs, outputs, BF16, "norm, bias")
    assert_near(call.run(device), call.expected)


@pytest.mark.parametrize("splits", [1, 3, 4, 9])
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (9, 64), (8, 80), (4, 96), (12, 16)])
def test_merging_partials(heads, head_dim, splits, device):
    inputs = heads * head_dim
    name = "int4_g64_zp" if inputs % 64 == 0 else "fp8_e4m3"
    call = Call(name, inputs, (50,), BF16, "residual")
    partials = {"x": normal(splits, heads, head_dim, seed=1), "largest": 5 * normal(splits, heads, seed=2)}
    partials["total"] = normal(splits, heads, seed=3).abs() + 1
    if splits > 1:  # a part without keys
        partials["x"][1, ::2], partials["largest"][1, ::2], partials["total"][1, ::2] = 0, -1e30, 0
    row = ops.reference.merged_attention_ref(*(p.double() for p in partials.values()))
    assert_near(call.run(device, **partials), call.product(row.to(BF16).double()))


@pytest.mark.parametrize("name", FORMATS)
def test_x_far_from_one(name, device):
    call = Call(name, 256, (60,), BF16)
    for scale, shift in ((1e12, 0), (1e-12, 0), (1, 30)):
        x = (call.arguments["x"].float() * scale + shift).to(BF16)
        assert_near(call.run(device, x=x), call.product(x.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_are_kept(name, value, device):
    call = Call(name, 256, (60,), BF16)
    call.arguments["x"][3] = value
    assert not call.run(device).isfinite().any()
    with_norm = {"norm_weight": torch.ones(256, dtype=BF16)}
    assert call.run(device, **with_norm).isnan().any()


def test_nan_in_one_row(device):
    call = Call("int4_g128", 256, (60,), BF16)
    call.arguments["weights"][0][7, :2] = 0x7F  # its first scale
    assert call.run(device).isnan().nonzero().flatten().tolist() == [7]


def test_rows_with_a_stride(device):
    call = Call("int8_g128", 384, (40,), F16)
    rows = call.arguments["weights"][0]
    wide = torch.full((40, rows.shape[1] + 48), 0x7F, dtype=torch.uint8, device=device)
    wide[:, 16:-32] = rows.to(device)
    arguments = {k: Call.to(v, device) for k, v in call.arguments.items()} | {"weights": [wide[:, 16:-32]]}
    ops.packed_linear_step(**arguments)
    assert_near(arguments["y"].cpu(), call.expected)


@pytest.mark.gpu
def test_too_many_columns():
    call = Call("int8_g128", MAX_PACKED_INPUTS + 128, (3,), BF16)
    with pytest.raises(RuntimeError, match="packed_linear_step: cudaErrorNotSupported"):
        call.run("cuda")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(x=torch.zeros(1, 128)), r"x must have shape \[K\], got \[1, 128\]"),
        (dict(x=torch.zeros(0)), r"x must have K > 0, got shape \[0\]"),
        (dict(x=torch.zeros(128, dtype=F16)), "x must have y's dtype torch.float32, got torch.float16"),
        (dict(delta=torch.zeros(127)), r"delta must have shape \[128\], got \[127\]"),
        (dict(norm_weight=torch.zeros(1)), r"norm_weight must have shape \[128\], got \[1\]"),
        (dict(weights=[]), "weights must be 1 to 3 tensors, got 0"),
        (dict(weights=[torch.zeros(5, 80, dtype=torch.uint8)] * 4), "weights must be 1 to 3 tensors, got 4"),
        (dict(weights=[torch.zeros(5, 81, dtype=torch.uint8)]), r"weights\[0\] must have shape \[5, 80\], the bytes"),
        (dict(weights=[torch.zeros(5, 80)]), r"weights\[0\] must be torch.uint8, got torch.float32"),
        (dict(row_format="int3"), "row_format must be one of int4_g32, .*, got 'int3'"),
        (dict(biases=[torch.zeros(5)] * 2), "biases must be none or 1, as many as weights, got 2"),
        (dict(biases=[torch.zeros(4)]), r"biases\[0\] must have shape \[5\], got \[4\]"),
        (dict(residual=torch.zeros(4)), r"residual must have shape \[5\], got \[4\]"),
        (dict(total=torch.zeros(1, 1)), r"x must have shape \[S, heads, D\] with largest and total, got \[128\]"),
        (dict(x=torch.zeros(2, 1, 128), total=torch.zeros(2, 1)), "largest must be contiguous float32 .*, got None"),
        (dict(y=torch.zeros(4)), r"y must have shape \[5\], got \[4\]"),
        (dict(y=torch.zeros(5, dtype=torch.int32)), "y must be float32, float16 or bfloat16, got torch.int32"),
        (dict(x_new=torch.zeros(4)), r"x_new must have shape \[128\], got \[4\]"),
    ],
)
def test_wrong_arguments(change, sentence, device):
    call = Call("int4_g128", 128, (5,), F32)
    with pytest.raises(RuntimeError, match=f"packed_linear_step: {sentence}"):
        call.run(device, **change)


@pytest.mark.parametrize("form", ["", "norm, delta, bias"])
def test_opcheck(form, device):
    call = Call("int4_g64", 64, (10, 5) if form else (7,), BF16, form)
    torch.library.opcheck(ops.packed_linear_step, (), {k: Call.to(v, device) for k, v in call.arguments.items()})
