"""A few tokens through a gated MLP on a GPU: torch.ops.cats.sparse_mlp against dense PyTorch and against "optimal".

    python bench/bench_mlp.py --output bench/results/h100

Every path is captured in a CUDA graph over layers of distinct weights, several times the L2 in all; paths take turns,
medians are reported, and speedups are against the fastest dense path of the same run. Thresholds are exact quantiles of
|act(gate)| for the x in use. "optimal" is the paper's: a dense MLP of only as many neurons as are kept, without
selecting them; once with the gate projection whole, as CATS needs it, and once reduced like the others.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext import ops
from cats_ext.benchmark import SHAPES, parse_shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Run = Callable[[], object]


@dataclass
class Layer:
    gate: Tensor  # [I, H]
    up: Tensor  # [I, H]
    down: Tensor  # [H, I], as nn.Linear stores it
    down_t: Tensor  # [I, H], as the op reads it
    thresholds: dict[float, Tensor]
    rows_kept: dict[float, int]  # neurons that some token keeps


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def make_layer(x: Tensor, intermediate: int, sparsities: list[float]) -> Layer:
    hidden = x.shape[-1]
    gate, up, down_t = (torch.randn(intermediate, hidden, device="cuda").to(x.dtype) / hidden**0.5 for _ in range(3))
    value = F.silu(F.linear(x.float(), gate.float())).abs()
    by_size = value.flatten().sort().values
    # Halfway between two neurons, so that rounding cannot move one over the threshold.
    thresholds = {
        s: by_size[round(s * len(by_size)) - 1 :][:2].mean() if s else by_size.new_zeros(()) for s in sparsities
    }
    rows_kept = {s: int((value >= t).any(0).sum()) for s, t in thresholds.items()}
    return Layer(gate, up, down_t.t().contiguous(), down_t, thresholds, rows_kept)


def capture(path: Run) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        path()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        path()
    return graph.replay


def time_in_turns(paths: dict[str, Run], repetitions: int) -> dict[str, float]:
    """Median seconds of each path."""
    replays = {name: capture(path) for name, path in paths.items()}
    events = {name: [] for name in paths}
    for _ in range(repetitions + 3):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) for a, b in pairs[3:]) / 1e3 for n, pairs in events.items()}


def read_limit() -> float:
    """GB/s at which the card reads memory: the fastest of 20 sums over 2 GiB of float32."""
    data = torch.ones(1 << 29, device="cuda")
    replay = capture(data.sum)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return data.nbytes / min(times) / 1e9


def optimal(layers: list[Layer], x: Tensor, sparsity: float, whole_gate: bool) -> Run:
    """A dense MLP of as many neurons as are kept, the first ones. [:k] of down is copied: a view has long rows."""
    parts = []
    for layer in layers:
        k = layer.rows_kept[sparsity]
        parts.append((layer.gate if whole_gate else layer.gate[:k], layer.up[:k], layer.down[:, :k].contiguous(), k))

    def run() -> None:
        for gate, up, down, k in parts:
            g = F.silu(F.linear(x, gate))
            F.linear(g[:, :k] * F.linear(x, up), down)

    return run


def bench(shape: str, dtype: str, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    hidden, intermediate = parse_shape(shape)
    layer_bytes = 3 * hidden * intermediate * DTYPES[dtype].itemsize
    count = max(3, -(-arguments.working_set // layer_bytes))
    x = torch.randn(tokens, hidden, device="cuda").to(DTYPES[dtype])
    layers = [make_layer(x, intermediate, arguments.sparsity) for _ in range(count)]
    compiled = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
    paths: dict[str, Run] = {
        "dense": lambda: [dense(x, w.gate, w.up, w.down) for w in layers],
        "dense, down transposed": lambda: [dense(x, w.gate, w.up, w.down_t.t()) for w in layers],
    }
    if arguments.compile:
        paths["dense, torch.compile"] = lambda: [compiled(x, w.gate, w.up, w.down) for w in layers]

    def sparse(s: float) -> Run:
        return lambda: [ops.sparse_mlp(x, w.gate, w.up, w.down_t, w.thresholds[s]) for w in layers]

    sparsity_of = dict.fromkeys(paths, 0.0)
    for s in arguments.sparsity:
        variants = {f"sparse_mlp {s:.0%}": sparse(s)}
        if s and tokens == 1:
            variants[f"optimal {s:.0%}, whole gate"] = optimal(layers, x, s, whole_gate=True)
            variants[f"optimal {s:.0%}"] = optimal(layers, x, s, whole_gate=False)
        paths |= variants
        sparsity_of |= dict.fromkeys(variants, s)

    with torch.inference_mode():
        expected = dense(x, layers[0].gate, layers[0].up, layers[0].down).float()
        y = ops.sparse_mlp(x, layers[0].gate, layers[0].up, layers[0].down_t, torch.zeros((), device="cuda")).float()
        error = float((y - expected).norm() / expected.norm())
        if not error < (1e-4 if dtype == "fp32" else 1e-2):
            raise RuntimeError(f"{shape} {dtype}: the op at threshold 0 differs from the dense MLP by {error:.1e}")
        limit = read_limit()
        seconds = time_in_turns(paths, arguments.repetitions)
    best_dense = min(t for name, t in seconds.items() if name.startswith("dense"))
    rows = []
    for name, total in seconds.items():
        s, us = sparsity_of[name], total / count * 1e6
        kept = statistics.mean(w.rows_kept[s] for w in layers) / intermediate if s else 1.0
        gate_share = kept if name == f"optimal {s:.0%}" else 1.0
        gb_per_s = layer_bytes / 3 * (gate_share + 2 * kept) / us / 1e3
        rows.append(
            {
                "shape": shape,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "dtype": dtype,
                "tokens": tokens,
                "path": name.split(",")[0].split(" ")[0],
                "variant": name,
                "sparsity": s,
                "us": round(us, 2),
                "gb_per_s": round(gb_per_s),
                "read_limit_gb_per_s": round(limit),
                "share_of_limit": round(gb_per_s / limit, 3),
                "speedup": round(best_dense / total, 3),
                "layers": count,
            }
        )
    return rows


def machine() -> dict[str, str]:
    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    return {
        "device": torch.cuda.get_device_name(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["mistral-7b", "llama-2-7b"], help=f"HxI or {', '.join(SHAPES)}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9])
    parser.add_argument("--working-set", type=int, default=1 << 30, help="bytes of weights to rotate through, at least")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--commit", default=None, help="for the result file; default: git rev-parse HEAD")
    parser.add_argument("--output", type=Path, help="directory for mlp.csv")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    git = ("git", "rev-parse", "--short", "HEAD")
    commit = arguments.commit or subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    common = machine() | {"commit": commit}
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    results = []
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            for tokens in arguments.tokens:
                for row in bench(shape, dtype, tokens, arguments):
                    results.append(row | common)
                    print(
                        f"{shape:14} {dtype} {tokens:3} tokens  {row['variant']:30} {row['us']:9.2f} us "
                        f"{row['gb_per_s']:6} GB/s {row['share_of_limit']:6.3f} of limit {row['speedup']:6.3f}x",
                        flush=True,
                    )
                torch.compiler.reset()
                torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / "mlp.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, results[0])
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
