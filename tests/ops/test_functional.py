"""functional.sparse_mlp and sparse_mlp_columns: both ways give the reference's numbers, counts and gradients."""

from __future__ import annotations

import pytest
import torch
from support.columns_cases import make_columns_case

from cats_ext import functional
from cats_ext.functional import MAX_KERNEL_TOKENS, kernel_fits, needs_grad, sparse_mlp, sparse_mlp_columns
from cats_ext.ops.dispatch import MAX_COLUMN_TOKENS, column_rows_fit
from cats_ext.ops.reference import ACTIVATIONS, sparse_mlp_columns_ref, sparse_mlp_ref

H, I = 42, 123  # noqa: E741


def operands(tokens: int, dtype=torch.float32, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(tokens, H)
    weights = [normal(I, H) / H**0.5, normal(I, H) / H**0.5, normal(I, H) / I**0.5]
    biases = [normal(I) * 0.3, normal(I) * 0.3, normal(H) * 0.3] if bias else [None] * 3
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    return cast(x), [cast(w) for w in weights], [cast(b) for b in biases]


def rule(vectors: bool):
    g = torch.Generator().manual_seed(9)
    if not vectors:
        return torch.tensor(0.2), torch.tensor(0.1)
    return torch.rand(I, generator=g) * 0.5, torch.rand(I, generator=g) * 0.3


@pytest.mark.parametrize("tokens", [1, MAX_KERNEL_TOKENS["cpu"], MAX_KERNEL_TOKENS["cpu"] + 1, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_ways_equal_the_reference(tokens, bias, second, activation):
    x, weights, (gate_bias, up_bias, down_bias) = operands(tokens, bias=bias)
    threshold, down_threshold = rule(vectors=True)
    arguments = (threshold, down_threshold if second else None, activation, gate_bias, up_bias)
    counts = torch.zeros(3, dtype=torch.int64)
    y = sparse_mlp(x, *weights, *arguments, down_bias, counts=counts)
    wanted = sparse_mlp_ref(
        x.double(),
        *(w.double() for w in weights),
        *arguments[:3],
        *(None if b is None else b.double() for b in (gate_bias, up_bias, down_bias)),
        compute_dtype=torch.float64,
    )
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse_mlp(x, *weights, *arguments, down_bias), y, rtol=1e-6, atol=1e-6)
    counts_ref = torch.zeros(3, dtype=torch.int64)
    sparse_mlp_ref(x, *weights, *arguments, down_bias, counts=counts_ref)
    assert counts.tolist() == counts_ref.tolist()


def test_leading_dimensions_and_no_tokens():
    x, weights, _ = operands(6)
    threshold, down_threshold = rule(vectors=False)
    flat = sparse_mlp(x, *weights, threshold, down_threshold)
    assert torch.equal(sparse_mlp(x.view(2, 3, H), *weights, threshold, down_threshold), flat.view(2, 3, H))
    torch.testing.assert_close(sparse_mlp(x[2], *weights, threshold, down_threshold), flat[2], rtol=1e-5, atol=1e-5)
    assert sparse_mlp(x[:0], *weights, threshold).shape == (0, H)


def test_counts_accumulate():
    x, weights, _ = operands(2)
    counts = torch.zeros(3, dtype=torch.int64)
    sparse_mlp(x, *weights, torch.tensor(0.2), counts=counts)
    once = counts.clone()
    sparse_mlp(x, *weights, torch.tensor(0.2), counts=counts)
    assert torch.equal(counts, 2 * once) and once[0] == 2 * I and 0 < once[1] < once[0] and once[1] == once[2]


@pytest.mark.parametrize("second", [False, True])
def test_gradcheck(second):
    x, weights, biases = operands(2, torch.float64, bias=True)
    threshold, down_threshold = rule(vectors=True)
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]

    def run(x, w_gate, w_up, w_down_t, *biases):
        return sparse_mlp(x, w_gate, w_up, w_down_t, threshold, down_threshold if second else None, "silu", *biases)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_choice():
    x, (w_gate, w_up, _), _ = operands(MAX_KERNEL_TOKENS["cpu"])
    assert kernel_fits(x, H)
    assert kernel_fits(x.bfloat16(), H)
    assert not kernel_fits(x.double(), H)
    assert not kernel_fits(torch.cat([x, x[:1]]), H)
    assert not kernel_fits(x.to("meta"), H)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernel_fits(x, H)
    w_up.requires_grad_()
    assert needs_grad(x, w_up) and not needs_grad(x, w_gate, None)
    with torch.no_grad():
        assert not needs_grad(x, w_up)


def test_the_kernel_is_taken_for_few_tokens_only(called):
    for tokens in (1, MAX_KERNEL_TOKENS["cpu"], MAX_KERNEL_TOKENS["cpu"] + 1):
        x, weights, _ = operands(tokens)
        sparse_mlp(x, *weights, torch.tensor(0.2))
    sparse_mlp(x[:1], *weights[:2], weights[2].t().contiguous().t(), torch.tensor(0.2))
    assert called == ["sparse_mlp", "sparse_mlp", "gated_threshold", "gated_threshold"]


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(threshold=torch.tensor(0.2, dtype=torch.float64)), "threshold must be .*float32"),
        (lambda a: a.update(threshold=torch.ones(7)), r"threshold must have shape \[\] or \[123\], got \[7\]"),
        (lambda a: a.update(activation="swish"), "activation must be one of silu, .*, got 'swish'"),
        (lambda a: a.update(x=a["x"].bfloat16()), "dtype"),
        (lambda a: a.update(x=a["x"][:, :-1]), "42"),
    ],
)
def test_errors(tokens, change, message):
    x, (w_gate, w_up, w_down_t), _ = operands(tokens)
    arguments = dict(x=x, w_gate=w_gate, w_up=w_up, w_down_t=w_down_t, threshold=torch.tensor(0.2))
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        functional.sparse_mlp(**arguments)


