"""The package's own rules at equal bytes of the MLPs, on one model: text and tasks with the thresholds of calibrate.

    python bench quality.compare_inputs --model DIR_OR_GGUF --data ../shared/data --output inputs.json.gz
    python bench quality.package --model DIR_OR_GGUF --name NAME --inputs inputs.json.gz --output bench/results/quality

Each rule is calibrated once, on the calibration windows of the inputs; thresholds of every sparsity follow from that.
All is in float32, with TF32 products on CUDA. ``package_NAME_text.csv`` has the shares read, counted on the reported
windows (c4), the divergence from the dense model there and on those for development (dev), and the calibration's
seconds. ``package_NAME_tasks.csv`` has the tasks, items of even index reported.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.compare_model import add_tasks, divergence_of, last_states
from bench.quality.task_scores import answers

_TEXTS = ("c4", "dev")


def main() -> None:
    parser = command(__spec__, __doc__, output="directory", required=True)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--name", required=True, help="of the model, in the rows")
    parser.add_argument("--inputs", type=Path, required=True, help="of quality.compare_inputs")
    parser.add_argument("--rules", nargs="+", default=["two_threshold", "three_threshold"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[2 / 3, 0.55], help="shares of the MLPs' bytes")
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
        row, labels = {"model": args.name} | variant, {"model": args.name, "variant": variant["variant"]}
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

    measure({"variant": "dense", "rule": "", "budget": 1.0, "calibration_s": 0.0})
    for rule in args.rules:
        began = time.perf_counter()
        config = cats_ext.calibrate(model, texts["calibration"].cpu(), rule=rule, progress=False)
        seconds = time.perf_counter() - began
        for budget in args.budgets:
            cats_ext.apply_cats(model, config.at_sparsity(1.5 * (1 - budget)))
            variant = f"{rule} {budget:.3g}"
            measure({"variant": variant, "rule": rule, "budget": budget, "calibration_s": seconds})
            cats_ext.remove_cats(model)


if __name__ == "__main__":
    main()
