"""torch.ops.cats.sparse_mlp_columns against its formula in fp64: which inputs the gate sees, shapes, layouts, graphs.

What it shares with sparse_mlp behind the gate is tested there. On CUDA rows are multiples of 16 bytes.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from support.columns_cases import ColumnsCase, make_columns_case
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, RULES, assert_close
from torch import Tensor

from cats_ext import ops

INF, NAN = float("inf"), float("nan")
TOKENS = [1, 2, 3, 17]
SHAPES = [(8, 8), (8, 16), (64, 176), (576, 1536), (40, 1000), (128, 8)]  # H, I
ODD_SHAPES = [(1, 1), (5, 1), (1, 33), (42, 17), (123, 170), (67, 1031)]
BIG_SHAPES = [(4096, 1536), (2048, 8192), (64, 20_000), (4096, 24)]
CASES = {"cpu": 100, "cuda": int(os.environ.get("CATS_RANDOM_CASES", 400))}
SEED = int(os.environ.get("CATS_RANDOM_SEED", 0))

op, counted_op = ops.sparse_mlp_columns, ops.sparse_mlp_columns_counted


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, tokens, dtype, rule, device):
    case = make_columns_case(tokens, *shape, dtype, device, rule)
    y = op(*case.args())
    assert y.shape == case.x.shape and y.dtype == dtype and y.device == case.x.device
    assert_close(y, case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes_equal_the_formula(shape, tokens, dtype):
    """A row ends inside a vector, and the next token's gates begin there."""
    for bias in (False, True):
        case = make_columns_case(tokens, *shape, dtype, bias=bias)
        assert_close(op(*case.args()), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG_SHAPES, ids=str)
def test_big_shapes_equal_the_formula(shape, dtype, device):
    for tokens in (1, 3):
        case = make_columns_case(tokens, *shape, dtype, device)
        assert_close(op(*case.args()), case.expected())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_biases(dtype, activation, bias, device):
    case = make_columns_case(3, 128, 176, dtype, device, activation=activation, bias=bias)
    assert_close(op(*case.args()), case.expected())


@pytest.mark.parametrize("given_bias", range(3))
def test_each_bias_alone(given_bias, device):
    case = make_columns_case(2, 40, 24, device=device, bias=True)
    case.biases = [b if i == given_bias else None for i, b in enumerate(case.biases)]
    assert_close(op(*case.args()), case.expected())


# --- which inputs are kept ------------------------------------------------------------------------------------------


def case_of_inputs(dtype: torch.dtype, device: str) -> ColumnsCase:
    """y = what the gate sees of x: relu(g) = g = x_j, u = 1 and h = y; exact in every dtype."""
    x = torch.tensor([[0.0, 1, 2, 3, 4, 2.5, 1.5, 6]], dtype=dtype, device=device)
    zeros, eye = torch.zeros(8, 8, dtype=dtype, device=device), torch.eye(8, dtype=dtype, device=device)
    return ColumnsCase(x, [eye, zeros, eye], [None, torch.ones_like(x[0]), None], "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (2.0, [2, 3, 4, 2.5, 6]),
        (2.000000238418579, [3, 4, 2.5, 6]),  # the next fp32 after 2
        (0.0, [0, 1, 2, 3, 4, 2.5, 1.5, 6]),
        (-1.0, [0, 1, 2, 3, 4, 2.5, 1.5, 6]),
        (NAN, [0, 1, 2, 3, 4, 2.5, 1.5, 6]),
        (6.0, [6]),
        (6.5, []),
        (INF, []),
    ],
)
def test_exactly_at_the_threshold(threshold, kept, dtype, device):
    case = case_of_inputs(dtype, device)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    case.input_threshold = torch.tensor(threshold)
    y = counted_op(*case.counted_args(counts))
    assert y.flatten().tolist() == [x if x in kept else 0 for x in case.x.flatten().tolist()]
    assert counts.tolist() == [8, 8, 8, len(kept)]


