"""Host time of one MLP call, dense and patched: what eager decoding waits for, since its kernels are shorter than that.

    python bench kernels.host --output bench/results/h100/host.csv

Shapes are so small that the device is never the one waited for; what is timed is a loop of calls without
synchronisation, the median of several rounds that take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import random_model
from bench.lib.results import ResultFile
from bench.lib.timing import in_turns, synchronize

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
CONFIGS = {
    "separate projections": LlamaConfig(**SIZES),
    "merged gate_up_proj": Phi3Config(**SIZES, pad_token_id=0),
}


def build(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same MLP, dense and patched: random_model has one seed."""
    model, twin = (random_model(CONFIGS[name], torch.bfloat16, device).eval() for _ in range(2))
    ids = torch.randint(64, (1, 256), device=device)
    config = cats_ext.calibrate(model, [ids], rule="two_threshold", sparsity=0.5, progress=False)
    return model.model.layers[0].mlp, cats_ext.apply_cats(twin, config).model.layers[0].mlp


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(x)
    elapsed = time.perf_counter() - start
    synchronize()
    return elapsed / calls * 1e6


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument(
        "--calls", type=int, default=200, help="in a round: the queue of a CUDA stream holds about a thousand launches"
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = machine.default_device()
    results = ResultFile(arguments.output, machine.facts(device, arguments.commit))
    x = torch.randn(1, 1, SIZES["hidden_size"], device=device, dtype=torch.bfloat16)
    for name in CONFIGS:
        with torch.no_grad():
            times = in_turns(
                build(name, device), lambda call: microseconds(call, x, arguments.calls), arguments.rounds, warmup=3
            )
        for kind, values in zip(("dense", "patched"), times, strict=True):
            results.add({"mlp": name, "way": kind, "host_us": round(statistics.median(values), 2)})
            print(name, kind, results.rows[-1]["host_us"], "us", flush=True)


if __name__ == "__main__":
    main()
