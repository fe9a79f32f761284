"""What training.compare measures while a model is tuned, and the tables that come of it."""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import cats_ext
from bench.lib.results import ResultFile
from bench.quality.task_scores import answers
from bench.quality.texts import load_requests, load_texts, token_ids
from cats_ext.evaluation.comparison import perplexity
from cats_ext.evaluation.significance import mean_accuracy, paired_accuracy
from cats_ext.patching.apply import sparse_mlps

WINDOW, _BATCH = 1024, 4  # of perplexity


def prepare_tokens(args: argparse.Namespace, sequence_length: int) -> dict[str, Tensor]:
    """What is measured on, and what is trained on, which is behind it."""
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(args.model), load_texts(args.data)
    c4, held_out = token_ids(tokenizer, texts["c4"]), args.c4_windows * WINDOW
    train = c4[held_out:][: args.train_tokens]
    return {
        "c4": c4[:held_out],
        "wikitext": token_ids(tokenizer, texts["wikitext"], args.wikitext_windows * WINDOW),
        "train": train[: len(train) // sequence_length * sequence_length],
    }


def load_tasks(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The eight tasks; LAMBADA is not one of them."""
    return {name: items for name, items in load_requests(args.requests, args.items).items() if name != "lambada"}


class Measure(TrainerCallback):
    """Appends a line to ``path`` at each step of ``at``: perplexities, sparsity by layer, answers."""

    def __init__(
        self, path: Path, at: list[int], tokens: dict[str, Tensor], tasks: dict[str, list], batch_tokens: int
    ) -> None:
        self.path, self.at, self.tokens, self.tasks, self.batch_tokens = path, at, tokens, tasks, batch_tokens
        self.started = time.perf_counter()

    def write(self, **row: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row | {"seconds": time.perf_counter() - self.started}) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if 0 in self.at:
            self.measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if state.global_step in self.at:
            self.measure(model, state.global_step)

    def measure(self, model: nn.Module, step: int) -> None:
        """Of a copy as it would be saved, with merged adapters; perplexity in float32, tasks in bfloat16 on a GPU."""
        began = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # there are other processes
        merged = copy.deepcopy(model).merge_and_unload().eval()
        layers, row = None, {}
        patched = bool(sparse_mlps(merged))
        if patched:
            cats_ext.reset_sparsity(merged)
        for text in ("c4", "wikitext"):
            with cats_ext.track_sparsity(merged) if patched and text == "c4" else nullcontext():
                row[text] = perplexity(merged, self.tokens[text], window=WINDOW, batch_size=_BATCH, progress=False).ppl
        if patched:
            report = cats_ext.sparsity_report(merged)
            layers = [
                [layer.up_sparsity, layer.up_target, layer.down_sparsity, layer.down_target] for layer in report.layers
            ]
            row |= {"up": report.up_sparsity, "down": report.down_sparsity, "bytes": report.bytes_share}
        half = time.perf_counter()
        if torch.cuda.is_available():
            merged.lm_head.weight = nn.Parameter(merged.lm_head.weight.detach().clone())  # untied, it stays in float32
            for weight in merged.model.parameters():  # not the buffers, which have the rotary frequencies
                weight.data = weight.data.bfloat16()
        found = answers(merged, self.tasks, self.batch_tokens)
        del merged
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # there are other processes
        right = {name: "".join("01"[value] for value in values) for name, values in found.items()}
        took = [half - began, time.perf_counter() - half]
        self.write(step=step, **row, layers=layers, answers=right, took=took)
        share = sum(sum(values) / len(values) for values in found.values()) / len(found)
        print(f"step {step}: {row} eight tasks {share:.4f}, measured in {took}", flush=True)


def write_tables(work: Path, out: Path, names: list[str], facts: dict[str, Any]) -> None:
    """quality.csv (a row a step and task), layers.csv and tuned.csv (before, after, recalibrated) from the lines."""
    lines = {name: _lines(work / f"{name}.jsonl") for name in names}
    dense = {row["step"]: row["answers"] for row in lines.get("dense", []) if "step" in row}
    quality, layers, tuned = [], [], []
    for name, rows in lines.items():
        for row in rows:
            if "result" in row:
                tuned += _tuned(name, row)
                continue
            measured = {"name": name, "step": row["step"], "c4_ppl": row["c4"], "wikitext_ppl": row["wikitext"]}
            measured |= {"bytes": row.get("bytes"), "up": row.get("up"), "down": row.get("down")}
            other = dense.get(row["step"], row["answers"])
            found = {task: paired_accuracy(task, _bits(other[task]), _bits(row["answers"][task])) for task in other}
            for task in (mean_accuracy(found), *found.values()):
                quality.append(
                    measured
                    | {"task": task.task, "items": task.items, "accuracy": task.sparse, "accuracy_se": task.sparse_se}
                    | {"from_dense": task.difference, "from_dense_se": task.difference_se}
                )
            for index, layer in enumerate(row["layers"] or ()):
                keys = ("up", "up_target", "down", "down_target")
                layers.append({"name": name, "step": row["step"], "layer": index} | dict(zip(keys, layer, strict=True)))
    for table, rows in (("quality", quality), ("layers", layers), ("tuned", tuned)):
        if rows:
            ResultFile(out / f"{table}.csv", facts, digits=6).add(*rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _bits(text: str) -> list[bool]:
    return [digit == "1" for digit in text]


def _tuned(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    rows, losses = [], [loss for _, loss in row["result"]["loss"]]
    for when in ("before", "after", "recalibrated"):
        found = row["result"][when]
        if found is None:
            continue
        sparsity = found["sparsity"] or {}
        rows.append(
            {"name": name, "when": when, "held_out_ppl": found["ppl"]}
            | {key: sparsity.get(key) for key in ("up_sparsity", "down_sparsity", "bytes_share", "drift")}
            | {
                "loss_first_20": mean(losses[:20]),
                "loss_last_20": mean(losses[-20:]),
            }
            | {"seconds": row["seconds"], "reserved_gb": row["memory"] / 1e9}
        )
    return rows
