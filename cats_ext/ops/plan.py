"""Which CUDA kernel serves a shape, with what sizes and why: csrc/cuda/plan.h asked from Python, without a GPU.

The launchers ask the same function before every launch. Both compiled libraries have it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from cats_ext.native.library import LIBRARIES

KERNELS = ("none", "pipelined", "small", "batched", "generic", "packed")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # DType in csrc/sparse_mlp.h


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan depends on beside the shape. ``shared_bytes``: the most shared memory that a CTA can opt in to."""

    compute_capability: int  # 90 for 9.0
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Plan:
    """One launch, for the first ``tokens`` of the tokens that were asked for. Sizes that a kernel has not are 0."""

    kernel: str  # one of KERNELS
    reason: str
    tokens: int
    ctas: int
    threads: int
    shared_bytes: int  # dynamic, of a CTA
    bulk_copy: bool  # the copy engine copies the rows; otherwise the warps do
    teams: int
    team_warps: int
    chunks: int  # 16-byte chunks of a row for each lane
    rows_per_batch: int
    column_groups: int  # for each worker warp: groups of 32 columns, or blocks of 128 of packed rows
    token_padding: int
    row_stride: int
    slots: int  # batches of rows in the ring
    segment_chunks: int
    first_batches: int
    ring_rows: int  # of a batch of packed rows

    @property
    def supported(self) -> bool:
        return self.kernel != "none"


class _Choice(ctypes.Structure):  # Choice in csrc/cuda/plan.h
    _fields_ = tuple(
        (field.name, {"reason": ctypes.c_char_p, "bulk_copy": ctypes.c_bool}.get(field.name, ctypes.c_int))
        for field in fields(Plan)
    )


@cache
def _cats_plan() -> ctypes._CFuncPtr:
    loaded = [library.path for library in LIBRARIES.values() if library.loaded]
    if not loaded:
        reasons = "; ".join(f"{library.name}: {library.reason}" for library in LIBRARIES.values())
        raise RuntimeError(f"plan() needs a compiled library of cats_ext, and none is loaded: {reasons}")
    function = ctypes.CDLL(loaded[0]).cats_plan
    shape = (*(ctypes.c_int64,) * 3, ctypes.c_int, *(ctypes.c_bool,) * 5, ctypes.POINTER(ctypes.c_char_p))
    function.argtypes, function.restype = (*shape, *(ctypes.c_int,) * 3, ctypes.POINTER(_Choice)), ctypes.c_bool
    return function


def plan(
    hidden_size: int,
    intermediate_size: int,
    tokens: int,
    dtype: torch.dtype,
    limits: DeviceLimits,
    *,
    step: bool = False,
    aligned: bool = True,
    deterministic: bool = False,
    exact: bool = False,
    kept: bool = False,
    formats: tuple[str, str, str] | None = None,
) -> Plan:
    """The next launch for ``tokens`` tokens of a layer.

    Args:
        step: the form for a step of decoding, ``sparse_mlp_step``.
        aligned: all rows and vectors start at multiples of 16 bytes, as those of whole tensors do.
        deterministic: the same bits in every run.
        exact: the form of ``exact_mlp``; with a cutoff, its first launch.
        kept: the second launch of ``sparse_mlp_columns``, for one token; with ``step``, of ``sparse_mlp_columns_step``.
        formats: of packed gate, up and down rows (:mod:`cats_ext.rows`); None: dense weights.

    Raises:
        RuntimeError: no compiled library is loaded.
        ValueError: the op has no such dtype, or there is no such format.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    names = (ctypes.c_char_p * 3)(*map(str.encode, formats)) if formats else None
    forms = (aligned, step, deterministic, exact, kept)
    shape = (tokens, hidden_size, intermediate_size, _DTYPES[dtype], *forms, names)
    choice = _Choice()
    if not _cats_plan()(*shape, limits.compute_capability, limits.multiprocessors, limits.shared_bytes, choice):
        raise ValueError(f"formats must be three names of packed row formats, got {formats!r}")
    members = {field.name: getattr(choice, field.name) for field in fields(Plan)}
    return Plan(**members | {"kernel": KERNELS[choice.kernel], "reason": choice.reason.decode()})


@cache  # a launch of the decode step asks several times
def device_limits(device: torch.device) -> DeviceLimits:
    """Of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    # All but 1 KiB of a multiprocessor's shared memory, on every architecture so far.
    most = properties.shared_memory_per_multiprocessor - 1024
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", most)
    return DeviceLimits(10 * properties.major + properties.minor, properties.multi_processor_count, shared_bytes)


def step_supported(
    weights: Sequence[Tensor],
    norm_weight: Tensor,
    y_sum: Tensor,
    formats: tuple[str, str, str] | None = None,
    *,
    columns: bool = False,
) -> bool:
    """Whether ``sparse_mlp_step`` takes a layer with ``weights`` ``[I, H]``, or packed rows in ``formats``.

    With ``columns``, whether ``sparse_mlp_columns_step`` takes one that ``sparse_mlp_columns`` takes; the gate is then
    ``[H, I]``. True where the op runs on its reference, which takes every layer.
    """
    up = weights[1]
    if up.device.type != "cuda" or not LIBRARIES["_C_cuda"].loaded:
        return True
    strides = [weight.stride(0) * weight.element_size() for weight in weights]
    aligned = all(t.data_ptr() % 16 == 0 for t in (*weights, norm_weight, y_sum))
    aligned = aligned and all(stride % 16 == 0 and stride < 2**32 for stride in strides)
    shape = norm_weight.numel(), up.shape[0], 1, norm_weight.dtype
    forms = {"step": True, "kept": columns, "aligned": aligned, "formats": formats}
    return plan(*shape, device_limits(up.device), **forms).supported


MAX_PACKED_INPUTS = 8192  # kMaxPackedInputs


def packed_linear_supported(weight: Tensor, inputs: int, dtype: torch.dtype) -> bool:
    """Whether ``packed_linear_step`` takes rows of ``inputs`` columns. True where the op runs on its reference."""
    if weight.device.type != "cuda" or not LIBRARIES["_C_cuda"].loaded:
        return True
    return dtype in (torch.float16, torch.bfloat16) and inputs % 8 == 0 and inputs <= MAX_PACKED_INPUTS
