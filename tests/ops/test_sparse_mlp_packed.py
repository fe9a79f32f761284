"""torch.ops.cats.sparse_mlp_packed against the formula in fp64 on the weights that the packed rows stand for."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, RULES, assert_close, clear_of, to_device
from support.packed_rows import HIDDEN, make_packed_case

from cats_ext import ops
from cats_ext.ops import reference
from cats_ext.ops.plan import device_limits, plan
from cats_ext.rows import FORMATS, quantize_rows

WIDTHS = [(name, hidden) for name, form in FORMATS.items() for hidden in HIDDEN[form.group_size]]
MIXED = [
    ("int8_g64", "int4_g64_zp", "int4_g64"),
    ("int4_g32", "fp8_e4m3", "int8_g64"),
    ("fp8_e4m3", "int4_g64", "int4_g32_zp"),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "hidden"), WIDTHS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_equals_the_formula(tokens, name, hidden, dtype, device):
    case = make_packed_case(tokens, hidden, 37, name, dtype, device)
    y = ops.sparse_mlp_packed(*case.args())
    assert y.shape == case.x.shape and y.dtype == dtype and y.device == case.x.device
    assert_close(y, case.expected())


@pytest.mark.parametrize("tokens", range(1, 18))
@pytest.mark.parametrize("name", ["int4_g64", "int4_g64_zp", "int8_g64", "fp8_e4m3"])
def test_any_number_of_tokens(name, tokens, device):
    case = make_packed_case(tokens, 576, 83, name, torch.bfloat16, device)
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())


@pytest.mark.parametrize("intermediate", [1, 8, 1536, 5000])
@pytest.mark.parametrize("name", FORMATS)
def test_intermediate_sizes(name, intermediate, device):
    case = make_packed_case(1, 128, intermediate, name, torch.float16, device)
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rules_and_counts(tokens, name, rule, device):
    case = make_packed_case(tokens, 128, 300, name, torch.bfloat16, device, rule)
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())
    counts = torch.tensor([1000, 2000, 3000], device=device)
    y = ops.sparse_mlp_packed_counted(*case.counted_args(counts))
    assert_close(y, case.expected())
    v, h = case.values()
    kept = v >= case.threshold
    kept_down = kept if case.down_threshold is None else kept & (h >= case.down_threshold)
    assert counts.tolist() == [1000 + v.numel(), 2000 + int(kept.sum()), 3000 + int(kept_down.sum())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_biases(dtype, activation, bias, device):
    case = make_packed_case(3, 192, 170, "int4_g64_zp", dtype, device, activation=activation, bias=bias)
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formats", MIXED, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_format_for_each_matrix(tokens, formats, dtype, device):
    case = make_packed_case(tokens, 576, 91, formats, dtype, device, bias=True)
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())


@pytest.mark.parametrize("name", FORMATS)
def test_rows_with_a_stride(name, device):
    """Gate and up rows in one tensor with gaps, whose bytes are NaN as scales and as weights."""
    case = make_packed_case(2, 1152, 40, name, torch.float32, device)
    bytes_ = case.rows[0].shape[1]
    merged = torch.full((2, 40, bytes_ + 48), 0x7F, dtype=torch.uint8)
    merged[:, :, 16 : 16 + bytes_] = torch.stack(case.rows[:2]).cpu()
    gate, up = to_device(merged, device)[:, :, 16 : 16 + bytes_]
    assert_close(ops.sparse_mlp_packed(*case.args(rows=[gate, up, case.rows[2]])), case.expected())


@pytest.mark.parametrize(
    ("dtype", "hidden"), [(torch.float32, 128), (torch.bfloat16, 128), (torch.bfloat16, 640)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_dropped_neurons_are_not_used(name, tokens, dtype, hidden, device):
    """NaN as scales of integers, or as weights in fp8, in the up and down rows that no token keeps."""
    case = make_packed_case(tokens, hidden, 170, name, dtype, device, sparsity=0.8)
    v, h = case.values()
    keeps = (v >= case.threshold) & (h >= case.down_threshold)
    expected = case.expected()
    case.rows[1][~(v >= case.threshold).any(0)] = 0x7F
    case.rows[2][~keeps.any(0)] = 0x7F
    assert_close(ops.sparse_mlp_packed(*case.args()), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_are_kept(name, value, device):
    case = make_packed_case(2, 128, 17, name, torch.float32, device, rule="all kept")
    expected = case.expected()
    case.x[1, 3] = value
    y = ops.sparse_mlp_packed(*case.args(threshold=torch.tensor(1.5)))
    assert not y[1].isfinite().any()
    assert_close(ops.sparse_mlp_packed(*case.args())[0], expected[0])


@pytest.mark.parametrize("name", FORMATS)
def test_x_far_from_one(name, device):
    """Large and small x, and x with a large mean, which a zero point multiplies."""
    case = make_packed_case(3, 256, 60, name, torch.float32, device, rule="all kept", activation="relu")
    case.x[0] *= 1e12
    case.x[1] *= 1e-12
    case.x[2] += 30
    y, expected = ops.sparse_mlp_packed(*case.args()).cpu().double(), case.expected()
    for got, wanted in zip(y, expected, strict=True):
        assert (got - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_anywhere_in_a_row(name, dtype, value):
    case = make_packed_case(2, 192 if "128" not in name else 256, 17, name, dtype, "cpu", rule="all kept")
    expected = case.expected()
    for column in (0, 1, 15, 16, 62, 63, 64, 127, 128, 150, 191):
        x = case.x.clone()
        x[1, column] = value
        y = ops.sparse_mlp_packed(*case.args(x=x))
        assert not y[1].isfinite().any(), column
        assert_close(y[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_small_inputs_beside_an_outlier(name, dtype):
    """The weights of the outlier are zero, so that rounding of the others by its size would show."""
    case = make_packed_case(3, 256, 60, name, dtype, "cpu", rule="all kept", activation="relu")
    case.x[:, 5] = 500
    for w in case.weights[:2]:
        w[:, 5] = 0
    case.rows = [quantize_rows(w.float(), FORMATS[name]) for w in case.weights]
    case.weights = [FORMATS[name].unpack(w, 256) for w in case.rows]
    y, expected = ops.sparse_mlp_packed(*case.args()).double(), case.expected().to(dtype).double()
    for got, wanted in zip(y, expected, strict=True):
        assert (got - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("power", [-133, -120, -60, 60])
@pytest.mark.parametrize("name", FORMATS)
def test_the_range_of_bfloat16(name, power):
    """x from subnormal to large; beside small ones the gate is its bias, so that y is of their size."""
    case = make_packed_case(1, 128, 20, name, torch.bfloat16, "cpu", rule="all kept", activation="relu")
    case.biases[0] = torch.full((20,), 2.0, dtype=torch.bfloat16)
    case.x *= 2.0**power
    y, expected = ops.sparse_mlp_packed(*case.args()).double(), case.expected().to(torch.bfloat16).double()
    assert expected.any()
    assert (y - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_what_shared_memory_held_does_not_matter(tokens):
    """NaN codes of fp8 in every place that rows had, before a call that fills few places, with short rows."""
    before = make_packed_case(tokens, 640, 6000, "fp8_e4m3", torch.bfloat16, "cuda", rule="all kept")
    before.rows = [torch.full_like(rows, 0x7F) for rows in before.rows]
    case = make_packed_case(tokens, 640, 700, "fp8_e4m3", torch.bfloat16, "cuda", "scalar", sparsity=0.95)
    assert ops.sparse_mlp_packed(*before.args()).isnan().all()
    assert_close(ops.sparse_mlp_packed(*case.args()), case.expected())


@pytest.mark.parametrize("name", FORMATS)
def test_deterministic(name, device):
    case = make_packed_case(2, 256, 300, name, torch.float32, device)
    first = ops.sparse_mlp_packed(*case.args(), deterministic=True)
    assert_close(first, case.expected())
    for _ in range(5):
        assert torch.equal(ops.sparse_mlp_packed(*case.args(), deterministic=True), first)


def test_leading_dimensions_and_no_tokens(device):
    case = make_packed_case(6, 64, 17, "int4_g64", device=device)
    flat = ops.sparse_mlp_packed(*case.args())
    assert_close(ops.sparse_mlp_packed(*case.args(x=case.x.view(2, 1, 3, 64))), flat.view(2, 1, 3, 64))
    assert_close(ops.sparse_mlp_packed(*case.args(x=case.x[0])), flat[0])
    assert ops.sparse_mlp_packed(*case.args(x=case.x[:0])).shape == (0, 64)


def test_rounded_weights(device):
    """From a dense weight to the op: what quantize_rows makes is what the kernel reads."""
    case = make_packed_case(1, 256, 96, "int4_g128_zp", device=device, rule="all kept")
    case.rows = [quantize_rows(w.to(device), FORMATS["int4_g128_zp"]) for w in case.weights]
    y = ops.sparse_mlp_packed(*case.args())
    case.weights = [FORMATS["int4_g128_zp"].unpack(w, 256) for w in case.rows]
    assert_close(y, case.expected())


def test_the_reference_unpacks(device):
    case = make_packed_case(2, 160, 30, ("int4_g32", "int8_g32", "fp8_e4m3"), device=device)
    assert_close(reference.sparse_mlp_packed_ref(*case.args(), compute_dtype=torch.float64), case.expected())


# --- the step of decoding -------------------------------------------------------------------------------------------


def step_args(formats, hidden, intermediate, dtype, device):
    """What the op takes, with a zero sum, and the float64 result."""
    case = make_packed_case(1, hidden, intermediate, formats, dtype, rule="all kept")
    x, norm = case.x[0] * 3, (1 + 0.2 * torch.randn(hidden)).to(dtype)
    case.x = reference.rms_norm_ref(x, norm, 1e-5)[None]
    v, _ = case.values()
    case.threshold = clear_of(v.flatten().quantile(0.5), v, 1e-5 if dtype == torch.float32 else 3e-3)
    y_sum = torch.zeros(-(-(hidden + 1) // 4) * 4)
    args = [x, norm, 1e-5, *case.rows, *case.formats, y_sum, case.threshold]
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args], case.expected()


def has_step(formats, hidden, dtype):
    return plan(hidden, 2304, 1, dtype, device_limits(torch.device("cuda")), step=True, formats=formats).supported


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formats", [*((name,) * 3 for name in FORMATS), MIXED[0]], ids=str)
def test_step_adds_the_mlp_of_the_normalised_row(formats, dtype, device):
    hidden = 576 if "128" not in formats[0] else 1024
    args, expected = step_args(formats, hidden, 2304, dtype, device)
    if device == "cuda" and not has_step(formats, hidden, dtype):
        with pytest.raises(RuntimeError, match="sparse_mlp_packed_step: cudaErrorNotSupported"):
            ops.sparse_mlp_packed_step(*args)
        return
    ops.sparse_mlp_packed_step(*args)
    got = args[9][: expected.numel()].double().cpu()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (got - expected[0]).norm() <= tolerance * expected.norm()


# --- PyTorch's machinery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_opcheck(tokens, device):
    case = make_packed_case(max(tokens, 1), 64, 10, MIXED[0], torch.bfloat16, device, bias=True)
    case.x = case.x[:tokens]
    torch.library.opcheck(ops.sparse_mlp_packed, case.args())
    torch.library.opcheck(ops.sparse_mlp_packed, case.args()[:8])  # all defaults
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.sparse_mlp_packed_counted, case.counted_args(counts))


def test_opcheck_step(device):
    args, _ = step_args(("int4_g64", "int4_g64", "int8_g64"), 64, 2200, torch.bfloat16, device)
    torch.library.opcheck(ops.sparse_mlp_packed_step, tuple(args))


def test_compile_whole_graph(device):
    case = make_packed_case(2, 64, 10, MIXED[0], device=device)
    compiled = torch.compile(ops.sparse_mlp_packed, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*case.args()), case.expected())
