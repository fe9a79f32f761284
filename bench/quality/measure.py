"""What the package's own calibration loses on one model: text, tasks, generation, prompts.

    python bench quality.task_requests --tokenizer DIR --data ../shared/data --output requests.json.gz
    python bench quality.measure --model DIR --data ../shared/data --requests requests.json.gz --variants \
        bench/quality/variants.json --output bench/results/quality

Thresholds come from cats_ext.calibrate, masks from apply_cats. Text is measured in float32 without TF32; tasks and
generation, of which only the order of scores counts, in float32 with TF32 products. A row is written as soon as it is
known. The variants file lists dictionaries: name, arguments of calibrate (or relufication), what to measure; the
dense model comes first. Several processes, each with some rules or measures, make parts that quality.merge joins.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.task_scores import answers
from bench.quality.texts import load_requests, load_texts, token_ids
from cats_ext.decode.cache import cache_argument
from cats_ext.evaluation.comparison import compare
from cats_ext.evaluation.plots import linear_bins
from cats_ext.evaluation.significance import mean_accuracy, paired_accuracy
from cats_ext.patching.apply import sparse_mlps
from cats_ext.thresholds.files import write_together

MEASURES = ("text", "tasks", "generation", "prefill", "activations")


def rule_of(name: str) -> str:
    """The variant's name without its sparsity: points of one rule make a curve."""
    return name.rsplit(" ", 1)[0]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.args, self.device = args, machine.default_device()
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.texts, self.requests = load_texts(args.data), load_requests(args.requests, args.items)
        self.dense_answers = self.dense_text = None
        self.configs: dict[str, cats_ext.CatsConfig] = {}
        run = machine.facts(self.device, args.commit)
        names = ("calibration", "layers", *MEASURES)
        self.tables = {name: ResultFile(args.output / f"{name}.csv", run, digits=6) for name in names}

    def windows(self, text: str, count: int) -> Tensor:
        return token_ids(self.tokenizer, self.texts[text], count * self.args.window)

    # --- variants ----------------------------------------------------------------------------------------------------

    def config(self, name: str, calibrate: dict[str, Any]) -> cats_ext.CatsConfig:
        """Calibrated once for each rule; other sparsities and budgets follow from the stored counts."""
        arguments = dict(calibrate)
        target = {key: arguments.pop(key) for key in ("sparsity", "budget", "down_sparsity") if key in arguments}
        sparsity = 1.5 * (1 - target["budget"]) if "budget" in target else target["sparsity"]
        arguments["allocation"] = "search" if "budget" in target else "uniform"
        key = json.dumps(arguments, sort_keys=True)
        kept = Path(self.args.kept or "") / hashlib.sha256(key.encode()).hexdigest()[:16]
        if key not in self.configs and self.args.kept and kept.exists():
            self.configs[key] = cats_ext.CatsConfig.from_pretrained(kept)
        if key not in self.configs:
            texts = arguments.pop("texts", ["wikitext_valid"])
            count = arguments.pop("windows", self.args.windows)
            parts = [self.windows(text, count // len(texts)) for text in texts]
            windows, started = torch.cat(parts).view(-1, self.args.window), (time.perf_counter(), time.process_time())
            arguments |= {"sparsity": sparsity, "sequence_length": self.args.window}
            found = cats_ext.calibrate(self.model, windows, progress=False, **arguments)
            seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
            row = {"name": name, "rule": found.rule, "tokens": found.calibration["tokens"], "seconds": seconds}
            row |= {"cpu_seconds": cpu_seconds, "threads": torch.get_num_threads()}
            kl_by_allocation = found.calibration.get("search", {})
            self.tables["calibration"].add(row | kl_by_allocation)
            print(f"  calibrated in {seconds:.1f} s: {kl_by_allocation}")
            self.configs[key] = found
            if self.args.kept:
                found.save_pretrained(kept.with_suffix(f".{os.getpid()}"))
                with contextlib.suppress(OSError):  # another process was first
                    kept.with_suffix(f".{os.getpid()}").rename(kept)
        return self.configs[key].at_sparsity(sparsity, down_sparsity=target.get("down_sparsity"))

    def run(self, variant: dict[str, Any]) -> None:
        name, started = variant["name"], time.perf_counter()
        what = [kind for kind in variant.get("measure", ["text"]) if kind in self.args.measure]
        config = None
        if "calibrate" in variant:
            config = self.config(name, variant["calibrate"])
            cats_ext.apply_cats(self.model, config, sparse_prefill=variant.get("sparse_prefill"))
        elif variant.get("relufication"):
            cats_ext.apply_relufication(self.model)
        facts = {"name": name, "sparsity": config.sparsity if config else "", "rule": config.rule if config else ""}
        if "activations" in what:
            self.activations(facts, config)
        try:
            if "text" in what:
                self.text(facts, config, variant.get("texts", ["wikitext", "c4"]))
            self.tf32(True)
            if "tasks" in what:
                self.tasks(facts)
            if "generation" in what:
                self.generation(facts)
            self.tf32(False)
            if "prefill" in what:
                self.prefill(facts)
        finally:
            self.tf32(False)
            if sparse_mlps(self.model):
                cats_ext.remove_cats(self.model)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)

    @staticmethod
    def tf32(wanted: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted

    def activations(self, facts: dict[str, Any], config: cats_ext.CatsConfig) -> None:
        """Figure 1: |act(gate)| of the first, the middle and the last layer, with their thresholds."""
        names = list(config.layers)
        for index in (0, len(names) // 2, len(names) - 1):
            gate, threshold = config.statistics[names[index]].gate, float(config.thresholds[names[index]])
            edges, shares = linear_bins(gate, gate.quantile(0.96), 80)
            for low, share in zip(edges[:-1].tolist(), shares.tolist(), strict=True):
                row = {"layer": index, "threshold": threshold, "low": low, "share": share}
                self.tables["activations"].add(facts | row)

    # --- measurements ------------------------------------------------------------------------------------------------

    def text(self, facts: dict[str, Any], config: cats_ext.CatsConfig | None, texts: list[str]) -> None:
        for text in texts:
            count = {"wikitext": self.args.windows, "c4": self.args.c4_windows}[text]
            cats_ext.reset_sparsity(self.model)
            with cats_ext.track_sparsity(self.model):
                found = compare(self.model, self.windows(text, count), window=self.args.window, progress=False)
            report = cats_ext.sparsity_report(self.model)
            row = dict(
                text=text,
                tokens=found.sparse.tokens,
                dense_ppl=found.dense.ppl,
                ppl=found.sparse.ppl,
                nll_increase=found.nll_increase,
                nll_increase_se=found.nll_increase_se,
                kl=found.kl,
                kl_se=found.kl_se,
                top1=found.top1,
                up_target=config.layers[report.layers[0].name].up_sparsity if config and not config.losses else "",
                bytes_target=config.bytes_share if config else "",
                up=report.up_sparsity,
                down=report.down_sparsity,
                bytes=report.bytes_share,
            )
            self.tables["text"].add(facts | row)
            print("  ", text, f"{found.dense.ppl:.3f} -> {found.sparse.ppl:.3f} kl {found.kl:.4f}", end=" ")
            print(f"bytes {report.bytes_share:.4f}")
            for index, layer in enumerate(report.layers):
                row = {"text": text, "layer": index, "up": layer.up_sparsity, "up_target": layer.up_target}
                row |= {"down": layer.down_sparsity, "down_target": layer.down_target}
                self.tables["layers"].add(facts | row)

    def tasks(self, facts: dict[str, Any]) -> None:
        if self.dense_answers is None:  # the first variant is the dense model
            kept = Path(self.args.kept or "") / "dense.json"
            if self.args.kept and kept.exists():
                self.dense_answers = json.loads(kept.read_text())
            else:
                self.dense_answers = answers(self.model, self.requests, self.args.batch_tokens)
            if self.args.kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_together({kept: json.dumps(self.dense_answers).encode()})
            sparse = self.dense_answers
        else:
            sparse = answers(self.model, self.requests, self.args.batch_tokens)
        found = {name: paired_accuracy(name, self.dense_answers[name], sparse[name]) for name in sparse}
        mean = mean_accuracy({name: task for name, task in found.items() if name != "lambada"})
        for task in (*found.values(), mean):
            self.tables["tasks"].add(facts | task.to_dict())
        print(f"   mean {mean.sparse:.4f} ({mean.difference:+.4f} ± {mean.difference_se:.4f})", end=" ")
        print({name: round(task.sparse, 3) for name, task in found.items()})

    @torch.no_grad()
    def generation(self, facts: dict[str, Any]) -> None:
        """Greedy continuations of 64-token prompts beside the dense model's: how long they agree."""
        length, prompts = self.args.new_tokens, self.windows("c4", self.args.c4_windows)
        prompts = prompts[: len(prompts) // 1024 * 1024].view(-1, 64)[:: max(1, len(prompts) // 64 // 64)][:64]
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        ids = prompts.to(self.device)
        new = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 64:].cpu()
        if self.dense_text is None:
            self.dense_text = new
        same = new == self.dense_text
        prefix = same.long().cumprod(1).sum(1).double()
        grams = [self.repeated(row.tolist()) for row in new]
        row = dict(
            prompts=len(prompts),
            new_tokens=length,
            agreed_prefix_mean=float(prefix.mean()),
            agreed_prefix_median=float(prefix.median()),
            first_16_identical=float((prefix >= 16).double().mean()),
            all_identical=float((prefix >= length).double().mean()),
            repeated_4grams=sum(grams) / len(grams),
        )
        self.tables["generation"].add(facts | row)
        print(f"   generation: {prefix.mean():.1f} of {length} tokens agree, {sum(grams) / len(grams):.3f} repeated")

    @staticmethod
    def repeated(ids: list[int]) -> float:
        """Share of 4-grams that occurred before in the same text."""
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        return 1 - len(set(grams)) / len(grams)

    @torch.no_grad()
    def prefill(self, facts: dict[str, Any]) -> None:
        """Perplexity of the sparse model on each window's second half, behind a first half read sparse or dense."""
        half, name = self.args.window // 2, cache_argument(self.model)
        rows = self.windows("wikitext", self.args.windows).view(-1, 2 * half).to(self.device)
        for prompt in ("sparse", "dense"):
            total = 0.0
            for ids in rows:
                if prompt == "dense":
                    with cats_ext.masking_disabled(self.model):
                        out = self.model(input_ids=ids[None, :half], use_cache=True)
                else:
                    out = self.model(input_ids=ids[None, :half], use_cache=True)
                cache = {name: getattr(out, name)}
                logits = self.model(input_ids=ids[None, half:], **cache).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits.float(), ids[half + 1 :]))
            ppl = float(torch.tensor(total / len(rows)).exp())
            self.tables["prefill"].add(facts | {"prompt": prompt, "tokens": len(rows) * (half - 1), "ppl": ppl})
            print(f"   {prompt} prompt: {ppl:.3f}")


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", required=True)
    for name in ("data", "requests", "variants"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--c4-windows", type=int, default=48)
    parser.add_argument("--items", type=int, help="of each task at most")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--measure", nargs="+", default=MEASURES, choices=MEASURES)
    parser.add_argument("--rules", nargs="+", help="only these (names without sparsity), and the dense model")
    parser.add_argument("--kept", help="directory of calibrations and dense answers that processes share")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no variant after so long")
    args = parser.parse_args()
    started = time.perf_counter()
    bench = Bench(args)
    print(f"loaded after {time.perf_counter() - started:.1f} s", flush=True)
    variants = json.loads(args.variants.read_text())
    if variants[0]["name"] != "dense":
        raise SystemExit(f"the first variant must be the dense model, which others are compared with: {args.variants}")
    for variant in variants:
        wanted = not args.rules or rule_of(variant["name"]) in ("dense", *args.rules)
        if not wanted or not set(args.measure) & set(variant["measure"]):
            continue
        if time.perf_counter() - started > args.seconds:
            print(f"no time for {variant['name']}")
            continue
        bench.run(variant)
    print(f"done after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
