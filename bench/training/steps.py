"""Time and memory of a training step, dense and patched: LoRA and all weights, in bfloat16.

    python bench training.steps --output bench/results/h100/training.csv

A step is forward, backward and a fused AdamW step on random tokens, of models with random weights. ``step_ms`` is the
median over steps, dense and patched in turns, each until the device is done; ``peak_bytes`` the most that one of them
allocates in a step, model and optimizer included.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.models import random_model, training_config
from bench.lib.results import ResultFile
from bench.lib.shapes import TRAINING_SHAPES
from bench.lib.timing import host_seconds, in_turns

KINDS = ("dense", "patched")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def make(shape: str, tuning: str, patched: bool, device: torch.device) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = random_model(training_config(shape), torch.bfloat16, device)
    if patched:
        ids = torch.randint(model.config.vocab_size, (2, 512))
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
    """Seconds of each step, dense and patched in turns, and the most bytes that each allocates."""
    cuda = device.type == "cuda"
    work: dict[str, Callable[[], None]] = {}
    peaks = {}
    for kind in KINDS:
        others = torch.cuda.memory_allocated() if cuda else 0
        work[kind] = training_step(make(shape, tuning, kind == "patched", device), tokens, device)
        for _ in range(3):
            work[kind]()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        work[kind]()
        peaks[kind] = torch.cuda.max_memory_allocated() - others if cuda else 0
    return dict(zip(KINDS, in_turns(list(work.values()), host_seconds, steps), strict=True)), peaks


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument(
        "--shapes", nargs="*", default=["smollm2-135m", "mistral-7b, 2 layers"], choices=TRAINING_SHAPES
    )
    parser.add_argument("--tunings", nargs="*", default=["lora", "full"])
    parser.add_argument("--sequences", type=int, nargs="*", default=[4, 16], help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no shape after so long")
    args = parser.parse_args()
    started, device = time.perf_counter(), machine.default_device()
    results = ResultFile(args.output, machine.facts(device, args.commit))
    for sequences, tuning, shape in itertools.product(args.sequences, args.tunings, args.shapes):
        if time.perf_counter() - started > args.seconds:
            print(f"no time for {shape}, {tuning}, {sequences} sequences")
            continue
        found, peaks = measure(shape, tuning, (sequences, args.length), args.steps, device)
        gc.collect()
        torch.cuda.empty_cache()
        dense_ms = 1e3 * statistics.median(found["dense"])
        for kind, times in found.items():
            ms = 1e3 * statistics.median(times)
            row = {"shape": shape, "tuning": tuning, "sequences": sequences, "length": args.length}
            row |= {"kind": kind, "steps": len(times), "step_ms": f"{ms:.3f}", "peak_bytes": peaks[kind]}
            row |= {"step_ratio": f"{ms / dense_ms:.4f}"}
            row |= {"peak_ratio": f"{peaks[kind] / max(peaks['dense'], 1):.4f}"}
            results.add(row)
            print(row, f"after {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
