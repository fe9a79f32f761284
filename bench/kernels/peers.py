"""The published Triton kernels of CATS and TEAL, imported from checkouts of their repositories, for kernels.mlp.

https://github.com/ScalingIntelligence/CATS (flash_gemv) and https://github.com/FasterDecoding/TEAL (kernels). Nothing
of them is part of this repository. They are called as their authors' models call them, with two differences in their
favour: they are tuned anew for each sparsity, and everything is captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib.layers import kth_threshold
from bench.lib.timing import recorded
from cats_ext import ops


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _quick_bench(call: Callable[[], object], quantiles: object = None) -> list[float]:
    """Instead of 125 ms a configuration as Triton tunes by default: 7 runs, behind a fill that hides the launches."""
    fill = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(8):
        fill.zero_()
        pairs.append(recorded(call))
    torch.cuda.synchronize()
    return [sorted(a.elapsed_time(b) for a, b in pairs[1:])[3]] * 3


class Peer:
    """One project's kernels for the MLP of a layer."""

    path: str  # in the result file
    file: str  # in their repository
    dtype: torch.dtype | None = None  # the only one it takes
    autotuners: tuple[str, ...]

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = _import(root / self.file)
        for name in self.autotuners:
            getattr(self.module, name).do_bench = _quick_bench

    def retune(self) -> None:
        for name in self.autotuners:
            getattr(self.module, name).cache.clear()

    def refusal(self, tokens: int, hidden: int, intermediate: int) -> str | None:
        """Why it cannot run this shape, or nothing."""
        raise NotImplementedError

    def weights(self, gate: Tensor, up: Tensor, down_t: Tensor) -> Any:
        """A layer's ``[I, H]`` weights, laid out as the kernels take them."""
        raise NotImplementedError

    def mlp(self, x: Tensor, weights: list[Any], sparsity: float) -> tuple[list[Callable[[], Tensor]], list[Tensor]]:
        """For each layer a call that computes y ``[M, H]``, and y as PyTorch computes it in fp32."""
        raise NotImplementedError

    def share_read(self, sparsity: float, rows_kept: float) -> float:
        """Share of the layer's weights that must be read; ``rows_kept``: share of neurons that some token keeps."""
        raise NotImplementedError


class CatsTriton(Peer):
    """gate as a dense product, its mask, then flags of neurons for the up and the down kernel."""

    path = "cats_triton"
    file = "flash_gemv/flash_gemv/kernels.py"
    autotuners = ("gather_gemv_elemul_flag_kernel", "gather_transposed_gemv_flag_atomicadd_kernel")

    def refusal(self, tokens: int, hidden: int, intermediate: int) -> str | None:
        if tokens > 4:
            return "its kernels take 1 to 4 tokens"
        if hidden % 2048 or intermediate % 128:
            return "its kernels read out of bounds unless H is a multiple of 2048 and I of 128"
        return None

    def weights(self, gate: Tensor, up: Tensor, down_t: Tensor) -> Any:
        return gate, up, down_t

    def mlp(self, x: Tensor, weights: list[Any], sparsity: float) -> tuple[list[Callable[[], Tensor]], list[Tensor]]:
        calls, expected = [], []
        for gate, up, down_t in weights:
            v = F.silu(F.linear(x.float(), gate.float()))
            threshold = float(kth_threshold(v.abs(), sparsity))
            h = v * F.linear(x.float(), up.float()) * (v.abs() > threshold)
            expected.append(h @ down_t.float())

            def call(gate=gate, up=up, down_t=down_t, threshold=threshold):
                x_3d = x[:, None]
                v = F.silu(F.linear(x_3d, gate))
                flags = torch.abs(v) > threshold
                h = self.module.gather_gemv_elemul_flag_3d(x_3d, v, up, flags)
                return self.module.gather_transposed_gemv_flag_3d(h, down_t, flags)[:, 0]

            calls.append(call)
        return calls, expected

    def share_read(self, sparsity: float, rows_kept: float) -> float:
        return (1 + 2 * rows_kept) / 3


