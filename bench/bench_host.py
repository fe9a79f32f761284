"""Host time of one MLP call, dense and patched: what eager decoding waits for, since its kernels are shorter than that.

python bench/bench_host.py --commit $(git rev-parse --short HEAD) --output bench/results/h100

Shapes are so small that the device is never the one waited for; what is timed is a loop of calls without
synchronisation, the median of several rounds that take turns.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_mlp import machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import cats_ext

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
CONFIGS = {
    "separate projections": LlamaConfig(**SIZES),
    "merged gate_up_proj": Phi3Config(**SIZES, pad_token_id=0),
}
CALLS, ROUNDS = 200, 15  # few calls in a round: the queue of a CUDA stream holds about a thousand launches


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """The same MLP, dense and patched."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(64, (1, 256), device="cuda")
    config = cats_ext.calibrate(model, [ids], rule="two_threshold", sparsity=0.5, progress=False)
    twin = AutoModelForCausalLM.from_config(CONFIGS[name]).to("cuda", torch.bfloat16).eval()
    twin.load_state_dict(model.state_dict())
    return model.model.layers[0].mlp, cats_ext.apply_cats(twin, config).model.layers[0].mlp


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call(x)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


def bench(name: str) -> list[dict]:
    dense, patched = build(name)
    x = torch.randn(1, 1, SIZES["hidden_size"], device="cuda", dtype=torch.bfloat16)
    ways = {"dense": dense, "patched": patched}
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for round_number in range(-3, ROUNDS):
            for way, call in ways.items():
                elapsed = microseconds(call, x)
                if round_number >= 0:
                    times[way].append(elapsed)
    return [{"mlp": name, "way": way, "host_us": round(statistics.median(values), 2)} for way, values in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="for the result file")
    parser.add_argument("--output", type=Path, required=True, help="directory for host.csv")
    arguments = parser.parse_args()
    rows = [row | machine() | {"commit": arguments.commit} for name in CONFIGS for row in bench(name)]
    for row in rows:
        print(row["mlp"], row["way"], row["host_us"], "us", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "host.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
