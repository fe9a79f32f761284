"""sparse_mlp as CUDA programs use it: captured in graphs, on several streams, right after its inputs were written."""

from __future__ import annotations

import pytest
import torch
from support.op_cases import DTYPES, assert_close, make_case

from cats_ext import functional, ops

pytestmark = pytest.mark.gpu

# tokens, H, I: a small one, and one whose kernel runs long enough to overlap with what is launched around it
SHAPES = [(1, 42, 123), (1, 4096, 3000), (5, 1024, 3000)]
HALF = [torch.bfloat16, torch.float16]


def on_gpu(shape, dtype=torch.bfloat16, seed=0, **named):
    return make_case(*shape, dtype, "cuda", seed=seed, **named)


def two_sets(shape, dtype=torch.bfloat16):
    """Two cases of one shape whose results differ everywhere, and those results."""
    cases = [on_gpu(shape, dtype, seed=seed) for seed in (0, 50)]
    return cases, [case.expected() for case in cases]


def capture(function):
    """A graph of ``function``, and its result, after the warm-up on a side stream that capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graph_replays_with_what_its_inputs_hold_now(shape, dtype):
    """x, weights and both thresholds change between replays, the sparsity with them."""
    cases, expected = two_sets(shape, dtype)
    static = [None if a is None else a.clone() if isinstance(a, torch.Tensor) else a for a in cases[0].args()]
    graph, y = capture(lambda: ops.sparse_mlp(*static))
    for turn in (0, 1, 1, 0, 1):
        for target, source in zip(static, cases[turn].args(), strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        graph.replay()
        assert_close(y, expected[turn])
    static[4].fill_(float("inf"))
    graph.replay()
    assert not y.any()
    static[4].zero_()
    static[5].zero_()
    graph.replay()
    cases[1].threshold, cases[1].down_threshold = torch.tensor(0.0), None
    assert_close(y, cases[1].expected())


def test_graph_of_several_layers():
    cases = [on_gpu((1, 1024, 3000), torch.float32, seed, rule="all kept") for seed in (0, 10, 20)]
    rest_of_args = [case.args()[1:] for case in cases]

    def layers(x):
        for rest in rest_of_args:
            x = ops.sparse_mlp(x, *rest) * 4
        return x

    x = cases[0].x
    expected = layers(x)
    graph, y = capture(lambda: layers(x))
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert_close(y, expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_written_by_the_kernel_just_before_are_seen(shape, how):
    """Weights are read ahead of the previous kernel's end only if that kernel does not write them."""
    cases, expected = two_sets(shape)
    source = [a.clone() if isinstance(a, torch.Tensor) else a for a in cases[0].args()]
    target = [a.clone() if isinstance(a, torch.Tensor) else a for a in source]

    for written in range(6):  # x, each weight, each threshold: the one that is written last before the op

        def write_and_run(written=written):
            for i in [*(i for i in range(6) if i != written), written]:
                target[i].copy_(source[i])
            return ops.sparse_mlp(*target)

        if how == "graph":
            graph, y = capture(write_and_run)
        for turn in (1, 0) * 10:
            for i, value in enumerate(cases[turn].args()[:6]):
                source[i].copy_(value)
            if how == "graph":
                graph.replay()
            else:
                y = write_and_run()
            assert_close(y, expected[turn])


def test_streams_at_once():
    """Calls on several streams share nothing, whichever order they finish in."""
    cases = [on_gpu(SHAPES[i % 3], DTYPES[i % 3], seed=10 * i) for i in range(4)]
    expected = [case.expected() for case in cases]
    arguments = [case.args() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = [[] for _ in cases]
        for _ in range(5):
            for stream, args, ys in zip(streams, arguments, results, strict=True):
                with torch.cuda.stream(stream):
                    ys.append(ops.sparse_mlp(*args))
        torch.cuda.synchronize()
        for ys, wanted in zip(results, expected, strict=True):
            for y in ys:
                assert_close(y, wanted)


def test_waits_for_its_own_stream_only():
    """The op runs in stream order: after a long kernel on its stream that writes x."""
    cases, expected = two_sets(SHAPES[1])
    args = list(cases[0].args())
    args[0] = args[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        for target, source in zip(args[:6], cases[1].args()[:6], strict=True):
            target.copy_(source)
        y = ops.sparse_mlp(*args)
    stream.synchronize()
    assert_close(y, expected[1])


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_no_synchronisation_and_no_allocation_but_the_output(shape):
    args = on_gpu(shape).args()
    keep = [ops.sparse_mlp(*args) for _ in range(3)]
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep += [ops.sparse_mlp(*args) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations + 10


@pytest.mark.parametrize("rule", ["all kept", "scalar", "vector", "scalar, vector", "vector, scalar"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("hidden", [32, 576, 1056, 1088, 2080, 3584, 4096, 4224])
def test_tokens_on_the_tensor_cores(hidden, dtype, rule):
    """3 to 8 tokens, hidden sizes up to the longest row; more tokens and longer rows take several launches."""
    tokens = 3 + hidden // 32 % 6
    case = on_gpu((tokens, hidden, 1007), dtype, rule=rule, bias=hidden == 1056)
    y = ops.sparse_mlp(*case.args())
    assert_close(y, case.expected())
    for token in range(tokens):
        assert_close(ops.sparse_mlp(*case.args(x=case.x[token])), y[token].double(), rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("tokens", [3, 4, 5, 8, 9, 16, 23])
def test_longer_rows_and_more_tokens_than_a_launch_takes(tokens):
    for hidden in (4096, 5120):
        case = on_gpu((tokens, hidden, 300))
        assert_close(ops.sparse_mlp(*case.args()), case.expected())


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8192, 700), (2, 2048, 3000), (4, 4096, 3000), (7, 4096, 3000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_results_have_the_same_bits(shape, dtype):
    """Also beside other work, which changes when each block of the kernel runs."""
    case = on_gpu(shape, dtype)
    first = ops.sparse_mlp(*case.args(), deterministic=True)
    assert_close(first, case.expected())
    args, noise, other = case.args(), torch.cuda.Stream(), torch.randn(1 << 22, device="cuda")
    for turn in range(20):
        with torch.cuda.stream(noise):
            for _ in range(turn % 4):
                other.sin_()
        assert torch.equal(ops.sparse_mlp(*args, deterministic=True), first)


def test_deterministic_algorithms_of_torch():
    case = on_gpu((1, 4096, 3000))
    first = ops.sparse_mlp(*case.args(), deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(20):
            assert torch.equal(functional.sparse_mlp(*case.args()), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    case = make_case(2, 123, 170, torch.bfloat16, "cuda:1")
    args = case.args()
    with torch.cuda.device(0):
        y = ops.sparse_mlp(*args)
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    assert_close(y, case.expected())
    gate = torch.randn(3, 5, device="cuda:1")
    assert ops.gated_threshold(gate, gate, args[4]).device == gate.device
