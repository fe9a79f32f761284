"""The raw launchers in Python (kernels.raw_kernels): the op's result with every kernel, errors as exceptions."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.op_cases import assert_close, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,  # compiles all kernels, a minute, or several beside other tests
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("ninja")), reason="needs nvcc and ninja"),
]


@pytest.fixture(scope="module")
def raw():
    from bench.kernels import raw_kernels

    return raw_kernels, raw_kernels.load()


@pytest.mark.parametrize("kernel", ["auto", "bulk_copy", "async_copy", "generic"])
def test_same_as_the_op(raw, kernel):
    loader, kernels = raw
    if kernel == "bulk_copy" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = make_case(3, 1024, 500, torch.bfloat16, "cuda", rule="scalar, vector")
    x, w_gate, w_up, w_down_t, threshold, down_threshold, activation, *_ = case.args()
    y = torch.empty_like(x)
    params = loader.mlp_params(kernels, x, w_gate, w_up, w_down_t, threshold, y, down_threshold, activation)
    workspace = torch.zeros(kernels.sparse_mlp_workspace_bytes(params), dtype=torch.uint8, device="cuda")
    options = kernels.SparseMlpLaunchOptions()
    options.kernel = getattr(kernels.SparseMlpKernel, kernel)
    for _ in range(3):  # the workspace is left as it was found
        y.fill_(float("nan"))
        kernels.sparse_mlp_cuda(params, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream, options)
        assert_close(y, case.expected())


def test_launch_errors_are_exceptions(raw):
    _, kernels = raw
    params = kernels.SparseMlpParams()
    params.tokens, params.hidden_size, params.intermediate_size = 1, 64, 64
    params.dtype = kernels.DType.float64
    with pytest.raises(RuntimeError, match="sparse_mlp_cuda: cudaErrorInvalidValue"):
        kernels.sparse_mlp_cuda(params, 0)
