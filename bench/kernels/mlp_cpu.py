"""A few tokens through a gated MLP on the CPU: torch.ops.cats.sparse_mlp against the best dense PyTorch path.

    python bench kernels.mlp_cpu --output bench/results/cpu-NAME/mlp_cpu.csv
    python bench kernels.mlp_cpu --tokens 2 4 8 16 32 64 --output bench/results/cpu-NAME/mlp_cpu_tokens.csv
    python bench kernels.mlp_cpu --dtype bf16 --rows int8_g128 int4_g128 --output cpu_rows.csv

Every call works on the weights of another layer, so that no cache holds what it reads; all paths take turns within one
repetition, so that a change of the machine's speed hits all of them; medians are reported. The read limit is the best
rate at which this machine sums a buffer of the same weights (read_limit.cpp), measured in the same turns. Thresholds
are exact quantiles of |act(gate)| for the x in use, so that exactly the stated share of neurons is skipped; of several
tokens each skips its own, and the bytes to read are those of the neurons that any of them keeps.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.layers import Layer, dense, kth_threshold
from bench.lib.read_limit import CpuReader
from bench.lib.results import ResultFile
from bench.lib.shapes import DTYPES
from bench.lib.timing import host_seconds
from cats_ext import ops
from cats_ext.native.library import LIBRARIES
from cats_ext.rows import FORMATS, quantize_rows

RunLayer = Callable[[int], Tensor]  # runs layer number i


def measure(layers: list[Layer], paths: dict[str, RunLayer], repetitions: int, reader: CpuReader):
    """Median seconds of each path, and the best rate in GB/s at which a weight was read meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    limit, turns = 0.0, itertools.cycle(range(len(layers)))
    for repetition in range(-1, repetitions):  # the first one warms up
        for streams in (1, 2, 4, 8):
            limit = max(limit, reader(layers[next(turns)].up, streams))
        for name, path in paths.items():
            if repetition > 0 and seconds[name][0] > 1:
                continue  # too slow to be worth the repetitions
            taken = host_seconds(lambda path=path: path(next(turns)))
            if repetition >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}, limit


def sparse(layers: list[Layer], sparsity: float) -> RunLayer:
    thresholds = [layer.threshold(sparsity) for layer in layers]

    def run(i: int) -> Tensor:
        w = layers[i]
        return ops.sparse_mlp(w.x, w.gate, w.up, w.down_t, thresholds[i])

    return run


def packed(layers: list[Layer], sparsities: list[float], name: str) -> dict[float, RunLayer]:
    """On the same weights, rounded to packed rows; the thresholds are those of the rounded gate."""
    row_format, hidden = FORMATS[name], layers[0].x.shape[-1]
    rows = [[quantize_rows(w, row_format) for w in (layer.gate, layer.up, layer.down_t)] for layer in layers]
    values = [
        F.silu(F.linear(layer.x.float(), row_format.unpack(gate, hidden))).abs()
        for layer, (gate, _, _) in zip(layers, rows, strict=True)
    ]

    def at(sparsity: float) -> RunLayer:
        thresholds = [kth_threshold(v, sparsity) for v in values]
        return lambda i: ops.sparse_mlp_packed(layers[i].x, *rows[i], name, name, name, thresholds[i])

    return {sparsity: at(sparsity) for sparsity in sparsities}


def dense_path(layers: list[Layer], mlp: Callable[..., Tensor], transposed: bool = False) -> RunLayer:
    """``transposed``: on the storage that the op leaves to the dense path, one copy of the weights."""

    def run(i: int) -> Tensor:
        w = layers[i]
        return mlp(w.x, w.gate, w.up, w.down_t.t() if transposed else w.down)

    return run


def bench(dtype_name: str, tokens: int, arguments: argparse.Namespace, reader: CpuReader) -> Iterator[dict]:
    hidden, intermediate, dtype = arguments.hidden_size, arguments.intermediate_size, DTYPES[dtype_name]
    layers = [Layer.random(torch.randn(tokens, hidden).to(dtype), intermediate) for _ in range(arguments.layers)]
    paths = {"dense": dense_path(layers, dense), "dense, down transposed": dense_path(layers, dense, transposed=True)}
    if arguments.compile and tokens == 1:
        paths["dense, torch.compile"] = dense_path(layers, torch.compile(dense))
    sparsity_of = {f"sparse_mlp {s:.0%}": s for s in arguments.sparsity}
    paths |= {name: sparse(layers, s) for name, s in sparsity_of.items()}
    row_bytes = dict.fromkeys(paths, hidden * dtype.itemsize)
    for rows in arguments.rows:
        for sparsity, path in packed(layers, arguments.sparsity, rows).items():
            name = f"{rows} {sparsity:.0%}"
            paths[name], sparsity_of[name], row_bytes[name] = path, sparsity, FORMATS[rows].row_bytes(hidden)
    with torch.inference_mode():
        expected = paths["dense"](0).float()
        for name in paths.keys() - (sparsity_of.keys() - {"sparse_mlp 0%"}):
            torch.testing.assert_close(paths[name](0).float(), expected, atol=0.02, rtol=0.02)
        seconds, limit = measure(layers, paths, arguments.repetitions, reader)
    best_dense = min(time for name, time in seconds.items() if name not in sparsity_of)
    for name, time_taken in seconds.items():
        sparsity = sparsity_of.get(name)
        rows = 1.0 if sparsity is None else statistics.mean(layer.rows_kept(sparsity) for layer in layers)
        gb_per_s = row_bytes[name] * intermediate * (1 + 2 * rows) / time_taken / 1e9
        yield {
            "dtype": dtype_name,
            "tokens": tokens,
            "path": "dense" if sparsity is None else name.split()[0],
            "variant": name,
            "sparsity": sparsity or 0.0,
            "ms": round(time_taken * 1e3, 3),
            "gb_per_s": round(gb_per_s, 1),
            "read_limit_gb_per_s": round(limit, 1),
            "share_of_limit": round(gb_per_s / limit, 3),
            "speedup": round(best_dense / time_taken, 2),
        }


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", choices=FORMATS, default=[], help="packed rows to time too")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--layers", type=int, default=4, help="sets of weights to rotate through")
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not LIBRARIES["_C"].loaded:
        parser.error(f"cats_ext._C is not loaded: {LIBRARIES['_C'].reason}")
    facts = {
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.intermediate_size,
        "kernels": re.search(r"uses (\w+)", LIBRARIES["_C"].build_info)[1],
        "threads": arguments.threads,
    }
    facts |= machine.facts("cpu", arguments.commit)
    machine.print_facts(facts)
    print(f"{'':40}{'ms':>10}{'GB/s':>8}{'of limit':>10}{'speedup':>9}")
    results, reader = ResultFile(arguments.output, facts), CpuReader()
    for dtype_name, tokens in itertools.product(arguments.dtype, arguments.tokens):
        for row in bench(dtype_name, tokens, arguments, reader):
            results.add(row)
            label = f"{dtype_name}, M = {tokens}, {row['variant']}"
            numbers = f"{row['ms']:10.2f}{row['gb_per_s']:8.1f}{row['share_of_limit']:10.2f}{row['speedup']:9.2f}"
            print(f"{label:40}{numbers}", flush=True)
        print(f"{dtype_name}, M = {tokens}, read limit {row['read_limit_gb_per_s']:.1f} GB/s")


if __name__ == "__main__":
    main()
