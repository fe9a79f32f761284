"""A captured graph gives the same bits at every replay in deterministic mode.

CATS_GRAPH_REPLAYS=1000000 replays each graph that often. Replays are compared on the device, in the graph itself.
"""

from __future__ import annotations

import os

import pytest
import torch
from support.models import tiny_model
from support.op_cases import assert_close, make_case
from support.patched import config_for, layers_of

from cats_ext import apply_cats, ops

REPLAYS = int(os.environ.get("CATS_GRAPH_REPLAYS", 10_000))
_BETWEEN_WAITS = 10_000  # replays that are queued before the host waits for the device

pytestmark = pytest.mark.gpu


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def different_replays(function, expected: torch.Tensor, count: int) -> int:
    """How many of ``count`` replays of ``function`` gave other bits than ``expected``; -1 if one that must does not.

    The comparison is proven to work by one replay against bits that are wrong.
    """
    expected, different = expected.clone(), torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> None:
        different.add_((bits(function()) != bits(expected)).any())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what is allocated or compiled once
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    different.zero_()
    bits(expected).view(-1)[0] ^= 1
    graph.replay()
    if different.item() != 1:
        return -1
    bits(expected).view(-1)[0] ^= 1
    different.zero_()
    for done in range(0, count, _BETWEEN_WAITS):
        for _ in range(min(_BETWEEN_WAITS, count - done)):
            graph.replay()
        torch.cuda.synchronize()
    return different.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 3000), (1, 576, 1536), (3, 1024, 3000), (7, 512, 2000)], ids=str)
def test_op(shape, dtype):
    case = make_case(*shape, dtype, "cuda")
    args = case.args()
    first = ops.sparse_mlp(*args, True)
    assert_close(first, case.expected())
    assert different_replays(lambda: ops.sparse_mlp(*args, True), first, REPLAYS) == 0


def test_patched_layers():
    """All patched MLPs of a model in one graph, with torch's switch for deterministic algorithms."""
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=2304)
    config = config_for(model)
    layers = layers_of(apply_cats(model, config).cuda())
    x = torch.randn(1, 1, 256, dtype=torch.bfloat16, device="cuda")

    @torch.no_grad()
    def run() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    torch.use_deterministic_algorithms(True)
    try:
        assert different_replays(run, run(), REPLAYS) == 0
    finally:
        torch.use_deterministic_algorithms(False)