@pytest.mark.parametrize("tokens", [2, 20])
def test_compile_fullgraph(tokens):
    x, weights, _ = operands(tokens)
    threshold, down_threshold = rule(vectors=True)
    torch._dynamo.reset()
    compiled = torch.compile(sparse_mlp, fullgraph=True, backend="aot_eager")
    got = compiled(x, *weights, threshold, down_threshold)
    torch.testing.assert_close(got, sparse_mlp(x, *weights, threshold, down_threshold))


# --- sparse_mlp_columns -----------------------------------------------------------------------------------------------


def columns_arguments(tokens: int, dtype=torch.float32, bias=False, vectors=True) -> dict:
    x, (w_gate, w_up, w_down_t), biases = operands(tokens, dtype, bias)
    threshold, down_threshold = rule(vectors)
    named = dict(x=x, w_gate_t=w_gate.t().contiguous(), w_up=w_up, w_down_t=w_down_t)
    named |= dict(input_threshold=torch.tensor(0.7), threshold=threshold, down_threshold=down_threshold)
    return named | dict(zip(("gate_bias", "up_bias", "down_bias"), biases, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, MAX_COLUMN_TOKENS["cpu"], MAX_COLUMN_TOKENS["cpu"] + 1, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_both_ways_equal_the_reference(tokens, bias, second, activation):
    named = columns_arguments(tokens, bias=bias) | dict(activation=activation)
    if not second:
        named["down_threshold"] = None
    counts, counts_ref = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    y = sparse_mlp_columns(**named, counts=counts)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and "threshold" not in k else v for k, v in named.items()}
    wanted = sparse_mlp_columns_ref(**exact, compute_dtype=torch.float64, counts=counts_ref)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse_mlp_columns(**named), y, rtol=1e-6, atol=1e-6)
    assert counts.tolist() == counts_ref.tolist()


def test_columns_gradcheck():
    named = columns_arguments(2, torch.float64, bias=True)
    inputs = [t.requires_grad_() for name, t in named.items() if "threshold" not in name]
    names = [name for name in named if "threshold" not in name]
    run = lambda *values: sparse_mlp_columns(**(named | dict(zip(names, values, strict=True))))  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_columns_take_the_kernel_for_few_tokens_and_rows_it_reads(called):
    most = MAX_COLUMN_TOKENS["cpu"]
    for tokens in (1, most, most + 1):
        sparse_mlp_columns(**columns_arguments(tokens))
    sparse_mlp_columns(**columns_arguments(1), counts=torch.zeros(4, dtype=torch.int64))
    for name in ("w_gate_t", "w_down_t"):
        named = columns_arguments(1)
        named[name] = named[name].t().contiguous().t()
        sparse_mlp_columns(**named)
    kernel, masked = ["sparse_mlp_columns"], ["gated_threshold"]
    assert called == kernel * 2 + masked + ["sparse_mlp_columns_counted"] + masked * 2


@pytest.mark.gpu
def test_columns_with_rows_that_the_kernel_does_not_read(called):
    """Rows that are no multiples of 16 bytes take the dense path; a dtype of 16 bits needs multiples of 8."""
    for hidden, intermediate, fits in ((64, 48, True), (64, 44, False), (60, 48, False)):
        case = make_columns_case(1, hidden, intermediate, torch.bfloat16, "cuda", "all kept")
        x, *weights = case.args()[:4]
        assert column_rows_fit(tuple(weights)) == fits
        y = sparse_mlp_columns(x, *weights, *case.args()[4:])
        torch.testing.assert_close(y.double().cpu(), case.expected(), rtol=2**-6, atol=2e-2)
    assert called == ["sparse_mlp_columns", "gated_threshold", "gated_threshold"]


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "input_threshold",
            torch.tensor(0.7, dtype=torch.float64),
            "input_threshold must be .*float32.*, got .*float64",
        ),
        ("input_threshold", torch.ones(H), r"input_threshold must .*shape \[\], got .*\[42\]"),
        ("counts", torch.zeros(3, dtype=torch.int64), r"counts must be .*int64 of shape \[4\].*, got .*\[3\]"),
        ("threshold", torch.ones(7), r"threshold must have shape \[\] or \[123\], got \[7\]"),
        ("activation", "swish", "activation must be one of silu, .*, got 'swish'"),
        ("x", torch.ones(2, H - 1), "42"),
    ],
    ids=str,
)
def test_columns_errors(tokens, name, value, message):
    with pytest.raises(RuntimeError, match=message):
        sparse_mlp_columns(**(columns_arguments(tokens) | {name: value}))


@pytest.mark.parametrize("tokens", [2, 20])
def test_columns_compile_fullgraph(tokens):
    named = columns_arguments(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(sparse_mlp_columns, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**named), sparse_mlp_columns(**named))


@pytest.mark.gpu
def test_counts_of_the_masked_path_follow_a_captured_graph():
    x, weights, _ = operands(64)
    x, weights = x.cuda(), [w.cuda() for w in weights]
    counts, threshold = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.tensor(0.2, device="cuda")
    call = lambda: sparse_mlp(x, *weights, threshold, counts=counts)  # noqa: E731
    with torch.no_grad():
        call()
        expected = counts.tolist()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        counts.zero_()
        graph.replay()
    assert counts.tolist() == expected and expected[0] == 64 * I
