"""Time and memory of a training step, dense and patched: LoRA and all weights, in bfloat16.

    python bench/bench_training.py --out bench/results/h100

A step is forward, backward and a fused AdamW step on random tokens, of models with random weights. ``step_ms`` is the
median over steps, dense and patched in turns, each until the device is done; ``peak_bytes`` the most that one of them
allocates in a step, model and optimizer included.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cats_ext

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "mistral-7b, 2 layers": (4096, 14336, 2, 32, 8, 32000),
    "tiny": (64, 172, 2, 4, 2, 512),
}
KINDS = ("dense", "patched")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def make(shape: str, tuning: str, patched: bool, device: torch.device) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=shape.startswith("smollm2"),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if patched:
        ids = torch.randint(vocabulary, (2, 512))
        cats_ext.apply_cats(model, cats_ext.calibrate(model, ids, sparsity=0.5, progress=False))
    return get_peft_model(model, LoraConfig(**LORA)) if tuning == "lora" else model


def training_step(model: nn.Module, tokens: tuple[int, int], device: torch.device) -> Callable[[], None]:
    vocabulary = model.get_input_embeddings().num_embeddings
    batch = torch.randint(vocabulary, tokens, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    model.train()

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    shape: str, tuning: str, tokens: tuple[int, int], steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each step, dense and patched in turns, and the most bytes that each allocates."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    work: dict[str, Callable[[], None]] = {}
    peaks, times = {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        others = torch.cuda.memory_allocated() if cuda else 0
        work[kind] = training_step(make(shape, tuning, kind == "patched", device), tokens, device)
        for _ in range(3):
            work[kind]()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        work[kind]()
        peaks[kind] = torch.cuda.max_memory_allocated() - others if cuda else 0
    for _ in range(steps):
        for kind in KINDS:
            wait()
            started = time.perf_counter()
            work[kind]()
            wait()
            times[kind].append(1e3 * (time.perf_counter() - started))
    return times, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "mistral-7b, 2 layers"], choices=SHAPES)
    parser.add_argument("--tunings", nargs="*", default=["lora", "full"])
    parser.add_argument("--sequences", type=int, nargs="*", default=[4, 16], help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no shape after so long")
    parser.add_argument("--commit", help="where there is no git")
    args = parser.parse_args()
    started, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = args.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    facts = {"device": name, "torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for sequences, tuning, shape in itertools.product(args.sequences, args.tunings, args.shapes):
        if time.perf_counter() - started > args.seconds:
            print(f"no time for {shape}, {tuning}, {sequences} sequences")
            continue
        found, peaks = measure(shape, tuning, (sequences, args.length), args.steps, device)
        gc.collect()
        torch.cuda.empty_cache()
        dense_ms = statistics.median(found["dense"])
        for kind, times in found.items():
            ms = statistics.median(times)
            row = {"shape": shape, "tuning": tuning, "sequences": sequences, "length": args.length}
            row |= {"kind": kind, "steps": len(times), "step_ms": f"{ms:.3f}", "peak_bytes": peaks[kind]}
            row |= {"step_ratio": f"{ms / dense_ms:.4f}"}
            row |= {"peak_ratio": f"{peaks[kind] / max(peaks['dense'], 1):.4f}"}
            rows.append(row | facts)
            print(row, f"after {time.perf_counter() - started:.1f} s", flush=True)
        with open(args.out / "training.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
