"""The op of routed experts against its formula: errors, NaN, and on CUDA its kernels, also in a graph."""

from __future__ import annotations

import pytest
import torch
from support.experts import experts_ref, routed
from support.models import HIDDEN

from cats_ext.ops.experts import sparse_experts
from cats_ext.ops.reference import ACTIVATIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.usefixtures("one_thread")


def op_arguments(count, device="cpu", dtype=torch.float32, intermediate=20):
    x, chosen, routing = routed(count, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 2 * intermediate, HIDDEN, generator=generator).to(device, dtype) / HIDDEN**0.5
    down_t = torch.randn(4, intermediate, HIDDEN, generator=generator).to(device, dtype)
    thresholds = torch.tensor(0.2, device=device), torch.tensor(0.1, device=device)
    return [x, chosen, routing, gate_up, down_t, *thresholds]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for arguments in (op_arguments(2, device), op_arguments(1, device, torch.bfloat16)[:6], op_arguments(0, device)):
        torch.library.opcheck(sparse_experts, tuple(arguments))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 5), r"x must have shape \[T, 64\], got \[2, 5\]"),
        (0, torch.zeros(2, 64, dtype=torch.float64), "x must be float32, float16 or bfloat16"),
        (0, None, "x must be a tensor, got None"),
        (2, None, "routing must be a tensor, got None"),
        (3, torch.zeros(4, 40, 64).to_sparse(), "w_gate_up must be a dense tensor, got torch.sparse_coo"),
        (1, torch.zeros(2, 2), r"experts must be int64 \[2, K\], got torch.float32"),
        (1, torch.tensor([[0, 4], [1, 2]]), r"experts must be in \[0, 4\), got 4"),
        (2, torch.zeros(2, 3), r"routing must be floating point \[2, 2\], got torch.float32 \[2, 3\]"),
        (3, torch.zeros(4, 20, 64), r"w_gate_up must have shape \[4, 40, 64\], got \[4, 20, 64\]"),
        (4, torch.zeros(4, 64, 20).mT, r"w_down_t must have unit stride in its last dimension"),
        (5, torch.zeros(20), r"threshold must be float32 of shape \[\], got torch.float32 \[20\]"),
    ],
)
def test_op_errors(place, value, message):
    arguments = op_arguments(2)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"sparse_experts: {message}"):
        sparse_experts(*arguments)


def test_nan_is_kept():
    arguments = op_arguments(1)
    expert = int(arguments[1][0, 0])
    arguments[3][expert, 3] = float("nan")
    assert sparse_experts(*arguments).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float32, "silu"),
        (torch.bfloat16, "gelu"),
        (torch.float16, "gelu_tanh"),
        (torch.bfloat16, "relu"),
    ],
    ids=str,
)
def test_kernels_of_experts_on_cuda(dtype, activation):
    for count, intermediate in ((1, 20), (3, 77), (2, 5000)):
        arguments = op_arguments(count, "cuda", dtype, intermediate)
        wide = [t.double() if t.is_floating_point() else t for t in arguments]
        wide[4] = wide[4].mT
        got, want = sparse_experts(*arguments, activation), experts_ref(*wide, ACTIVATIONS[activation])
        error = (got.double() - want).norm() / want.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert torch.equal(sparse_experts(*arguments, activation), got)
    arguments[3][int(arguments[1][0, 0]), 3] = float("nan")
    assert sparse_experts(*arguments, activation)[0].isnan().all()
    arguments = op_arguments(2, "cuda", dtype)
    arguments[1][1, 0] = 4
    assert sparse_experts(*arguments, activation).isnan().all(-1).tolist() == [False, True]


@pytest.mark.gpu
def test_captured_step_follows_routing_and_thresholds():
    arguments = op_arguments(1, "cuda", torch.bfloat16, 200)
    for _ in range(2):
        sparse_experts(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_experts(*arguments)
    arguments[1].copy_(3 - arguments[1])
    arguments[5].fill_(0.5)
    graph.replay()
    assert torch.equal(y, sparse_experts(*arguments))
