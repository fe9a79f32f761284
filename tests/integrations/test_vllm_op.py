"""The op of a gated MLP under vLLM, without vLLM: what it computes on the CPU and on a GPU, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DEVICES, Case, assert_close, make_case
from support.packed_rows import make_packed_case

from cats_ext.integrations.vllm_op import gated_mlp, halves
from cats_ext.native.library import LIBRARIES
from cats_ext.ops import dispatch

HIDDEN, INTERMEDIATE = 64, 96


def make_operands(case: Case, merged: bool) -> tuple:
    """What a ServedMLP passes: weights as vLLM holds them, with one contiguous row of w_down a neuron."""
    w_gate, w_up, w_down_t = case.weights
    gate_bias, up_bias, down_bias = case.biases
    join = lambda a, b: [torch.cat([a, b])] if merged else [a, b]  # noqa: E731
    biases = [] if gate_bias is None else join(gate_bias, up_bias)
    on = lambda t: None if t is None else t.to(case.x.device)  # noqa: E731
    mask = on(case.threshold), on(case.down_threshold), case.activation
    return join(w_gate, w_up), w_down_t.t(), [], mask, biases, down_bias


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rule", ["vector", "vector, vector"])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (40,), (2, 3), ()])
def test_against_the_reference(shape, rule, merged, bias, device):
    tokens = torch.Size(shape).numel()
    case = make_case(tokens, HIDDEN, INTERMEDIATE, device=device, rule=rule, bias=bias)
    x = case.x.view(*shape, HIDDEN)
    y = gated_mlp(x, *make_operands(case, merged))
    assert y.shape == x.shape
    assert_close(y.reshape(tokens, HIDDEN), case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merged", [True, False])
def test_many_tokens_have_the_bits_of_separate_operations(merged, dtype, device):
    case = make_case(40, HIDDEN, INTERMEDIATE, dtype, device, bias=True)
    gate_up, w_down, _, mask, biases, down_bias = make_operands(case, merged)
    linear = torch.nn.functional.linear
    gate, up = halves([linear(case.x, w, b) for w, b in zip(gate_up, biases, strict=True)])
    expected = linear(torch.ops.cats.gated_threshold(gate, up, *mask), w_down, down_bias)
    y = torch.ops.cats_vllm.mlp(case.x, gate_up, w_down, *mask, biases, down_bias, 0)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("tokens", [1, 60])
def test_packed_rows(tokens, counted, device):
    case = make_packed_case(tokens, 128, INTERMEDIATE, "int8_g64", device=device, rule="vector, vector", bias=True)
    w_gate, w_up, w_down_t = case.rows
    gate_bias, up_bias, down_bias = case.biases
    mask = case.threshold.to(device), case.down_threshold.to(device), case.activation
    biases = [torch.cat([gate_bias, up_bias])]
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    operands = [torch.cat([w_gate, w_up])], w_down_t, list(case.formats), mask, biases, down_bias
    y = gated_mlp(case.x, *operands, (counts, False) if counted else None)
    assert_close(y, case.expected())
    assert (counts[0] == tokens * INTERMEDIATE) == counted


def half_nan(tokens: int, device: str) -> Case:
    """Every second neuron is below its threshold, its down row NaN: a product reads it, the kernel does not."""
    if not LIBRARIES["_C" if device == "cpu" else "_C_cuda"].loaded:
        pytest.skip("not compiled")
    case = make_case(tokens, HIDDEN, INTERMEDIATE, device=device, rule="vector")
    never = torch.arange(INTERMEDIATE, device=device) % 2 == 0
    case.threshold = torch.where(never, torch.inf, case.threshold.to(device))
    case.weights[2][never] = torch.nan
    return case


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counted", [False, True])
def test_the_kernel_takes_few_tokens(counted, device):
    limit = dispatch.served_tokens(torch.empty(1, HIDDEN, device=device))
    assert limit == (dispatch.MAX_SERVED_TOKENS if device == "cuda" else dispatch.MAX_KERNEL_TOKENS["cpu"])
    for tokens, finite in ((limit, True), (limit + 1, False)):
        case = half_nan(tokens, device)
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        y = gated_mlp(case.x, *make_operands(case, merged=True), (counts, False) if counted else None)
        assert bool(y.isfinite().all()) == finite
        assert (counts[0] == tokens * INTERMEDIATE) == counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_limit_on_a_cpu_is_that_of_patched_models(dtype):
    limit = dispatch.served_tokens(torch.empty(1, HIDDEN, dtype=dtype))
    for tokens in (1, 16, 17, 300):
        x = torch.empty(tokens, HIDDEN, dtype=dtype)
        assert (tokens <= limit) == dispatch.kernel_fits(x, HIDDEN)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "kernel_only", "counted"), [(1, True, True), (40, True, False), (40, False, True)])
def test_counts(tokens, kernel_only, counted, device):
    case = make_case(tokens, HIDDEN, INTERMEDIATE, device=device, rule="vector, vector")
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    y = gated_mlp(case.x, *make_operands(case, merged=True), (counts, kernel_only))
    assert_close(y, case.expected())
    v, h = case.values()
    kept = v >= case.threshold.cpu()
    both = kept & (h >= case.down_threshold.cpu())
    assert counts.tolist() == ([kept.numel(), int(kept.sum()), int(both.sum())] if counted else [0, 0, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_decides_when_it_runs(device):
    case = half_nan(40, device)
    operands = make_operands(case, merged=True)
    compiled = torch.compile(lambda x: gated_mlp(x, *operands), fullgraph=True, dynamic=True)
    assert not compiled(case.x).isfinite().any()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not compiled(case.x[:30]).isfinite().any()
        y = compiled(case.x[:2])  # one token takes a graph of its own: torch specialises sizes of one
        assert y.isfinite().all()
        torch.testing.assert_close(y, gated_mlp(case.x[:2], *operands))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_opcheck(tokens, device):
    case = make_case(tokens, HIDDEN, INTERMEDIATE, device=device, rule="vector", bias=True)
    gate_up, w_down, _, mask, biases, down_bias = make_operands(case, merged=True)
    limit = dispatch.served_tokens(case.x)
    args = case.x, gate_up, w_down, *mask, biases, down_bias, limit
    torch.library.opcheck(torch.ops.cats_vllm.mlp.default, args)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.cats_vllm.mlp_counted.default, (*args, counts, False))


@pytest.mark.gpu
@pytest.mark.parametrize("counted", [False, True])
def test_the_same_bits_if_they_are_asked_for(counted, monkeypatch):
    """What torch.use_deterministic_algorithms says when the kernel runs, not when a graph was traced."""
    asked = []
    monkeypatch.setattr(dispatch, "deterministic", lambda: asked.append(True) or True)
    case = make_case(1, HIDDEN, INTERMEDIATE, device="cuda")
    counting = (torch.zeros(3, dtype=torch.int64, device="cuda"), True) if counted else None
    assert_close(gated_mlp(case.x, *make_operands(case, merged=True), counting), case.expected())
    assert asked == [True]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", (3, 65), r"w_down must have shape \[H, I\] with x's last dimension H = 65, got \[64, 96\]"),
        ("x", torch.float64, "x must be float32, float16 or bfloat16, got .*float64"),
        ("gate_up", [], "gate_up must be one or two tensors, got 0"),
        ("gate_up", [(191, 64)], r"gate_up\[0\] must have shape \[192, 64\], got \[191, 64\]"),
        ("gate_up", [(96, 64), (95, 64)], r"gate_up\[1\] must have shape \[96, 64\], got \[95, 64\]"),
        ("biases", [(191,)], r"biases\[0\] must have shape \[192\], got \[191\]"),
        ("biases", [(96,), (96,)], "biases must be none or 1, as many as gate_up, got 2"),
        ("w_down", (64, 96), "w_down must have unit stride in its first dimension, .* got strides"),
        ("w_down", (96,), r"w_down must have shape \[H, I\]"),
        ("threshold", (95,), r"threshold must have shape \[\] or \[96\], got \[95\]"),
        ("down_threshold", torch.float16, "down_threshold must be float32, got .*float16"),
        ("activation", "tanh", "activation must be .* got 'tanh'"),
        ("down_bias", (63,), r"down_bias must have shape \[64\], got \[63\]"),
        ("down_bias", "cpu", "down_bias must be on .* cuda:0, got cpu"),
        ("counts", (2,), r"counts must .*\[3\]"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_errors(tokens, name, value, message):
    if not LIBRARIES["_C_cuda"].loaded:
        pytest.skip("not compiled")
    case = make_case(tokens, HIDDEN, INTERMEDIATE, device="cuda", bias=True, rule="vector, vector")
    gate_up, w_down, _, mask, biases, down_bias = make_operands(case, merged=True)
    arguments = dict(x=case.x, gate_up=gate_up, w_down=w_down)
    arguments |= dict(zip(("threshold", "down_threshold", "activation"), mask, strict=True))
    arguments |= dict(biases=[] if name == "gate_up" else biases, down_bias=down_bias, kernel_tokens=2)
    if isinstance(value, torch.dtype):
        arguments[name] = arguments[name].to(value)
    elif isinstance(value, list):
        arguments[name] = [torch.zeros(shape, device="cuda") for shape in value]
    elif isinstance(value, tuple):
        arguments[name] = torch.zeros(value, device="cuda")
    else:
        arguments[name] = arguments[name].cpu() if value == "cpu" else value
    op = torch.ops.cats_vllm.mlp
    if name == "counts":
        arguments["kernel_only"], op = False, torch.ops.cats_vllm.mlp_counted
    with pytest.raises(RuntimeError, match=f"mlp: {message}"):
        op(*arguments.values())
