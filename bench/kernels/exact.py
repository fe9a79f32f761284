"""MLPs that are sparse by themselves on a GPU: what they skip, against the dense model's own operations.

    python bench kernels.exact --output bench/results/h200/exact.csv

Gemma 3n's sparse layers (the largest 5 % of each token), a gated ReLU and a squared ReLU without a gate, the last two
at 90 % by a bias before the activation. Every path is captured in a CUDA graph over layers of distinct weights, several
times the L2 in all; paths take turns, medians are reported, and speedups are against the fastest dense path of the same
number of tokens. Masks are of random tokens, independent of each other: more rows are read for several tokens than in a
text. Ours is the op for as many tokens as --tokens has; apply_exact takes it for the first few (ops/dispatch.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured
from bench.lib.layers import random_rows
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.timing import replay_seconds
from cats_ext import ops
from cats_ext.patching.exact.modules import gaussian_multipliers, gaussian_top_k
from cats_ext.thresholds.exact import SMALLEST_ABOVE_ZERO

KINDS = {  # kind, hidden size, intermediate size, sparsity
    "gemma-3n-e4b": ("gemma3n", 2048, 16384, 0.95),
    "gemma-3n-e2b": ("gemma3n", 2048, 8192, 0.95),
    "gated-relu": ("gated", 4096, 11008, 0.9),
    "relu2": ("plain", 4096, 16384, 0.9),
}


@dataclass
class Weights:
    """Of one layer. The gate is the up projection of an MLP without one."""

    gate: Tensor
    bias: Tensor | None  # of the gate
    up: Tensor | None
    down: Tensor  # [H, I], as nn.Linear has it
    down_t: Tensor  # [I, H], the same


def random_weights(kind: str, hidden: int, intermediate: int, sparsity: float) -> Weights:
    gate, up, down_t = (random_rows(intermediate, hidden, torch.bfloat16, "cuda") for _ in range(3))
    bias = None
    if kind != "gemma3n":  # as many gates of a normal x are below zero
        cut = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - sparsity)).item()
        bias = torch.full((intermediate,), cut, dtype=torch.bfloat16, device="cuda")
    return Weights(gate, bias, None if kind == "plain" else up, down_t.t().contiguous(), down_t)


def activation_of(kind: str, sparsity: float) -> Callable[[Tensor], Tensor]:
    if kind == "gemma3n":
        multiplier = gaussian_multipliers(sparsity, torch.device("cuda"))[torch.bfloat16]
        return lambda gate: F.gelu(gaussian_top_k(gate, multiplier), approximate="tanh")
    return F.relu if kind == "gated" else lambda gate: F.relu(gate).square()


def paths(kind: str, act: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor, Weights], Tensor]]:
    """Every path as a function of x and a layer's weights."""
    threshold = torch.tensor(SMALLEST_ABOVE_ZERO, device="cuda")

    def dense(x: Tensor, w: Weights) -> Tensor:
        v = act(F.linear(x, w.gate, w.bias))
        return F.linear(v if w.up is None else v * F.linear(x, w.up), w.down)

    def activated(x: Tensor, w: Weights) -> Tensor:
        v = act(F.linear(x, w.gate, w.bias))
        return ops.activated_mlp(v, w.down_t, None, None if w.up is None else x, w.up)

    def compiled(function: Callable[[Tensor, Weights], Tensor]) -> Callable[[Tensor, Weights], Tensor]:
        def on_tensors(x: Tensor, *tensors: Tensor | None) -> Tensor:
            return function(x, Weights(*tensors))

        fast = torch.compile(on_tensors, dynamic=False, options={"coordinate_descent_tuning": True})
        return lambda x, w: fast(x, w.gate, w.bias, w.up, w.down, w.down_t)

    found = {"dense": dense, "dense, compiled": compiled(dense)}
    found |= {"activated_mlp": activated, "activated_mlp, compiled": compiled(activated)}
    if kind == "gated":
        found["sparse_mlp"] = lambda x, w: ops.sparse_mlp(
            x, w.gate, w.up, w.down_t, threshold, None, "relu", w.bias, None, None
        )
    return found


@torch.inference_mode()
def bench(name: str, tokens: int, arguments: argparse.Namespace) -> Iterator[dict]:
    kind, hidden, intermediate, sparsity = KINDS[name]
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    layers = [random_weights(kind, hidden, intermediate, sparsity) for _ in range(arguments.layers)]
    act, limit = activation_of(kind, sparsity), gpu_read_limit()
    active = sum(int((act(F.linear(x, w.gate, w.bias)) != 0).any(0).sum()) for w in layers) / len(layers)
    variants = paths(kind, act)
    want = variants["dense"](x, layers[0]).float()
    for path, mlp in variants.items():
        error = float((mlp(x, layers[0]).float() - want).norm() / want.norm())
        if not error < 0.02:
            raise AssertionError(f"{name}, {tokens} tokens, {path}: relative error {error:.3f}")
    replays = [Captured(lambda mlp=mlp: [mlp(x, w) for w in layers]) for mlp in variants.values()]
    seconds = replay_seconds(replays, arguments.repetitions)
    us = {path: total / len(layers) * 1e6 for path, total in zip(variants, seconds, strict=True)}
    fastest = min(time for path, time in us.items() if path.startswith("dense"))
    matrix, skipping = 2 * hidden * intermediate, 1 if kind == "plain" else 2
    for path, time in us.items():
        rows = intermediate if path.startswith("dense") else active
        read = matrix + skipping * rows * 2 * hidden
        yield {
            "layer": name,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "tokens": tokens,
            "path": path,
            "sparsity": sparsity,
            "rows_read": round(rows / intermediate, 4),
            "us": round(time, 2),
            "speedup": round(fastest / time, 3),
            "limit_us": round(read / limit / 1e3, 2),
            "read_limit_gb_per_s": round(limit),
            "layers": len(layers),
        }


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--layer", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layers", type=int, default=8, help="of distinct weights")
    parser.add_argument("--repetitions", type=int, default=50)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    facts = machine.facts("cuda", arguments.commit)
    machine.print_facts(facts)
    results = ResultFile(arguments.output, facts)
    for name in arguments.layer:
        for tokens in arguments.tokens:
            for row in bench(name, tokens, arguments):
                results.add(row)
                times = f"{row['us']:8.2f} us, {row['speedup']:.2f}x, its bytes alone {row['limit_us']:6.2f} us"
                print(f"{name:13} {tokens:2} tokens  {row['path']:24} {times}", flush=True)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
