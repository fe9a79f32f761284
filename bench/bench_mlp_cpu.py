"""A few tokens through a gated MLP on the CPU: torch.ops.cats.sparse_mlp against the best dense PyTorch path.

    python bench/bench_mlp_cpu.py --output bench/results/cpu-NAME/mlp_cpu.csv
    python bench/bench_mlp_cpu.py --tokens 2 4 8 16 32 64 --output bench/results/cpu-NAME/mlp_cpu_tokens.csv

Every call works on the weights of another layer, so that no cache holds what it reads; all paths take turns within one
repetition, so that a change of the machine's speed hits all of them; medians are reported. The read limit is the best
rate at which this machine sums a buffer of the same weights (read_limit.cpp), measured in the same turns. Thresholds
are exact quantiles of |act(gate)| for the x in use, so that exactly the stated share of neurons is skipped; of several
tokens each skips its own, and the bytes to read are those of the neurons that any of them keeps.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import itertools
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext import ops
from cats_ext.ops.library import LIBRARIES

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Layer:
    x: Tensor  # [M, H]
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I], as nn.Linear stores it
    down_t: Tensor  # [I, H], as the op reads it
    thresholds: dict[float, Tensor]  # by sparsity
    rows_kept: dict[float, float]  # by sparsity: share of the neurons that some token keeps


def make_layer(
    tokens: int, hidden: int, intermediate: int, dtype: torch.dtype, sparsities: list[float], seed: int
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int) -> Tensor:
        return (torch.randn(rows, hidden, generator=generator) / hidden**0.5).to(dtype)

    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    gate, up, down_t = (weight(intermediate) for _ in range(3))
    value = F.silu(F.linear(x.float(), gate.float())).abs()
    by_size = value.flatten().sort().values
    # Halfway between two neurons, so that rounding cannot move one over the threshold.
    thresholds = {s: by_size[round(s * len(by_size)) - 1 :][:2].mean() if s else torch.tensor(0.0) for s in sparsities}
    rows_kept = {s: float((value >= threshold).any(0).float().mean()) for s, threshold in thresholds.items()}
    return Layer(x, gate, up, down_t.t().contiguous(), down_t, thresholds, rows_kept)


def dense(layer: Layer) -> Tensor:
    h = F.silu(F.linear(layer.x, layer.gate)) * F.linear(layer.x, layer.up)
    return F.linear(h, layer.down)


def dense_transposed(layer: Layer) -> Tensor:
    """The storage that the op leaves to the dense path: one copy of the weights."""
    h = F.silu(F.linear(layer.x, layer.gate)) * F.linear(layer.x, layer.up)
    return F.linear(h, layer.down_t.t())


def sparse(sparsity: float) -> Callable[[Layer], Tensor]:
    def run(layer: Layer) -> Tensor:
        return ops.sparse_mlp(layer.x, layer.gate, layer.up, layer.down_t, layer.thresholds[sparsity])

    return run


def load_read_limit(directory: str) -> Callable[[Tensor, int], float]:
    library = Path(directory) / "read_limit.so"
    flags = ["-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
    subprocess.check_call([os.environ.get("CXX", "c++"), *flags, str(HERE / "read_limit.cpp"), "-o", str(library)])
    read_seconds = ctypes.CDLL(str(library)).read_seconds
    read_seconds.restype = ctypes.c_double

    def rate(data: Tensor, streams: int) -> float:
        size = data.nbytes // 4
        result = ctypes.c_float()
        seconds = read_seconds(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_size_t(size),
            torch.get_num_threads(),
            streams,
            ctypes.byref(result),
        )
        return 4 * size / seconds / 1e9

    return rate


def measure(layers: list[Layer], paths: dict[str, Callable[[Layer], Tensor]], repetitions: int, read_rate):
    """Median seconds of each path, and the best rate in GB/s at which a weight was read meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    limit = 0.0
    turn = 0
    for repetition in range(-1, repetitions):  # the first one warms up
        for streams in (1, 2, 4, 8):
            limit = max(limit, read_rate(layers[turn % len(layers)].up, streams))
            turn += 1
        for name, path in paths.items():
            if repetition > 0 and seconds[name][0] > 1:
                continue  # hopeless, and the run should end today
            layer = layers[turn % len(layers)]
            turn += 1
            start = time.perf_counter()
            path(layer)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, limit


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain") else "")


