"""Times ``sparse_mlp`` against the dense PyTorch MLP on this machine; ``cats bench`` is its command line.

Every pass runs over so many layers of distinct weights that no cache holds them. Passes of dense, sparse and a plain
read of memory alternate. Medians are reported, with the bytes that had to be read and the best rate of the plain read.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.native.library import LIBRARIES
from cats_ext.ops import definitions as ops
from cats_ext.thresholds.rules import check_sparsity

# (hidden_size H, intermediate_size I) by name
SHAPES = {
    "mistral-7b": (4096, 14336),
    "llama-2-7b": (4096, 11008),
    "llama-3-8b": (4096, 14336),
    "llama-2-13b": (5120, 13824),
    "llama-3-70b": (8192, 28672),
    "llama-3.2-1b": (2048, 8192),
    "qwen2.5-7b": (3584, 18944),
    "qwen2.5-0.5b": (896, 4864),
    "smollm2-135m": (576, 1536),
}
# More than any last-level cache: 384 MiB is the largest L3 of a socket in wide use, 126 MB the largest L2 of a GPU.
_WORKING_SET = {"cpu": 1 << 30, "cuda": 1 << 30}
_MAX_LAYERS = 256


def parse_shape(name: str) -> tuple[int, int]:
    """``(H, I)`` of a shape's name or of a string like ``4096x14336``."""
    if name in SHAPES:
        return SHAPES[name]
    if match := re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", name):
        return int(match[1]), int(match[2])
    raise ValueError(f"shape must be HxI, as in 4096x14336, or one of {', '.join(SHAPES)}; got '{name}'")


@dataclass
class Row:
    """One timing: time in microseconds and bytes that had to be read, both per layer."""

    variant: str
    sparsity: float  # share of neurons skipped by the average token
    microseconds: float
    bytes_read: int
    gb_per_s: float
    share_of_read_limit: float
    speedup: float  # against dense in the same run


@dataclass
class Result:
    """All timings of one run, and the conditions they were taken in."""

    hidden_size: int
    intermediate_size: int
    tokens: int
    dtype: str
    device: str
    threads: int | None
    layers: int
    passes: int
    compiled: bool  # false: no kernel for this device is built, and the PyTorch reference was timed
    read_limit_gb_per_s: float
    torch_version: str
    rows: list[Row]


@dataclass
class _Layer:
    w_gate: Tensor  # [I, H]
    w_up: Tensor  # [I, H]
    w_down: Tensor  # [H, I], as nn.Linear has it, for the dense path
    w_down_t: Tensor  # [I, H], the same with one contiguous row a neuron, for the op
    threshold: Tensor

    def dense(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w_gate)) * F.linear(x, self.w_up), self.w_down)

    def sparse(self, x: Tensor) -> Tensor:
        return ops.sparse_mlp(x, self.w_gate, self.w_up, self.w_down_t, self.threshold)

    def set_sparsity(self, x: Tensor, sparsity: float) -> tuple[float, int]:
        """Set the threshold for ``x``; return the sparsity reached and how many neurons at least one token keeps."""
        v = F.silu(F.linear(x.float(), self.w_gate.float())).abs()
        # halfway between two values, so that rounding in the op changes no decision
        ordered = v.flatten().sort().values
        k = round(sparsity * ordered.numel())
        self.threshold.fill_(0 if k == 0 else (ordered[k - 1] + ordered[min(k, ordered.numel() - 1)]) / 2)
        kept = v >= self.threshold
        return 1 - kept.float().mean().item(), int(kept.any(dim=0).sum())


