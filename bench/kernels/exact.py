"""MLPs that are sparse by themselves on a GPU: what they skip, against the dense model's own operations.

    python bench kernels.exact --output bench/results/h200/exact.csv

Gemma 3n's sparse layers (the largest 5 % of each token), a gated ReLU and a squared ReLU without a gate, the last two
at 90 % by a bias before the activation; beside the gated ReLU CATS of SiLU at 90 %. Every path is captured in a CUDA
graph over layers of distinct weights, several times the L2 in all; paths take turns, medians are reported, and speedups
are against the fastest dense path of the same number of tokens. Masks are of random tokens, independent of each other:
more rows are read for several tokens than in a text. Ours are the ops for as many tokens as --tokens has: activated_mlp
after the model's own operations, and exact_mlp, which is all of it. apply_exact takes one of them for the first few
(ops/dispatch.py), and for more "dense, down transposed", which is what a patched model has.
Without a GPU it runs as it is, for a trial with --shrink.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.layers import kth_threshold, random_rows
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.timing import host_seconds, in_turns, replay_seconds
from cats_ext import ops
from cats_ext.patching.exact.modules import gaussian_multipliers, gaussian_top_k
from cats_ext.thresholds.statistics import SMALLEST

KINDS = {  # kind, hidden size, intermediate size, sparsity
    "gemma-3n-e4b": ("gemma3n", 2048, 16384, 0.95),
    "gemma-3n-e2b": ("gemma3n", 2048, 8192, 0.95),
    "gated-relu": ("gated", 4096, 11008, 0.9),
    "relu2": ("plain", 4096, 16384, 0.9),
}
DEVICE = machine.default_device()
CATS = "sparse_mlp, CATS of SiLU"


@dataclass
class Weights:
    """Of one layer. The gate is the up projection of an MLP without one."""

    gate: Tensor
    bias: Tensor | None  # of the gate
    up: Tensor | None
    down: Tensor  # [H, I], as nn.Linear has it
    down_t: Tensor  # [I, H], the same


Path = Callable[[Tensor, Weights], Tensor]


def random_weights(kind: str, hidden: int, intermediate: int, sparsity: float) -> Weights:
    gate, up, down_t = (random_rows(intermediate, hidden, torch.bfloat16, DEVICE) for _ in range(3))
    bias = None
    if kind != "gemma3n":  # as many gates of a normal x are below zero
        cut = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - sparsity)).item()
        bias = torch.full((intermediate,), cut, dtype=torch.bfloat16, device=DEVICE)
    return Weights(gate, bias, None if kind == "plain" else up, down_t.t().contiguous(), down_t)


def exact_arguments(kind: str, sparsity: float) -> tuple[str, float | None]:
    """The activation and the deviations of exact_mlp."""
    if kind == "gemma3n":
        return "gelu_tanh", gaussian_multipliers(sparsity, DEVICE)[torch.bfloat16]
    return "relu" if kind == "gated" else "relu2", None


def activation_of(kind: str, sparsity: float) -> Callable[[Tensor], Tensor]:
    if kind == "gemma3n":
        multiplier = gaussian_multipliers(sparsity, DEVICE)[torch.bfloat16]
        return lambda gate: F.gelu(gaussian_top_k(gate, multiplier), approximate="tanh")
    return F.relu if kind == "gated" else lambda gate: F.relu(gate).square()


def compiled(function: Path, tuned: bool) -> Path:
    def on_tensors(x: Tensor, *tensors: Tensor | None) -> Tensor:
        return function(x, Weights(*tensors))

    fast = torch.compile(on_tensors, dynamic=False, options={"coordinate_descent_tuning": tuned})
    return lambda x, w: fast(x, w.gate, w.bias, w.up, w.down, w.down_t)


def paths(kind: str, sparsity: float, tuned: bool) -> dict[str, Path]:
    """Every path that computes the layer. ``tuned``: those compiled have products of their own, which takes longer."""
    act, exact = activation_of(kind, sparsity), exact_arguments(kind, sparsity)
    threshold = torch.tensor(SMALLEST, device=DEVICE)

    def dense(x: Tensor, w: Weights) -> Tensor:
        v = act(F.linear(x, w.gate, w.bias))
        return F.linear(v if w.up is None else v * F.linear(x, w.up), w.down)

    def transposed(x: Tensor, w: Weights) -> Tensor:
        return dense(x, Weights(w.gate, w.bias, w.up, w.down_t.t(), w.down_t))

    def activated(x: Tensor, w: Weights) -> Tensor:
        v = act(F.linear(x, w.gate, w.bias))
        return ops.activated_mlp(v, w.down_t, None, None if w.up is None else x, w.up)

    found = {"dense": dense, "dense, compiled": compiled(dense, tuned), "dense, down transposed": transposed}
    found |= {"activated_mlp": activated, "activated_mlp, compiled": compiled(activated, tuned)}
    found["exact_mlp"] = lambda x, w: ops.exact_mlp(x, w.gate, w.up, w.down_t, *exact, False, w.bias)
    if kind == "gated":
        found["sparse_mlp"] = lambda x, w: ops.sparse_mlp(
            x, w.gate, w.up, w.down_t, threshold, None, "relu", w.bias, None, None
        )
    return found


def rows_needed(mask: Tensor) -> int:
    """Neurons that some token keeps, of ``mask`` ``[M, I]``."""
    return int(mask.any(0).sum())


def seconds_of(runs: list[Run], repetitions: int) -> list[float]:
    if DEVICE.type == "cuda":
        return replay_seconds([Captured(run) for run in runs], repetitions)
    return [statistics.median(each) for each in in_turns(runs, host_seconds, repetitions, warmup=1)]


@torch.inference_mode()
def bench(name: str, tokens: int, limit: float | None, arguments: argparse.Namespace) -> Iterator[dict]:
    kind, hidden, intermediate, sparsity = KINDS[name]
    hidden, intermediate = hidden // arguments.shrink, intermediate // arguments.shrink
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    layers = [random_weights(kind, hidden, intermediate, sparsity) for _ in range(arguments.layers)]
    act = activation_of(kind, sparsity)
    variants = paths(kind, sparsity, tuned=tokens == 1)
    want = variants["dense"](x, layers[0]).float()
    for path, mlp in variants.items():
        error = float((mlp(x, layers[0]).float() - want).norm() / want.norm())
        if not error < 0.02:
            raise AssertionError(f"{name}, {tokens} tokens, {path}: relative error {error:.3f}")
    needed = [rows_needed(act(F.linear(x, w.gate, w.bias)) != 0) for w in layers]
    rows = {path: [intermediate] * len(layers) if path.startswith("dense") else needed for path in variants}
    runs: dict[str, Run] = {p: lambda mlp=mlp: [mlp(x, w) for w in layers] for p, mlp in variants.items()}
    if kind == "gated":
        values = [F.silu(F.linear(x.float(), w.gate.float())).abs() for w in layers]
        thresholds = [kth_threshold(value, sparsity) for value in values]
        rows[CATS] = [rows_needed(value >= t) for value, t in zip(values, thresholds, strict=True)]
        runs[CATS] = lambda: [
            ops.sparse_mlp(x, w.gate, w.up, w.down_t, t) for w, t in zip(layers, thresholds, strict=True)
        ]
    us = {
        path: total / len(layers) * 1e6
        for path, total in zip(runs, seconds_of(list(runs.values()), arguments.repetitions), strict=True)
    }
    fastest = min(time for path, time in us.items() if path.startswith("dense"))
    for path, time_taken in us.items():
        share = statistics.mean(rows[path]) / intermediate
        read = 2 * hidden * intermediate * (1 + share * (1 if kind == "plain" else 2))
        yield {
            "layer": name,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "tokens": tokens,
            "path": path,
            "sparsity": sparsity,
            "rows_read": round(share, 4),
            "us": round(time_taken, 2),
            "speedup": round(fastest / time_taken, 3),
            "limit_us": round(read / limit / 1e3, 2) if limit else "",
            "read_limit_gb_per_s": round(limit) if limit else "",
            "layers": len(layers),
        }


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--layer", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=8, help="of distinct weights")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing more after so long")
    parser.add_argument("--shrink", type=int, default=1, help="divide hidden and intermediate sizes by this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    facts = machine.facts(DEVICE, arguments.commit)
    machine.print_facts(facts)
    results, started = ResultFile(arguments.output, facts), time.monotonic()
    limit = gpu_read_limit() if DEVICE.type == "cuda" else None
    for tokens in arguments.tokens:
        for name in arguments.layer:
            if time.monotonic() - started > arguments.seconds:
                print(f"out of time before {name}, {tokens} tokens")
                continue
            for row in bench(name, tokens, limit, arguments):
                results.add(row)
                times = f"{row['us']:8.2f} us, {row['speedup']:.2f}x, its bytes alone {row['limit_us']:>6} us"
                print(f"{name:13} {tokens:2} tokens  {row['path']:24} {times}", flush=True)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
