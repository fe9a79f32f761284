"""What counting costs: the op with and without counters, in turns inside CUDA graphs over distinct layers.

    python bench/telemetry.py --out bench/results/quality/telemetry.csv [--commit ID]

One token, bf16, Mistral-7B's MLP shape, 50 % of the neurons skipped; device events, median over rounds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from pathlib import Path

import torch

import cats_ext

HIDDEN, INTERMEDIATE, LAYERS, ROUNDS = 4096, 14336, 8, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", help="where there is no git")
    args = parser.parse_args()
    torch.manual_seed(0)
    make = lambda: torch.randn(INTERMEDIATE, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5  # noqa: E731
    layers = [(make(), make(), make()) for _ in range(LAYERS)]
    x = torch.randn(1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    v = torch.nn.functional.silu(x.float() @ layers[0][0].float().T).abs()
    threshold = v.median()
    counts = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in layers]
    ways = {
        "off": lambda: [cats_ext.ops.sparse_mlp(x, *weights, threshold) for weights in layers],
        "on": lambda: [
            cats_ext.ops.sparse_mlp_counted(x, *weights, count, threshold)
            for weights, count in zip(layers, counts, strict=True)
        ],
    }
    graphs, times = {}, {name: [] for name in ways}
    for name, run in ways.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run()
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(1000 * start.elapsed_time(end) / LAYERS)
    commit = (
        args.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    evaluated, kept, _ = counts[0].tolist()
    off = statistics.median(times["off"])
    with open(Path(args.out), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("counting,us_per_layer,overhead,sparsity,rounds,device,torch,commit,date".split(","))
        for name, values in times.items():
            us = statistics.median(values)
            facts = (torch.cuda.get_device_name(), torch.__version__, commit, time.strftime("%Y-%m-%d"))
            writer.writerow([name, f"{us:.3f}", f"{us / off - 1:.5f}", f"{1 - kept / evaluated:.4f}", ROUNDS, *facts])
            print(name, f"{us:.3f} us a layer, {us / off - 1:+.3%}")


if __name__ == "__main__":
    main()