def _make_layers(count: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> list[_Layer]:
    generator = torch.Generator(device).manual_seed(0)

    def weight(fan_in: int) -> Tensor:
        w = torch.empty(intermediate, hidden, dtype=dtype, device=device)
        return w.normal_(0, fan_in**-0.5, generator=generator)

    layers = []
    for _ in range(count):
        w_gate, w_up, w_down_t = weight(hidden), weight(hidden), weight(intermediate)
        layers.append(_Layer(w_gate, w_up, w_down_t.t().contiguous(), w_down_t, torch.zeros((), device=device)))
    return layers


def _time_passes(passes: list[Callable[[], Any]], device: torch.device, count: int) -> list[list[float]]:
    """Seconds of ``count`` runs of each pass, in turns and after a warm-up; on a GPU captured and timed by events."""
    if device.type == "cuda":
        passes = [captured(one_pass) for one_pass in passes]
    for one_pass in passes:
        for _ in range(2):
            one_pass()
    turns = [[_time(one_pass, device) for one_pass in passes] for _ in range(count)]
    return [list(seconds) for seconds in zip(*turns, strict=True)]


def captured(one_pass: Callable[[], Any]) -> Callable[[], Any]:
    """``one_pass`` captured in a CUDA graph; the result replays it on the current stream.

    It is run once before, on the stream of the capture: the op's workspaces belong to a stream.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        one_pass()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        one_pass()
    return graph.replay


def _time(one_pass: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        one_pass()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    one_pass()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@torch.inference_mode()
def run(
    hidden_size: int,
    intermediate_size: int,
    *,
    sparsities: list[float],
    tokens: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    passes: int = 20,
    report: Callable[[str], None] = lambda step: None,
) -> Result:
    """Time the dense and the sparse MLP at each of ``sparsities``.

    Args:
        hidden_size, intermediate_size: H and I of every layer.
        sparsities: shares of neurons to skip, in [0, 1).
        tokens: rows of x.
        passes: timed runs over all layers.
        report: called with a message before each step.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the op's result at threshold 0 is not the dense MLP's.
    """
    if not sparsities:
        raise ValueError("sparsities must not be empty")
    for name, value in (("tokens", tokens), ("passes", passes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for sparsity in sparsities:
        check_sparsity("sparsity", sparsity)
    device = torch.device(device)
    row_bytes = hidden_size * dtype.itemsize
    dense_bytes = 3 * intermediate_size * row_bytes
    count = min(_MAX_LAYERS, max(2, -(-_WORKING_SET[device.type] // dense_bytes)))

    _check_memory(hidden_size, intermediate_size, tokens, dtype, device, (count + 1) * dense_bytes)

    report(f"making {count} layers of random weights")
    memory = torch.ones(_WORKING_SET[device.type] // 4, device=device)
    layers = _make_layers(count, hidden_size, intermediate_size, dtype, device)
    x = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    _check_equal(layers[0], x)

    def dense() -> None:
        for layer in layers:
            layer.dense(x)

    def sparse() -> None:
        for layer in layers:
            layer.sparse(x)

    times: dict[str, list[float]] = {"dense": [], "read": []}
    timings = []  # by sparsity: sparsity reached, bytes read per layer, seconds of the dense and the sparse passes
    for sparsity in sparsities:
        report(f"timing sparsity {sparsity:.0%}")
        reached, kept = zip(*(layer.set_sparsity(x, sparsity) for layer in layers), strict=True)
        bytes_read = dense_bytes // 3 + 2 * row_bytes * sum(kept) // count
        dense_seconds, sparse_seconds, read_seconds = _time_passes([dense, sparse, memory.sum], device, passes)
        timings.append((sum(reached) / count, bytes_read, dense_seconds, sparse_seconds))
        times["dense"] += dense_seconds
        times["read"] += read_seconds
    limit = memory.numel() * memory.itemsize / min(times["read"]) / 1e9

    def row(variant: str, sparsity: float, bytes_read: int, dense: list[float], seconds: list[float]) -> Row:
        per_layer = statistics.median(seconds) / count
        rate = bytes_read / per_layer / 1e9
        speedup = statistics.median(dense) / statistics.median(seconds)
        return Row(variant, sparsity, per_layer * 1e6, bytes_read, rate, rate / limit, speedup)

    return Result(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        layers=count,
        passes=passes,
        compiled=LIBRARIES["_C_cuda" if device.type == "cuda" else "_C"].loaded,
        read_limit_gb_per_s=limit,
        torch_version=torch.__version__,
        rows=[row("dense", 0.0, dense_bytes, times["dense"], times["dense"])]
        + [row("sparse", *timing) for timing in timings],
    )


def _check_memory(
    hidden: int, intermediate: int, tokens: int, dtype: torch.dtype, device: torch.device, weights: int
) -> None:
    """Raise ValueError if ``weights`` bytes, the working set and some activations are more than the memory left."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        memory = Path("/proc/meminfo")
        found = re.search(r"MemAvailable: +(\d+)", memory.read_text() if memory.exists() else "")
        free = int(found[1]) * 1024 if found else sys.maxsize
    needed = weights + _WORKING_SET[device.type] + 4 * tokens * (2 * hidden + 6 * intermediate)
    if needed > free:
        raise ValueError(
            f"shape must fit into memory: {hidden}x{intermediate} with {tokens} tokens in "
            f"{str(dtype).removeprefix('torch.')} takes {needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB are free"
        )


def _check_equal(layer: _Layer, x: Tensor) -> None:
    dense, sparse = layer.dense(x).float(), layer.sparse(x).float()
    tolerance = 2e-5 if x.dtype == torch.float32 else 2e-2
    error = ((dense - sparse).norm() / dense.norm()).item()
    if not error <= tolerance:
        raise RuntimeError(
            f"sparse_mlp at threshold 0 differs from the dense MLP by {error:.1e} (relative), more than {tolerance}: "
            "the timing of a wrong result has no meaning"
        )
