"""What apply_cats costs on a GPU: memory at rest, peak memory and time, for a model of exact layer shapes.

python bench/bench_patching.py --output bench/results/h100
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from bench_mlp import machine
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import cats_ext

# Of the 32 layers of each as many as fit in a short run; the share of the memory depends little on their number.
CONFIGS = {
    "mistral-7b": MistralConfig(num_hidden_layers=8),
    "llama-2-7b": LlamaConfig(num_hidden_layers=8, hidden_size=4096, intermediate_size=11008),
}


def bench(name: str, rule: str) -> dict:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(model.config.vocab_size, (4, 256), device="cuda")
    config = cats_ext.calibrate(model, [ids], sparsity=0.5, rule=rule, progress=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    cats_ext.apply_cats(model, config)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
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
        for rule in ("plain", "two_threshold"):
            rows.append(bench(name, rule) | machine() | {"commit": arguments.commit})
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "patching.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
