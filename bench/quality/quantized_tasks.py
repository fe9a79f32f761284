"""Tasks of a model whose MLPs are in packed rows, dense and with CATS, beside those of the model as it is.

    python bench quality.compare_inputs --model MODEL --data ../shared/data --output inputs.json.gz
    python bench quality.quantized_tasks --model MODEL --data ../shared/data --inputs inputs.json.gz \\
        --output bench/results/quality/quantized_tasks.csv

Weights are rounded, and thresholds set by the plain rule, as in quality.quantized; then the model answers in bfloat16.
Scored are items of even index, the half that quality.compare reports, and every difference is from the model as it is,
dense. ``mean`` is that of the eight multiple-choice tasks. Rows are written as they are known.
"""

from __future__ import annotations

import copy
import gzip
import json
import time
from pathlib import Path

import torch

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.compare_model import ALONE
from bench.quality.quantized import VARIANTS, calibration_windows, quantize_as
from bench.quality.task_scores import answers
from bench.quality.texts import load_texts
from cats_ext.cli.models import load_model
from cats_ext.evaluation.significance import mean_accuracy, paired_accuracy


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--items", type=int, help="of each task at most")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=8, help="windows that thresholds are set on")
    parser.add_argument("--group-size", type=int, help="by default the largest that divides the rows")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    names = ["int8", "int4, zero points, down int8", "int4, zero points"]
    parser.add_argument("--variants", nargs="+", default=names, choices=[name for name in VARIANTS if VARIANTS[name]])
    args = parser.parse_args()

    device = machine.default_device()
    original, tokenizer = load_model(args.model, device=device, dtype=torch.float32)
    calibration = calibration_windows(tokenizer, load_texts(args.data), args.calibration, args.window)
    tasks = json.loads(gzip.decompress(args.inputs.read_bytes()))["tasks"]
    tasks = {name: items[::2][: args.items] for name, items in tasks.items()}
    results = ResultFile(args.output, machine.facts(device, args.commit), append=True, digits=6)
    model_name = Path(args.model).name.removesuffix(".gguf")
    reference: dict[str, list[bool]] = {}

    for name in ("as it is", *args.variants):
        model = copy.deepcopy(original)
        formats = quantize_as(model, name, args.group_size, calibration)
        run = {"sequence_length": args.window, "progress": False}
        config = cats_ext.calibrate(model, calibration, sparsity=args.sparsity, rule="plain", **run)
        model.to(torch.bfloat16)
        for sparsity in (0.0, args.sparsity):
            started = time.perf_counter()
            if sparsity:
                cats_ext.apply_cats(model, config)
            found = answers(model, tasks, args.batch_tokens)
            reference = reference or found
            accuracies = {task: paired_accuracy(task, reference[task], right) for task, right in found.items()}
            mean = mean_accuracy({task: one for task, one in accuracies.items() if task not in ALONE})
            about = {"model": model_name, "name": name, "formats": formats, "sparsity": sparsity}
            results.add(*(about | one.to_dict() for one in (mean, *accuracies.values())))
            differences = {task: f"{one.difference:+.3f}" for task, one in accuracies.items() if task in ALONE}
            seconds = time.perf_counter() - started
            print(
                f"{name}, {sparsity:.0%}: {mean.sparse:.4f} ({mean.difference:+.4f} ± {mean.difference_se:.4f}) "
                f"{differences}, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
