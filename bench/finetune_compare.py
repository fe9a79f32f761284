"""Quality against tuning steps: dense, CATS at several sparsities and ReLUfication under the same LoRA tuning.

    python bench/quality_requests.py --tokenizer DIR --data ../shared/data --out requests.json.gz
    python bench/finetune_compare.py --model DIR --data ../shared/data --requests requests.json.gz \
        --out bench/results/finetune
    python bench/finetune_plots.py bench/results/finetune

Every variant of bench/finetune.json is a process of its own that calls cats_ext.finetune.finetune with a callback that
measures: perplexity in float32, tasks with the layers in bfloat16. Training and calibration are on the C4 sample behind
its beginning, which perplexity is measured on. The CSVs are written anew whenever a process has measured something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from finetune_measure import Measure, load_tasks, prepare_tokens, write_tables
from learned_thresholds import LearnThresholds


def child(args: argparse.Namespace) -> None:
    """One variant: calibrate, tune, measure at ``--at``."""
    from transformers import AutoModelForCausalLM

    import cats_ext
    from cats_ext.finetune import FinetuneSettings, finetune

    document = json.loads(Path(args.variants).read_text())
    variant = next(each for each in document["variants"] if each["name"] == args.child)
    settings = FinetuneSettings(**document["settings"] | variant["settings"] | json.loads(args.settings))
    tokens = torch.load(args.work / "tokens.pt")
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to("cuda" if cuda else "cpu").eval()
    train, config = tokens["train"].view(-1, settings.sequence_length), None
    if "calibrate" in variant:
        rule = variant["calibrate"] | {"sequence_length": settings.sequence_length, "progress": False}
        config = cats_ext.calibrate(model, train, **rule)
    measure = Measure(args.work / f"{args.child}.jsonl", args.at, tokens, load_tasks(args), args.batch_tokens)
    callbacks: list[Any] = [measure]
    if variant.get("learn_thresholds"):
        callbacks.insert(0, LearnThresholds(config.bytes_share, **variant["learn_thresholds"]))
    found = finetune(
        model,
        train,
        args.work / args.child,
        settings,
        config=config,
        recalibrate=config is not None and not variant.get("learn_thresholds"),
        save_every=settings.steps,
        callbacks=callbacks,
        progress=False,
    )
    memory = torch.cuda.max_memory_reserved() if cuda else 0
    measure.write(
        result={key: found[key] for key in ("before", "after", "recalibrated", "loss")},
        target=None if config is None else config.bytes_share,
        memory=memory,
    )


def parent(args: argparse.Namespace) -> None:
    """Runs the variants side by side and collects what they have measured."""
    started = time.perf_counter()
    document = json.loads(Path(args.variants).read_text())
    names = [each["name"] for each in document["variants"]]
    names = [name for name in names if not args.only or name in args.only]
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    sequence_length = (document["settings"] | json.loads(args.settings)).get("sequence_length", 512)
    counts = prepare_tokens(args, sequence_length)
    print(f"tokens after {time.perf_counter() - started:.1f} s: {counts}", flush=True)
    commit = args.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running: dict[str, subprocess.Popen] = {}
    waiting, seen = list(names), {}
    while waiting or running:
        while waiting and len(running) < args.parallel:
            name = waiting.pop(0)
            log = open(args.out / f"{name.replace(' ', '_')}.log", "w")
            command = [sys.executable, *sys.argv, "--child", name]
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        time.sleep(1)
        new = {path.name: path.stat().st_size for path in args.work.glob("*.jsonl")}
        ended = {name: process.returncode for name, process in running.items() if process.poll() is not None}
        for name, status in ended.items():
            del running[name]
            print(f"{name}: exit status {status} after {time.perf_counter() - started:.1f} s", flush=True)
        if new != seen:
            seen = new
            write_tables(args.work, args.out, names, facts)
        if time.perf_counter() - started > args.seconds:
            for name, process in running.items():
                process.kill()
                print(f"{name}: no time left")
            break
    write_tables(args.work, args.out, names, facts)
    print(f"done after {time.perf_counter() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "requests"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--variants", default=str(Path(__file__).with_name("finetune.json")))
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
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    (child if args.child else parent)(args)


if __name__ == "__main__":
    main()
