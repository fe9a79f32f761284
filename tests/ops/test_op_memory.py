"""A call of an op leaves no memory behind on the host: servers make millions of them."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from support.columns_cases import make_columns_case
from support.op_cases import DEVICES, make_case

import cats_ext.integrations.vllm_op  # noqa: F401  registers its ops
from cats_ext import ops
from cats_ext.native.library import LIBRARIES

CALLS = 40_000
# A string of its own is 32 bytes or more a call, 1.3 MB; what a process takes and gives besides is less than this.
MOST_BYTES = 600_000

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "op",
    [
        "sparse_mlp",
        "sparse_mlp_counted",
        "sparse_mlp_columns",
        "sparse_mlp_columns_counted",
        "activated_mlp",
        "exact_mlp",
        "gated_threshold_forward",
        "gated_threshold_counted",
        "gated_threshold_backward",
        "cats_vllm::mlp, kernel",
        "cats_vllm::mlp, products",
        "cats_vllm::mlp_counted, kernel",
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_calls_keep_no_memory(op, device):
    if not LIBRARIES["_C" if device == "cpu" else "_C_cuda"].loaded:
        pytest.skip("not compiled")
    case = make_case(1, 8, 16, device=device, bias=True)
    args = case.args()
    gate = torch.ones(1, 16, device=device)
    rule = *args[4:6], "silu"
    served = args[0], [*args[1:3]], args[3].t(), *rule, [*args[7:9]], args[9]
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    columns = make_columns_case(1, 8, 16, device=device, bias=True)
    args = {
        "sparse_mlp": args,
        "sparse_mlp_counted": case.counted_args(torch.zeros(3, dtype=torch.int64, device=device)),
        "sparse_mlp_columns": columns.args(),
        "sparse_mlp_columns_counted": columns.counted_args(torch.zeros(4, dtype=torch.int64, device=device)),
        "activated_mlp": (gate, args[3], args[9], args[0], args[2], args[8]),
        "exact_mlp": (*args[:4], "relu2", 1.5),
        "gated_threshold_forward": (gate, gate, *rule),
        "gated_threshold_counted": (gate, gate, torch.zeros(3, dtype=torch.int64, device=device), *rule),
        "gated_threshold_backward": (gate, gate, gate, *rule),
        "cats_vllm::mlp, kernel": (*served, 2),
        "cats_vllm::mlp, products": (*served, 0),
        "cats_vllm::mlp_counted, kernel": (*served, 2, counts, False),
    }[op]
    name, _, of_vllm = op.partition(",")[0].rpartition("::")
    call = getattr(torch.ops.cats_vllm if name else ops, of_vllm)

    def grown(calls: int) -> int:
        before = resident_bytes()
        for _ in range(calls):
            call(*args)
        return resident_bytes() - before

    grown(CALLS // 10)  # what is kept once
    assert min(grown(CALLS) for _ in range(2)) < MOST_BYTES
