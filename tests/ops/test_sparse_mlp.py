"""torch.ops.cats.sparse_mlp against its formula in fp64: shapes, rules, layouts, boundaries, special values."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, RULES, TOLERANCE, Case, assert_close, make_case
from torch import Tensor, nn

from cats_ext import ops
from cats_ext.ops import reference

INF, NAN = float("inf"), float("nan")
SHAPES = [  # tokens, H, I
    (1, 1, 1),
    (1, 6, 1),
    (1, 42, 17),
    (1, 576, 1536),
    (2, 123, 1536),
    (3, 6, 17),
    (4, 576, 17),
    (5, 42, 1536),
    (7, 123, 17),
    (8, 64, 176),
    (16, 123, 170),
    (17, 42, 1536),
    (33, 6, 1),
]
BIG_SHAPES = [(1, 4096, 1536), (2, 4096, 17), (1, 123, 14336), (1, 64, 5000), (1, 704, 2300)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, rule, device):
    case = make_case(*shape, dtype, device, rule)
    y = ops.sparse_mlp(*case.args())
    assert y.shape == case.x.shape and y.dtype == dtype and y.device == case.x.device
    assert_close(y, case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=str)
def test_big_shapes_equal_the_formula(shape, dtype, device):
    case = make_case(*shape, dtype, device)
    assert_close(ops.sparse_mlp(*case.args()), case.expected())


@pytest.mark.slow
def test_the_shape_of_mistral_7b_equals_the_formula(device):
    case = make_case(1, 4096, 14336, torch.bfloat16, device, "scalar")
    assert_close(ops.sparse_mlp(*case.args()), case.expected())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_biases(dtype, activation, bias, device):
    case = make_case(3, 123, 170, dtype, device, activation=activation, bias=bias)
    assert_close(ops.sparse_mlp(*case.args()), case.expected())


@pytest.mark.parametrize("given_bias", range(3))
def test_each_bias_alone(given_bias, device):
    case = make_case(2, 42, 17, device=device, bias=True)
    case.biases = [b if i == given_bias else None for i, b in enumerate(case.biases)]
    assert_close(ops.sparse_mlp(*case.args()), case.expected())


# --- the boundary: relu(g) = g, and every number here is exact in every dtype ---------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("threshold", "down_threshold", "kept"),
    [
        (2.0, None, [2, 3, 4]),
        (2.0000002384185791, None, [3, 4]),  # the next fp32 after 2
        (0.0, None, [0, 1, 2, 3, 4]),
        (-1.0, None, [0, 1, 2, 3, 4]),
        (NAN, None, [0, 1, 2, 3, 4]),
        (4.0, None, [4]),
        (4.5, None, []),
        (INF, None, []),
        (0.0, 6.0, [2, 3, 4]),  # h = 3 g
        (0.0, 6.000000476837158, [3, 4]),
        (3.0, 6.0, [3, 4]),
        (2.0, 9.0, [3, 4]),
        (2.0, NAN, [2, 3, 4]),
        ([0.0, 1.5, 2.0, 2.5, 9.0], [0.0, 0.0, 7.0, 9.0, 0.0], [0, 3]),
    ],
)
def test_exactly_at_the_threshold(threshold, down_threshold, kept, dtype, device):
    hidden = 5
    on = dict(dtype=dtype, device=device)
    x = torch.ones(1, hidden, **on)
    w_gate = torch.zeros(5, hidden, **on)
    w_gate[:, 0] = torch.arange(5)  # g = 0, 1, 2, 3, 4
    w_up = torch.zeros(5, hidden, **on)
    w_up[:, -1] = 3
    w_down_t = torch.eye(5, hidden, **on)  # y_j = h_j
    vector = lambda t: None if t is None else torch.tensor(t, device=device)  # noqa: E731
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    y = ops.sparse_mlp_counted(x, w_gate, w_up, w_down_t, counts, vector(threshold), vector(down_threshold), "relu")
    assert y.flatten().tolist() == [3 * j if j in kept else 0 for j in range(5)]
    assert counts[2] == len(kept)


# --- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "w_gate", "w_up"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_kept(dtype, value, place, device):
    """A single bad value makes every output of its token NaN or infinite, whatever finite threshold there is."""
    case = make_case(2, 42, 17, dtype, device, rule="all kept", activation="gelu_tanh" if value == INF else "silu")
    if place == "x":
        case.x[1, 3] = value
    else:
        case.weights[0][5] = case.x[1] / case.x[1].norm() * 4  # neuron 5 is kept for token 1, and g is far from 0
        case.weights[place == "w_up"][5, 3] = value
    thresholds = dict(threshold=torch.tensor(1.5), down_threshold=torch.tensor(1e4) if place == "x" else None)
    y = ops.sparse_mlp(*case.args(**thresholds))
    assert not y[1].isfinite().any()


def test_bad_value_stays_with_its_token(device):
    case = make_case(3, 42, 17, device=device)
    expected = case.expected()
    case.x[1, 0] = NAN
    y = ops.sparse_mlp(*case.args())
    assert y[1].isnan().all()
    assert_close(y[::2], expected[::2])


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_dropped_neurons_are_not_used(dtype, tokens, device):
    """Poison in the up and down rows that no token, or another token, keeps must not reach the output."""
    case = make_case(tokens, 42, 170, dtype, device, sparsity=0.8)
    expected = case.expected()
    v, h = case.values()
    keeps = (v >= case.threshold) & (h >= case.down_threshold)  # [M, I]
    case.weights[1][~(v >= case.threshold).any(0)] = NAN
    case.weights[2][~keeps.any(0)] = INF
    assert_close(ops.sparse_mlp(*case.args()), expected)
    if tokens > 1:
        only_first = keeps[0] & ~keeps[1:].any(0)
        assert only_first.any()
        case.weights[2][only_first] = NAN
        y = ops.sparse_mlp(*case.args())
        assert y[0].isnan().all()
        assert_close(y[1:], expected[1:])


# --- layouts: the result is that of contiguous tensors --------------------------------------------------------------


def merged(w: Tensor) -> Tensor:
    """A view into the halves of a wider row, as of a merged projection."""
    return torch.cat([torch.full_like(w, NAN), w, torch.full_like(w, NAN)], dim=1)[:, w.shape[1] : 2 * w.shape[1]]


def misaligned(t: Tensor) -> Tensor:
    """The same values one element after an aligned address."""
    return torch.cat([t.new_full((1,), NAN), t.flatten()])[1:].view(t.shape)


def scattered(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, NAN)], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [42, 64])
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.args(weights=[merged(w) for w in c.weights]),
        lambda c: c.args(weights=[misaligned(w) for w in c.weights]),
        lambda c: c.args(weights=[misaligned(merged(w)) for w in c.weights]),
        lambda c: c.args(x=misaligned(c.x)),
        lambda c: c.args(x=scattered(c.x)),
        lambda c: c.args(x=c.x.t().contiguous().t()),
        lambda c: c.args(down_threshold=scattered(c.down_threshold)),
        lambda c: c.args(threshold=c.threshold.expand(c.weights[0].shape[0])),
    ],
    ids="merged misaligned merged-misaligned x-misaligned x-strided x-transposed threshold-strided expanded".split(),
)
def test_layouts(change, hidden, dtype, device):
    case = make_case(3, hidden, 33, dtype, device)
    assert_close(ops.sparse_mlp(*change(case)), case.expected())


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds_with_a_stride(dtype, tokens, device):
    """Every second value of a tensor, with NaN between them, which would keep all neurons."""
    case = make_case(tokens, 64, 3000, dtype, device, "vector, vector")
    threshold, down_threshold = scattered(case.threshold), scattered(case.down_threshold)
    args = case.args(threshold=threshold, down_threshold=down_threshold)
    assert args[4].stride() == args[5].stride() == (2,)
    assert_close(ops.sparse_mlp(*args), case.expected())


def test_leading_dimensions(device):
    case = make_case(6, 42, 17, device=device)
    flat = ops.sparse_mlp(*case.args())
    assert_close(ops.sparse_mlp(*case.args(x=case.x.view(2, 1, 3, 42))), flat.view(2, 1, 3, 42))
    assert_close(ops.sparse_mlp(*case.args(x=case.x[0])), flat[0])


@pytest.mark.parametrize("shape", [(0, 42), (2, 0, 42)])
def test_no_tokens(shape, device):
    case = make_case(1, 42, 17, device=device)
    case.x = case.x.new_empty(shape)
    counts = torch.tensor([1, 2, 3], device=device)
    assert ops.sparse_mlp_counted(*case.counted_args(counts)).shape == shape
    assert counts.tolist() == [1, 2, 3]


# --- what the op promises beyond the formula ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 3, 4, 7, 16, 17, 40])
def test_tokens_do_not_affect_each_other(tokens, device):
    case = make_case(tokens, 123, 170, device=device)
    together = ops.sparse_mlp(*case.args())
    for token in range(tokens):
        assert_close(together[token], ops.sparse_mlp(*case.args(x=case.x[token])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_counts(tokens, rule, dtype, device):
    case = make_case(tokens, 42, 300, dtype, device, rule)
    counts = torch.tensor([1000, 2000, 3000], device=device)
    y = ops.sparse_mlp_counted(*case.counted_args(counts))
    v, h = case.values()
    kept = v >= case.threshold
    kept_down = kept if case.down_threshold is None else kept & (h >= case.down_threshold)
    assert counts.tolist() == [1000 + v.numel(), 2000 + int(kept.sum()), 3000 + int(kept_down.sum())]
    # on CUDA the order of additions varies from run to run, so a rounding may go either way
    assert_close(y, ops.sparse_mlp(*case.args()), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 42, 300), (5, 64, 300)], ids=str)
def test_deterministic(shape, device):
    case = make_case(*shape, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    y = ops.sparse_mlp(*case.args(), deterministic=True)
    assert_close(y, case.expected())
    assert torch.equal(y, ops.sparse_mlp(*case.args(), deterministic=True))
    assert torch.equal(y, ops.sparse_mlp_counted(*case.counted_args(counts), deterministic=True))
    assert counts[0] == case.x.shape[0] * 300


def test_threshold_zero_is_the_dense_module(device):
    class MLP(nn.Module):
        def __init__(self, hidden: int, intermediate: int) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(intermediate, hidden, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    mlp = MLP(123, 170).to(device).requires_grad_(False)
    x = torch.randn(2, 5, 123, device=device)
    w_down_t = mlp.down_proj.weight.t().contiguous()
    y = ops.sparse_mlp(x, mlp.gate_proj.weight, mlp.up_proj.weight, w_down_t, torch.zeros((), device=device))
    assert_close(y, mlp.double()(x.double()))


def test_same_bits_every_time_for_a_fixed_number_of_threads():
    case = make_case(2, 576, 1536, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first = ops.sparse_mlp(*case.args())
            assert all(torch.equal(ops.sparse_mlp(*case.args()), first) for _ in range(20))
            assert_close(first, case.expected())
    finally:
        torch.set_num_threads(before)


def test_several_python_threads(device):
    cases = [make_case(i + 1, 123, 170 + 10 * i, DTYPES[i % 3], device, seed=10 * i) for i in range(4)]
    failures = []

    def work(case: Case) -> None:
        try:
            expected = case.expected()
            for _ in range(25):
                assert_close(ops.sparse_mlp(*case.args()), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_the_reference_is_the_formula_by_hand():
    x, w_gate, w_up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, -1.0], [-1.0, 0.0]]), torch.ones(3, 2)
    w_down_t = torch.tensor([[1.0, 10.0], [100.0, 1000.0], [7.0, 7.0]])
    # g = 3, 1, -1; relu: v = 3, 1, 0; u = 3; h = 9, 3, 0
    for threshold, expected in ((0.0, [309.0, 3090.0]), (1.0, [309.0, 3090.0]), (1.5, [9.0, 90.0]), (3.5, [0.0, 0.0])):
        y = reference.sparse_mlp_ref(x, w_gate, w_up, w_down_t, torch.tensor(threshold), activation="relu")
        assert y.tolist() == [expected]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(
    tokens=st.integers(1, 20),
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(RULES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    sparsity=st.floats(0, 0.99),
    layout=st.sampled_from([lambda w: w, merged, misaligned]),
    seed=st.integers(0, 1000),
)
def test_any_case_equals_the_formula(
    tokens, hidden, intermediate, dtype, rule, activation, bias, sparsity, layout, seed, device
):
    case = make_case(tokens, hidden, intermediate, dtype, device, rule, activation, bias, sparsity, seed)
    y = ops.sparse_mlp(*case.args(weights=[layout(w) for w in case.weights]))
    expected = case.expected()
    tolerance = TOLERANCE[dtype]
    assert_close(y, expected, rtol=tolerance["rtol"], atol=tolerance["atol"] * max(1.0, float(expected.abs().max())))