def test_negative_inputs_go_by_their_size(device):
    case = case_of_inputs(torch.float32, device)
    case.x, case.weights[0] = -case.x, -case.weights[0]
    case.input_threshold = torch.tensor(2.0)
    assert op(*case.args()).flatten().tolist() == [0, 0, 2, 3, 4, 2.5, 0, 6]


def test_up_sees_all_inputs(device):
    case = case_of_inputs(torch.float32, device)
    case.weights[1][:, 1] = 1  # u = 1 + x_1, of an input that the gate does not see
    case.input_threshold = torch.tensor(2.0)
    assert op(*case.args()).flatten().tolist() == [0, 0, 4, 6, 8, 5, 0, 12]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_threshold_zero_keeps_everything(tokens, dtype, device):
    case = make_columns_case(tokens, 64, 176, dtype, device, input_sparsity=0, rule="all kept")
    case.input_threshold = torch.tensor(0.0)
    assert_close(op(*case.args()), case.expected())
    weights = [case.weights[0].t().contiguous(), *case.weights[1:]]
    plain = ops.sparse_mlp(*case.args(weights=weights)[:4], *case.args()[5:])
    assert_close(op(*case.args()), plain, rtol=2**-7 if dtype != torch.float32 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_no_input_is_kept(tokens, bias, device):
    """g is the bias, and nothing of w_gate_t is read."""
    case = make_columns_case(tokens, 64, 176, torch.bfloat16, device, bias=bias, rule="all kept")
    case.input_threshold = torch.tensor(INF)
    expected = case.expected()
    assert bool(expected.any()) == bias
    case.weights[0][:] = NAN
    assert_close(op(*case.args()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [1.0, INF])
def test_nan_and_infinity_are_kept(threshold, dtype, device):
    """Only what they make of the gate is above the threshold of neurons; what they make of up is then read."""
    for value in (NAN, INF, -INF):
        case = make_columns_case(3, 64, 176, dtype, device, rule="none kept")
        case.input_threshold = torch.tensor(threshold)
        case.x[1, 3] = value
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        y = counted_op(*case.counted_args(counts))
        assert not y[1].isfinite().any() and not y[::2].any()
        assert counts.tolist() == [3 * 176, 176, 176, case.kept_inputs().sum()]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_of_dropped_inputs_are_not_used(tokens, dtype, value, device):
    """Poison in the rows that no token, or another token, keeps must not reach the output."""
    case = make_columns_case(tokens, 64, 176, dtype, device, input_sparsity=0.9, rule="all kept")
    expected, kept = case.expected(), case.kept_inputs()
    unused = ~kept.any(0)
    assert unused.any()
    case.weights[0][unused.to(device)] = value
    assert_close(op(*case.args()), expected)
    if tokens > 1:
        only_first = kept[0] & ~kept[1:].any(0)
        assert only_first.any()
        case.weights[0][only_first.to(device)] = value
        y = op(*case.args())
        assert not y[0].isfinite().any()
        assert_close(y[1:], expected[1:])


# --- layouts --------------------------------------------------------------------------------------------------------


def padded(w: Tensor) -> Tensor:
    """A view into wider rows."""
    return torch.cat([torch.full_like(w, NAN), w, torch.full_like(w, NAN)], dim=1)[:, w.shape[1] : 2 * w.shape[1]]


def misaligned(t: Tensor) -> Tensor:
    """The same values one element after an aligned address."""
    return torch.cat([t.new_full((1,), NAN), t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "padded": lambda c: c.args(weights=[padded(w) for w in c.weights]),
    "x misaligned": lambda c: c.args(x=misaligned(c.x)),
    "x strided": lambda c: c.args(x=torch.stack([c.x, torch.full_like(c.x, NAN)], dim=-1)[..., 0]),
    "x transposed": lambda c: c.args(x=c.x.t().contiguous().t()),
    "threshold strided": lambda c: c.args(threshold=torch.stack([c.threshold, c.threshold * NAN], dim=1)[:, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    case = make_columns_case(3, 64, 176, dtype, device, "vector, vector")
    assert_close(op(*LAYOUTS[layout](case)), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [misaligned, lambda w: misaligned(padded(w)), lambda w: padded(w)[:, :33]])
def test_rows_at_any_address(change, dtype):
    case = make_columns_case(3, 33, 33, dtype)
    assert_close(op(*case.args(weights=[change(w) for w in case.weights])), case.expected())


def test_leading_dimensions(device):
    case = make_columns_case(6, 64, 176, device=device)
    flat = op(*case.args())
    assert_close(op(*case.args(x=case.x.view(2, 1, 3, 64))), flat.view(2, 1, 3, 64))
    assert_close(op(*case.args(x=case.x[0])), flat[0])


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens(shape, device):
    case = make_columns_case(1, 64, 176, device=device)
    case.x = case.x.new_empty(shape)
    counts = torch.tensor([1, 2, 3, 4], device=device)
    assert op(*case.args()).shape == counted_op(*case.counted_args(counts)).shape == shape
    assert counts.tolist() == [1, 2, 3, 4]


# --- what the op promises beyond the formula ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_counts(tokens, rule, dtype, device):
    case = make_columns_case(tokens, 64, 304, dtype, device, rule)
    counts = torch.tensor([1000, 2000, 3000, 4000], device=device)
    y = counted_op(*case.counted_args(counts))
    assert counts.tolist() == (case.counts() + torch.tensor([1000, 2000, 3000, 4000])).tolist()
    assert case.counts()[3] == case.kept_inputs().sum()
    assert_close(y, case.expected())


@pytest.mark.parametrize("tokens", [2, 7, 16, 17, 40])
def test_tokens_do_not_affect_each_other(tokens, device):
    case = make_columns_case(tokens, 128, 176, device=device)
    together = op(*case.args())
    for token in range(tokens):
        assert_close(together[token], op(*case.args(x=case.x[token])))


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_same_bits_in_every_run(tokens, device):
    case = make_columns_case(tokens, 256, 3000, torch.bfloat16, device)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    first = op(*case.args(), deterministic=True)
    assert_close(first, case.expected())
    assert all(torch.equal(op(*case.args(), deterministic=True), first) for _ in range(10))
    assert torch.equal(counted_op(*case.counted_args(counts), deterministic=True), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17])
def test_gates_have_the_same_bits_on_any_number_of_threads(tokens, dtype):
    """Of each y_j there is one term: u of one neuron, times v."""
    case = make_columns_case(tokens, 600, 600, dtype, rule="all kept", bias=True)
    case.weights[2] = torch.eye(600, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(op(*case.args()))
    finally:
        torch.set_num_threads(before)
    assert_close(found[0], case.expected())
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("n", range(25))
def test_random_cases(n, device):
    for i in range(-(-CASES[device] // 25)):
        r = random.Random((SEED * 1_000_003 + n) * 10_007 + i)
        unit = 8 if device == "cuda" else r.choice([1, 1, 8])
        hidden = unit * r.choice([r.randint(1, 200 // unit), r.choice([1024, 2048, 4096]) // unit])
        most = (200 if hidden > 1000 else r.choice([400, 400, 400, 4000])) // unit
        case = dict(
            tokens=r.choice([1, 1, 2, 3, r.randint(1, 20)]),
            hidden=hidden,
            intermediate=unit * r.randint(1, most),
            dtype=r.choice(DTYPES),
            rule=r.choice(RULES),
            activation=r.choice(ACTIVATIONS),
            bias=r.random() < 0.4,
            input_sparsity=r.choice([0, 0.1, 0.5, 0.9, 1, r.random()]),
            sparsity=r.choice([0.05, 0.5, 0.9]),
            seed=r.randint(0, 10**6),
        )
        call = make_columns_case(device=device, **case)
        gap = unit * r.choice([0, 0, 1, r.randint(1, 5)])
        weights = [torch.nn.functional.pad(w, (gap, gap), value=NAN)[:, gap : w.shape[1] + gap] for w in call.weights]
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        args = call.args(weights=weights)
        y = counted_op(*args[:4], counts, *args[4:], deterministic=r.random() < 0.3)
        try:
            assert_close(y, call.expected())
            assert counts.tolist() == call.counts().tolist()
        except AssertionError as error:
            raise AssertionError(f"{case}, {gap} elements around each row: {error}") from error


# --- errors on CUDA only; the others are in test_op_errors.py ---------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "hidden", "intermediate"),
    [(torch.bfloat16, 60, 64), (torch.float16, 64, 60), (torch.float32, 62, 64), (torch.float32, 64, 6)],
    ids=str,
)
def test_rows_of_a_gpu_are_multiples_of_16_bytes(dtype, hidden, intermediate):
    case = make_columns_case(1, hidden, intermediate, dtype, "cuda", "scalar")
    message = rf"^sparse_mlp_columns: .*16 bytes.* H = {hidden}, I = {intermediate}"
    with pytest.raises(RuntimeError, match=message):
        op(*case.args())


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("change", [misaligned, lambda w: padded(torch.cat([w, w[:, :1]], 1))[:, : w.shape[1]]])
def test_rows_of_a_gpu_start_at_multiples_of_16_bytes(change, which):
    case = make_columns_case(1, 64, 64, torch.bfloat16, "cuda", "scalar")
    case.weights[which] = change(case.weights[which])
    with pytest.raises(RuntimeError, match=r"^sparse_mlp_columns: .*16 bytes"):
        op(*case.args())


# --- tracing and graphs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, tokens, device):
    case = make_columns_case(3, 16, 24, dtype, device, bias=True)
    case.x = case.x[:tokens]
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    torch.library.opcheck(op, case.args())
    torch.library.opcheck(op, case.args()[:6])  # all defaults
    torch.library.opcheck(counted_op, case.counted_args(counts))
    wide = [padded(w) for w in case.weights]
    torch.library.opcheck(op, case.args(weights=wide, x=case.x.t().contiguous().t()))


def test_it_compiles_for_any_number_of_tokens(device):
    case = make_columns_case(5, 16, 24, device=device, rule="scalar")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    args = case.args()
    compiled = torch.compile(lambda x: op(x, *args[1:]), backend=backend, fullgraph=True, dynamic=True)
    expected = case.expected()
    for tokens in (2, 3, 5):
        assert_close(compiled(case.x[:tokens]), expected[:tokens])
    assert len(graphs) == 1


def test_counts_of_a_compiled_call(device):
    """A changed threshold must not be baked in."""
    case = make_columns_case(3, 16, 24, device=device, rule="scalar")
    compiled = torch.compile(lambda *args: counted_op(*args), backend="aot_eager", fullgraph=True)
    counts, total = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.int64)
    for scale in (1.0, 0.0):
        case.input_threshold = case.input_threshold * scale
        assert_close(compiled(*case.counted_args(counts)), case.expected())
        total += case.counts()
        assert counts.tolist() == total.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_it_runs_in_a_captured_graph(tokens, dtype):
    """With two calls after each other, whose workspaces have to be left as they were."""
    cases = [make_columns_case(tokens, 1024, 1032, dtype, "cuda", rule="all kept", seed=seed) for seed in (0, 50)]
    arguments = [case.args() for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [op(*args) for args in arguments]
    for seed in range(5):
        for case, args in zip(cases, arguments, strict=True):
            case.x.copy_(make_columns_case(tokens, 1024, 8, dtype, "cuda", seed=100 + seed).x)
            case.input_threshold = torch.tensor(0.2 * seed)
            args[4].copy_(case.input_threshold)
        for _ in range(20):
            graph.replay()
        for y, case in zip(outputs, cases, strict=True):
            assert_close(y, case.expected())


@pytest.mark.gpu
def test_two_streams_at_once():
    """Each stream has its own workspace."""
    cases = [make_columns_case(1, 2048, 8192, torch.bfloat16, "cuda", seed=seed) for seed in (0, 50)]
    arguments, streams = [case.args() for case in cases], [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(100):
        for stream, args, found in zip(streams, arguments, outputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(op(*args))
    torch.cuda.synchronize()
    for case, found in zip(cases, outputs, strict=True):
        expected = case.expected()
        for y in found:
            assert_close(y, expected)