class TealTriton(Peer):
    """Entries of x below a threshold are dropped before gate and up, and entries of h before down. Results are fp16."""

    path = "teal_triton"
    file = "kernels/sparse_gemv.py"
    dtype = torch.float16
    autotuners = ("splitk_sparse_gemv_kernel",)

    def __init__(self, root: Path) -> None:
        # Only its wrappers for torch.compile need this module, which needs msgspec.
        sys.modules.setdefault("compile_wrapper", types.SimpleNamespace(BaseKernel=object))
        super().__init__(root)

    def refusal(self, tokens: int, hidden: int, intermediate: int) -> str | None:
        return "its kernel takes 1 token" if tokens > 1 else None

    def weights(self, gate: Tensor, up: Tensor, down_t: Tensor) -> Any:
        # Column-major views. The kernel reads whole blocks, past the end of a last row that is not a multiple of 512.
        def columns(rows: Tensor) -> Tensor:
            padded = torch.zeros(rows.shape[0] + 1, rows.shape[1], dtype=torch.float16, device=rows.device)
            padded[:-1] = rows
            return padded[:-1].t()

        return columns(gate.t()), columns(up.t()), columns(down_t)

    def mlp(self, x: Tensor, weights: list[Any], sparsity: float) -> tuple[list[Callable[[], Tensor]], list[Tensor]]:
        x = x.half()[:, None]
        zero = torch.zeros((), device=x.device)
        in_threshold = kth_threshold(x.abs().float(), sparsity)
        calls, expected = [], []
        for gate, up, down in weights:
            x_kept = x[:, 0].float() * (x[:, 0].abs() > in_threshold)
            h = F.silu(F.linear(x_kept, gate.float())) * F.linear(x_kept, up.float())
            h_threshold = float(kth_threshold(h.abs(), sparsity))
            expected.append(F.linear(h * (h.abs() > h_threshold), down.float()))

            def call(gate=gate, up=up, down=down, in_threshold=float(in_threshold), h_threshold=h_threshold):
                gemv = self.module.splitk_sparse_gemv
                # sparsity_bin 0, as its generate.py has it; silu and product in one kernel, as under torch.compile
                h = ops.gated_threshold(gemv(x, gate, in_threshold, 0), gemv(x, up, in_threshold, 0), zero)
                return gemv(h, down, h_threshold, 0)[:, 0]

            calls.append(call)
        return calls, expected

    def share_read(self, sparsity: float, rows_kept: float) -> float:
        return 1 - sparsity


def _compile_one(kind: type[Peer], root: Path, index: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype):
    """Compiles one configuration of each kernel into Triton's cache on disk, by running it alone."""
    peer = kind(root)
    for name in peer.autotuners:
        tuner = getattr(peer.module, name)
        tuner.configs = [tuner.configs[min(index, len(tuner.configs) - 1)]]
    hidden, intermediate = shape
    weights = peer.weights(*(torch.zeros(intermediate, hidden, dtype=dtype, device="cuda") for _ in range(3)))
    calls, _ = peer.mlp(torch.ones(tokens, hidden, dtype=dtype, device="cuda"), [weights], 0.5)
    calls[0]()
    torch.cuda.synchronize()


def compile_in_parallel(
    peers: list[Peer], shapes: list[tuple[int, int]], tokens: list[int], dtypes: list[torch.dtype]
) -> None:
    """Fills Triton's cache on disk from several processes: the kernels have up to 19 configurations, up to 6 s each.

    What fails here fails again, and is reported, when the peer is timed.
    """
    jobs = []
    for peer in peers:
        count = max(len(getattr(peer.module, name).configs) for name in peer.autotuners)
        for shape, m, dtype in itertools.product(shapes, tokens, dtypes):
            if not peer.refusal(m, *shape):
                jobs += [(type(peer), peer.root, index, m, shape, dtype) for index in reversed(range(count))]
    if not jobs:
        return
    started = time.perf_counter()
    # spawned: CUDA does not survive a fork
    workers = min(len(jobs), os.cpu_count() or 1, 12)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failed = sum(job.exception() is not None for job in [pool.submit(_compile_one, *job) for job in jobs])
    print(
        f"peers: {len(jobs)} configurations compiled in {time.perf_counter() - started:.1f} s, {failed} failed",
        flush=True,
    )


def load_peers(roots: list[Path]) -> list[Peer]:
    """The peers in these checkouts, those that cannot be imported left out with a line that says why.

    Raises:
        SystemExit: a directory is no checkout of either repository.
    """
    peers: list[Peer] = []
    for root in roots:
        kinds = [kind for kind in (CatsTriton, TealTriton) if (root / kind.file).is_file()]
        if not kinds:
            raise SystemExit(f"--peer-path: '{root}' has neither {CatsTriton.file} (CATS) nor {TealTriton.file} (TEAL)")
        for kind in kinds:
            try:
                peers.append(kind(root))
            except Exception as error:
                print(f"{kind.path}: left out, {kind.file} cannot be imported: {error!r}", flush=True)
    return peers
