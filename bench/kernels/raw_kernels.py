"""Loads the raw CUDA launchers into Python, for microbenchmarks of single launches with options that the op has not.

    kernels = raw_kernels.load()
    params = raw_kernels.mlp_params(kernels, x, w_gate, w_up, w_down_t, threshold, y)
    workspace = torch.zeros(kernels.sparse_mlp_workspace_bytes(params), dtype=torch.uint8, device="cuda")
    options = kernels.SparseMlpLaunchOptions()
    options.kernel = kernels.SparseMlpKernel.async_copy
    kernels.sparse_mlp_cuda(params, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream, options)

Compiles raw_kernels.cpp with csrc/cuda/plan.cpp and sparse_mlp_*.cu for the card at hand, which takes minutes the first
time and needs nvcc, ninja and a torch with CUDA. Nothing is checked: a wrong pointer or size is the caller's crash.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def load(verbose: bool = False) -> ModuleType:
    """The module ``cats_raw_kernels``, compiled where a source changed since the last time.

    Raises:
        RuntimeError: there is no GPU, or a compiler failed.
    """
    from torch.utils import cpp_extension

    if not torch.cuda.is_available():
        raise RuntimeError("the raw kernels are compiled for the card at hand, and torch sees none")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}" + "a" * (major == 9))
    # torch hides the conversions of the 16-bit types; the kernels compile the same with and without torch.
    undo_torch = ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    return cpp_extension.load(
        "cats_raw_kernels",
        [
            *map(str, sorted(ROOT.glob("csrc/cuda/sparse_mlp_*.cu"))),
            str(ROOT / "csrc" / "cuda" / "plan.cpp"),
            str(Path(__file__).with_suffix(".cpp")),
        ],
        extra_include_paths=[str(ROOT / "csrc")],
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", *undo_torch],
        verbose=verbose,
    )


def mlp_params(
    kernels: ModuleType,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    y: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
) -> Any:
    """``SparseMlpParams`` of these tensors, which must outlive every launch with them.

    Shapes and dtypes as in :func:`cats_ext.functional.sparse_mlp`; ``x`` and ``y`` ``[M, H]`` are contiguous.
    """
    params = kernels.SparseMlpParams()
    params.tokens = x.shape[0]
    params.intermediate_size, params.hidden_size = w_gate.shape
    params.x, params.y = x.data_ptr(), y.data_ptr()
    for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down_t", w_down_t)):
        setattr(params, name, weight.data_ptr())
        setattr(params, f"{name}_stride", weight.stride(0))
    for name, value in (("threshold", threshold), ("down_threshold", down_threshold)):
        if value is not None:
            setattr(params, name, value.data_ptr())
            setattr(params, f"{name}_stride", int(value.dim() == 1))
    params.activation = getattr(kernels.Activation, activation)
    params.dtype = getattr(kernels.DType, str(x.dtype).removeprefix("torch."))
    return params
