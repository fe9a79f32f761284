"""What apply_cats costs on a GPU: memory at rest, peak memory and time, for a model of exact layer shapes.

python bench/bench_patching.py --commit $(git rev-parse --short HEAD) --output bench/results/h100
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from bench_mlp import machine
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import cats_ext

CONFIGS = {
    "mistral-7b": MistralConfig(),
    "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008),
}


def build(name: str) -> nn.Module:
    """A model of the exact shapes with random bf16 weights, made on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    torch.set_default_dtype(torch.float32)
    return model


def bench(name: str, model: nn.Module, rule: str) -> dict:
    """Patch ``model``, measure, and make it dense again."""
    ids = torch.randint(model.config.vocab_size, (4, 256), device="cuda")
    config = cats_ext.calibrate(model, [ids], sparsity=0.5, rule=rule, progress=False)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    cats_ext.apply_cats(model, config)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    cats_ext.remove_cats(model)
    return {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "rule": rule,
        "bytes_before": before,
        "bytes_after": after,
        "added_share": round((after - before) / before, 6),
        "peak_extra_bytes": peak - before,
        "seconds": round(seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="for the result file")
    parser.add_argument("--output", type=Path, required=True, help="directory for patching.csv")
    arguments = parser.parse_args()
    rows = []
    for name in CONFIGS:
        model = build(name)
        for rule in ("plain", "two_threshold"):
            rows.append(bench(name, model, rule) | machine() | {"commit": arguments.commit})
            print(rows[-1], flush=True)
        del model
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "patching.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