def bench(dtype_name: str, tokens: int, arguments: argparse.Namespace, read_rate) -> Iterator[dict]:
    hidden, intermediate, sparsities = arguments.hidden_size, arguments.intermediate_size, arguments.sparsity
    dtype = DTYPES[dtype_name]
    layers = [make_layer(tokens, hidden, intermediate, dtype, sparsities, seed) for seed in range(arguments.layers)]
    paths: dict[str, Callable[[Layer], Tensor]] = {"dense": dense, "dense, down transposed": dense_transposed}
    if arguments.compile and tokens == 1:
        compiled = torch.compile(lambda *tensors: dense(Layer(*tensors, thresholds={}, rows_kept={})))
        paths["dense, torch.compile"] = lambda layer: compiled(layer.x, layer.gate, layer.up, layer.down, layer.down_t)
    sparsity_of = {f"sparse_mlp {s:.0%}": s for s in sparsities}
    paths |= {name: sparse(s) for name, s in sparsity_of.items()}
    with torch.inference_mode():
        expected = dense(layers[0]).float()
        for name in paths.keys() - (sparsity_of.keys() - {"sparse_mlp 0%"}):
            torch.testing.assert_close(paths[name](layers[0]).float(), expected, atol=0.02, rtol=0.02)
        seconds, limit = measure(layers, paths, arguments.repetitions, read_rate)
    best_dense = min(time for name, time in seconds.items() if name not in sparsity_of)
    for name, time_taken in seconds.items():
        sparsity = sparsity_of.get(name)
        rows = 1.0 if sparsity is None else statistics.mean(layer.rows_kept[sparsity] for layer in layers)
        gb_per_s = hidden * intermediate * dtype.itemsize * (1 + 2 * rows) / time_taken / 1e9
        yield {
            "dtype": dtype_name,
            "tokens": tokens,
            "path": "dense" if sparsity is None else "sparse_mlp",
            "variant": name,
            "sparsity": sparsity or 0.0,
            "ms": round(time_taken * 1e3, 3),
            "gb_per_s": round(gb_per_s, 1),
            "read_limit_gb_per_s": round(limit, 1),
            "share_of_limit": round(gb_per_s / limit, 3),
            "speedup": round(best_dense / time_taken, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--layers", type=int, default=4, help="sets of weights to rotate through")
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not LIBRARIES["_C"].loaded:
        parser.error(f"cats_ext._C is not loaded: {LIBRARIES['_C'].reason}")
    machine = {
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.intermediate_size,
        "device": cpu_model(),
        "kernels": re.search(r"uses (\w+)", LIBRARIES["_C"].build_info)[1],
        "threads": arguments.threads,
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':40}{'ms':>10}{'GB/s':>8}{'of limit':>10}{'speedup':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        read_rate = load_read_limit(directory)
        for dtype_name, tokens in itertools.product(arguments.dtype, arguments.tokens):
            for row in bench(dtype_name, tokens, arguments, read_rate):
                rows.append(row | machine)
                label = f"{dtype_name}, M = {tokens}, {row['variant']}"
                numbers = f"{row['ms']:10.2f}{row['gb_per_s']:8.1f}{row['share_of_limit']:10.2f}{row['speedup']:9.2f}"
                print(f"{label:40}{numbers}", flush=True)
            print(f"{dtype_name}, M = {tokens}, read limit {rows[-1]['read_limit_gb_per_s']:.1f} GB/s")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
