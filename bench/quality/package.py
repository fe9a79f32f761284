"""The package's own rules at equal bytes of the MLPs, on one model: text and tasks with the thresholds of calibrate.

    python bench quality.compare_inputs --model DIR_OR_GGUF --data ../shared/data --output inputs.json.gz
    python bench quality.package --model DIR_OR_GGUF --name NAME --inputs inputs.json.gz --output bench/results/quality

Each rule is calibrated on several draws of text, since thresholds depend on it; those of every sparsity follow from one
calibration. All is in float32, with TF32 products on CUDA. ``package_NAME_text.csv`` has the shares read, counted on
the reported windows (c4), the divergence from the dense model there and on those for development (dev), and the
calibration's seconds. ``package_NAME_tasks.csv`` has the tasks, items of even index reported, for each draw and for the
mean of all draws, whose standard error is that of the items' means.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.compare_inputs import DRAWS
from bench.quality.compare_model import ALONE, add_tasks, divergence_of, last_states
from bench.quality.task_scores import answers

_TEXTS = ("c4", "dev")


def mean_of_draws(dense: dict[str, list[bool]], draws: list[dict[str, list[bool]]]) -> list[dict[str, object]]:
    """Rows of each task and of the mean of eight, for items of odd (dev) and of even index (reported).

    An item's accuracy is the share of draws that answered it right.
    """
    rows = []
    for half, start in (("dev", 1), ("reported", 0)):
        tasks = {}
        for task, right in dense.items():
            right = right[start::2]
            share = [statistics.fmean(found) for found in zip(*(d[task][start::2] for d in draws), strict=True)]
            change = [found - before for found, before in zip(share, right, strict=True)]
            tasks[task] = {
                "items": len(right),
                "dense": statistics.fmean(right),
                "sparse": statistics.fmean(share),
                "difference": statistics.fmean(change),
                "difference_se": statistics.stdev(change) / math.sqrt(len(change)),
            }
        eight = [row for task, row in tasks.items() if task not in ALONE]
        mean = {key: statistics.fmean(row[key] for row in eight) for key in ("dense", "sparse", "difference")}
        mean["items"] = sum(row["items"] for row in eight)
        mean["difference_se"] = math.hypot(*(row["difference_se"] for row in eight)) / len(eight)
        rows += [{"half": half, "task": task} | row for task, row in ({"mean": mean} | tasks).items()]
    return rows


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--inputs", type=Path, required=True, help="of quality.compare_inputs")
    parser.add_argument("--rules", nargs="+", default=["two_threshold", "three_threshold"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[2 / 3, 0.55], help="shares of the MLPs' bytes")
    parser.add_argument("--draws", type=int, choices=range(1, DRAWS + 1), default=1, help="of the text for calibration")
    parser.add_argument("--batch", type=int, default=8, help="windows in a forward pass")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="of tasks")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = machine.default_device()
    gguf = args.model.suffix == ".gguf"
    source, options = (args.model.parent, {"gguf_file": args.model.name}) if gguf else (args.model, {})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).to(device).eval()
    document = json.loads(gzip.decompress(args.inputs.read_bytes()))
    texts = {name: torch.tensor(ids, device=device) for name, ids in document["texts"].items()}
    facts = machine.facts(device, args.commit)
    files = (args.output / f"package_{args.name}_{part}.csv" for part in ("text", "tasks"))
    text_table, task_table = (ResultFile(file, facts, digits=5) for file in files)

    with torch.no_grad():
        dense_states = {name: last_states(model, texts[name], args.batch) for name in _TEXTS}
        dense_answers = answers(model, document["tasks"], args.batch_tokens)

    @torch.no_grad()
    def measure(variant: dict[str, object]) -> None:
        row = {"model": args.name} | variant
        labels = {key: row[key] for key in ("model", "variant", "draw")}
        with cats_ext.track_sparsity(model) if variant["rule"] else torch.no_grad():
            states = last_states(model, texts["c4"], args.batch)
        shares = dict.fromkeys(("gate", "up", "down", "mlp_share"), 1.0)
        if variant["rule"]:
            report = cats_ext.sparsity_report(model)
            shares = {
                "gate": 1 - report.input_sparsity,
                "up": 1 - report.up_sparsity,
                "down": 1 - report.down_sparsity,
                "mlp_share": report.bytes_share,
            }
        divergence, nll, same = divergence_of(model, texts["c4"], dense_states["c4"], states)
        states = last_states(model, texts["dev"], args.batch)
        dev = divergence_of(model, texts["dev"], dense_states["dev"], states)[0]
        row |= shares | {"tokens": texts["c4"].numel(), "c4_kl": divergence, "c4_top1": same, "c4_ppl": math.exp(nll)}
        text_table.add(row | {"dev_kl": dev})
        print({key: value for key, value in text_table.rows[-1].items() if key not in facts}, flush=True)
        found = dense_answers if not variant["rule"] else answers(model, document["tasks"], args.batch_tokens)
        add_tasks(task_table, labels, dense_answers, found)
        found_of[str(variant["variant"])].append(found)

    def add_means() -> None:
        for variant, found in found_of.items():
            labels = {"model": args.name, "variant": variant, "draw": "mean"}
            task_table.add(*(labels | row for row in mean_of_draws(dense_answers, found)))
        found_of.clear()

    found_of: dict[str, list[dict[str, list[bool]]]] = defaultdict(list)
    measure({"variant": "dense", "rule": "", "budget": 1.0, "draw": 0, "calibration_s": 0.0})
    add_means()
    for rule in args.rules:
        for draw in range(args.draws):
            windows = texts[f"calibration_{draw}" if draw else "calibration"].cpu()
            began = time.perf_counter()
            config = cats_ext.calibrate(model, windows, rule=rule, progress=False)
            seconds = time.perf_counter() - began
            for budget in args.budgets:
                cats_ext.apply_cats(model, config.at_sparsity(1.5 * (1 - budget)))
                labels = {"variant": f"{rule} {budget:.3g}", "rule": rule, "budget": budget, "draw": draw}
                measure(labels | {"calibration_s": seconds})
                cats_ext.remove_cats(model)
        add_means()


if __name__ == "__main__":
    main()
