"""Quality against tuning steps: dense, CATS at several sparsities and ReLUfication under the same LoRA tuning.

    python bench quality.task_requests --tokenizer DIR --data ../shared/data --output requests.json.gz
    python bench training.compare --model DIR --data ../shared/data --requests requests.json.gz \
        --output bench/results/finetune
    python bench tables.finetuning_figures bench/results/finetune

Every variant of bench/training/variants.json is a process of its own that calls cats_ext.finetune.finetune with a
callback that measures: perplexity in float32, tasks with the layers in bfloat16. Each calibration there is run once,
and its variants begin after it. Training and calibration are on the C4 sample behind its beginning, which perplexity is
measured on. The CSVs are written anew whenever a process has measured something.
Processes are forked: on a GPU set PYTORCH_NVML_BASED_CUDA_CHECK=1, so that a question about CUDA does not start it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.training.measurement import Measure, load_tasks, prepare_tokens, write_tables
from cats_ext.finetune.run import FinetuneSettings, finetune


def logged(log: Path, work: Callable[..., None], *arguments: Any) -> None:
    """``work``, in a process of its own whose output goes to ``log``."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*arguments)


def calibrate(directory: Path, rule: dict[str, Any], loaded: Loaded) -> None:
    """Once for all variants that name it: thresholds at any sparsity follow from its counts."""
    length = loaded.settings.get("sequence_length", 512)
    windows = loaded.tokens["train"].view(-1, length)
    rule = {"sequence_length": length, "batch_size": 4, "progress": False} | rule
    cats_ext.calibrate(loaded.model.to(machine.default_device()), windows, **rule).save_pretrained(directory)


def tune(args: argparse.Namespace, variant: dict[str, Any], loaded: Loaded) -> None:
    """One variant: tune, and measure at ``--at``."""
    model = loaded.model.to(machine.default_device())
    settings = FinetuneSettings(**loaded.settings | variant["settings"])
    train, config = loaded.tokens["train"].view(-1, settings.sequence_length), None
    if settings.method == "cats":
        counted = cats_ext.CatsConfig.from_pretrained(args.work / f"calibration {variant['calibration']}")
        config = counted.at_sparsity(settings.sparsity)
    name = variant["name"]
    at = [step for step in args.at if step in variant.get("at", args.at)]
    measure = Measure(args.work / f"{name}.jsonl", at, loaded.tokens, loaded.tasks, args.batch_tokens)
    options = {"recalibrate": config is not None, "save_every": settings.steps, "callbacks": [measure]}
    found = finetune(model, train, args.work / name, settings, config=config, progress=False, **options)
    measure.write(
        result={key: found[key] for key in ("before", "after", "recalibrated", "loss")},
        memory=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
    )


@dataclass
class Loaded:
    """What all processes share: they are forked, so nothing is imported, read or tokenised twice."""

    model: nn.Module
    tokens: dict[str, Tensor]
    tasks: dict[str, list[dict[str, Any]]]
    settings: dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """The variants side by side; what they have measured is collected as it comes."""
    started = time.perf_counter()
    document = json.loads(args.variants.read_text())
    variants = [each for each in document["variants"] if not args.only or each["name"] in args.only]
    names = [each["name"] for each in variants]
    settings = document["settings"] | json.loads(args.settings)
    for directory in (args.work, args.output):
        directory.mkdir(parents=True, exist_ok=True)
    tokens = prepare_tokens(args, settings.get("sequence_length", 512))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    loaded = Loaded(model, tokens, load_tasks(args), settings)
    counts = {name: len(value) for name, value in tokens.items()}
    print(f"loaded after {time.perf_counter() - started:.1f} s: {counts} tokens", flush=True)
    name = machine.nvidia_smi("name")  # torch would initialise CUDA, which does not survive a fork
    facts = machine.facts("cuda" if name else "cpu", args.commit, name=name or None)
    for name in ("accelerate", "peft", "transformers.trainer"):
        importlib.import_module(name)  # seconds, once for all processes
    fork, waiting, running, seen = multiprocessing.get_context("fork"), list(variants), {}, {}

    def start(name: str, work: Callable[..., None], *arguments: Any) -> None:
        log = args.output / (re.sub(r"\W+", "_", name).strip("_") + ".log")
        running[name] = fork.Process(target=logged, args=(log, work, *arguments))
        running[name].start()

    for name in dict.fromkeys(each["calibration"] for each in variants if "calibration" in each):
        name = f"calibration {name}"
        start(name, calibrate, args.work / name, document["calibrations"][name.removeprefix("calibration ")], loaded)
    while waiting or running:
        for variant in [each for each in waiting if f"calibration {each.get('calibration')}" not in running]:
            if len(running) < args.parallel:
                waiting.remove(variant)
                start(variant["name"], tune, args, variant, loaded)
        time.sleep(1)
        for name in [name for name, process in running.items() if not process.is_alive()]:
            seconds = time.perf_counter() - started
            print(f"{name}: exit status {running.pop(name).exitcode} after {seconds:.1f} s", flush=True)
        new = {path.name: path.stat().st_size for path in args.work.glob("*.jsonl")}
        if new != seen:
            seen = new
            write_tables(args.work, args.output, names, facts)
        if time.perf_counter() - started > args.seconds:
            for name, process in running.items():
                process.kill()
                print(f"{name}: no time left")
            break
    write_tables(args.work, args.output, names, facts)
    print(f"done after {time.perf_counter() - started:.1f} s", flush=True)


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", required=True)
    for name in ("data", "requests"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--variants", type=Path, default=Path(__file__).with_name("variants.json"))
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--settings", default="{}", help="JSON: fields of FinetuneSettings instead of the file's")
    parser.add_argument("--work", type=Path, default=Path("/tmp/finetune_compare"), help="an empty directory")
    parser.add_argument("--at", type=int, nargs="*", default=[0, 25, 50, 100, 200, 400], help="steps to measure at")
    parser.add_argument("--items", type=int, help="of each task at most")
    parser.add_argument("--c4-windows", type=int, default=48, help="of 1,024 tokens, to measure on")
    parser.add_argument("--wikitext-windows", type=int, default=8)
    parser.add_argument("--train-tokens", type=int, default=1 << 30, help="at most")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="of a batch of requests")
    parser.add_argument("--parallel", type=int, default=12, help="processes at once")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop everything after so long")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    run(parser.parse_args())


if __name__ == "__main__":
    main()
