"""The ops in PyTorch's machinery: opcheck of every overload, torch.compile without graph breaks, inference mode."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, assert_close, make_case

from cats_ext import ops


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


# tokens, dtype, rule, bias
PATTERNS = [
    (1, torch.float32, "scalar", False),
    (1, torch.bfloat16, "vector, vector", True),
    (3, torch.float16, "scalar, vector", True),
    (0, torch.float32, "all kept", False),
]


def make(tokens, dtype, rule, bias, device):
    case = make_case(max(tokens, 1), 12, 10, dtype, device, rule, bias=bias)
    case.x = case.x[:tokens]
    return case


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_opcheck_sparse_mlp(pattern, device):
    case = make(*pattern, device)
    torch.library.opcheck(ops.sparse_mlp, case.args())
    torch.library.opcheck(ops.sparse_mlp, case.args()[:5])  # all defaults
    wide = [torch.cat([w, w], dim=1)[:, :12] for w in case.weights]
    torch.library.opcheck(ops.sparse_mlp, case.args(weights=wide, x=case.x.t().contiguous().t()))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_opcheck_sparse_mlp_counted(pattern, device):
    case = make(*pattern, device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.sparse_mlp_counted, case.counted_args(counts))
    torch.library.opcheck(ops.sparse_mlp_counted, case.counted_args(counts)[:6])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck_gated_threshold(dtype, activation, device):
    both = torch.randn(2, 3, 20, device=device).to(dtype)
    gate, up = both[..., :10], both[..., 10:].requires_grad_()
    threshold = torch.tensor(0.1, device=device)
    torch.library.opcheck(ops.gated_threshold, (gate, up, threshold, threshold.expand(10), activation))
    torch.library.opcheck(ops.gated_threshold, (gate.detach().contiguous(), up.detach(), threshold))
    forward = (gate.detach(), up.detach(), threshold, threshold.expand(10), activation)
    torch.library.opcheck(ops.gated_threshold_forward, forward)
    assert torch.equal(ops.gated_threshold_forward(*forward), ops.gated_threshold(*forward))
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.gated_threshold_counted, (*forward[:2], counts, *forward[2:]))
    arguments = (torch.ones_like(gate), gate.detach(), up.detach(), threshold, None, activation)
    torch.library.opcheck(ops.gated_threshold_backward, arguments)


def mlp(x, w_gate, w_up, w_down_t, threshold, counts):
    y = ops.sparse_mlp_counted(x * 2, w_gate, w_up, w_down_t, counts, threshold)
    return y + ops.sparse_mlp(x, w_gate, w_up, w_down_t, threshold, activation="gelu_tanh")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph(backend, device):
    case = make_case(3, 12, 10, device=device, rule="scalar")
    x, *weights, threshold = case.args()[:5]
    eager_counts, counts = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    compiled = torch.compile(mlp, backend=backend, fullgraph=True)
    for scale in (1.0, 3.0, 0.0):  # a changed threshold must not be baked in
        threshold = threshold * scale
        expected = mlp(x, *weights, threshold, eager_counts)
        assert_close(compiled(x, *weights, threshold, counts), expected)
        assert torch.equal(counts, eager_counts)


def test_compile_with_any_number_of_tokens(device):
    case = make_case(5, 12, 10, device=device, rule="scalar")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    args = case.args()
    compiled = torch.compile(lambda x: ops.sparse_mlp(x, *args[1:]), backend=backend, fullgraph=True, dynamic=True)
    expected = ops.sparse_mlp(*args)
    for tokens in (2, 3, 5):
        assert_close(compiled(case.x[:tokens]), expected[:tokens])
    assert len(graphs) == 1


def test_compiled_gradient(device):
    gate, up, grad_h = (torch.randn(3, 33, device=device) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    threshold = torch.tensor(0.2, device=device)
    gradient = lambda f: torch.autograd.grad(f(gate, up, threshold), (gate, up), grad_h)  # noqa: E731
    expected = gradient(ops.gated_threshold)
    compiled = torch.compile(lambda *a: ops.gated_threshold(*a), backend="aot_eager", fullgraph=True)
    for actual, wanted in zip(gradient(compiled), expected, strict=True):
        assert_close(actual, wanted)


def test_tracing_reports_bad_arguments(device):
    case = make_case(1, 12, 10, device=device)
    compiled = torch.compile(ops.sparse_mlp, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"w_up must have shape \[10, 12\], got \[9, 12\]"):
        compiled(*case.args(weights=[case.weights[0], case.weights[1][1:], case.weights[2]]))


def test_inference_mode(device):
    case = make_case(2, 12, 10, device=device)
    with torch.inference_mode():
        assert_close(ops.sparse_mlp(*case.args()), case.expected())
