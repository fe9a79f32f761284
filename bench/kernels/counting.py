"""What counting costs: the op with and without counters, in turns inside CUDA graphs over distinct layers.

    python bench kernels.counting --output bench/results/quality/telemetry.csv

One token, bf16, Mistral-7B's MLP shape, 50 % of the neurons skipped; device events, median over rounds.
"""

from __future__ import annotations

import statistics

import torch
from torch.nn.functional import linear, silu

from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured
from bench.lib.layers import random_rows
from bench.lib.results import ResultFile
from bench.lib.shapes import SHAPES
from bench.lib.timing import device_seconds, in_turns
from cats_ext import ops

LAYERS, ROUNDS = 8, 200


def main() -> None:
    arguments = command(__spec__, __doc__, output="CSV file").parse_args()
    torch.manual_seed(0)
    hidden, intermediate = SHAPES["mistral-7b"]
    layers = [
        [random_rows(intermediate, hidden, torch.bfloat16, "cuda") for _ in range(3)] for _ in range(LAYERS)
    ]  # gate, up, down_t
    x = torch.randn(1, hidden, device="cuda", dtype=torch.bfloat16)
    threshold = silu(linear(x.float(), layers[0][0].float())).abs().median()
    counts = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in layers]

    def counted() -> None:
        for weights, count in zip(layers, counts, strict=True):
            ops.sparse_mlp_counted(x, *weights, count, threshold)

    def uncounted() -> None:
        for weights in layers:
            ops.sparse_mlp(x, *weights, threshold)

    times = in_turns([Captured(run, warmup=3) for run in (uncounted, counted)], device_seconds, ROUNDS)
    off, on = (statistics.median(values) * 1e6 / LAYERS for values in times)
    evaluated, kept, _ = counts[0].tolist()
    results = ResultFile(arguments.output, machine.facts("cuda", arguments.commit))
    for name, us in (("off", off), ("on", on)):
        row = {"counting": name, "us_per_layer": f"{us:.3f}", "overhead": f"{us / off - 1:.5f}"}
        results.add(row | {"sparsity": f"{1 - kept / evaluated:.4f}", "rounds": ROUNDS})
        print(name, f"{us:.3f} us a layer, {us / off - 1:+.3%}")


if __name__ == "__main__":
    main()
