"""Perplexity of one model with its MLPs in packed rows of several formats, dense and with CATS.

    python bench quality.quantized --model DIR --data ../shared/data --output bench/results/quality/quantized.csv

Every variant starts from the model in DIR, in float32. Thresholds are calibrated on the quantised model, by the plain
rule, on text that is half WikiText-2's validation part and half the end of the C4 sample; so are the errors of rounding
compensated where a variant says so. Perplexity is measured on the beginning of C4. Rows are written as they are known.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.texts import load_texts, token_ids
from cats_ext.evaluation.comparison import perplexity
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.quantization import quantized_linears

# Arguments of cats_ext.quantize by name, data=True for the calibration text; None is the model as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "as it is": None,
    "int8": dict(weights="int8"),
    "fp8": dict(weights="fp8"),
    "int4, zero points, compensated": dict(weights="int4", zero_points=True, data=True),
    "int4, compensated": dict(weights="int4", zero_points=False, data=True),
    "int4, zero points, down int8, compensated": dict(weights="int4", zero_points=True, down="int8", data=True),
    "int4": dict(weights="int4", zero_points=False),
    "int4, zero points": dict(weights="int4", zero_points=True),
    "int4, down int8": dict(weights="int4", zero_points=False, down="int8"),
    "int4, zero points, down int8": dict(weights="int4", zero_points=True, down="int8"),
    "int4, zero points, up and down int8": dict(weights="int8", gate="int4", zero_points=True),
    "int4, zero points, gate int8": dict(weights="int4", zero_points=True, gate="int8"),
}


def mlp_bytes(model: nn.Module) -> int:
    """Bytes of the MLPs' weights; of dense ones as if they were in 16 bits."""
    linears = quantized_linears(model)
    if linears:
        return sum(linear.weight.numel() for name, linear in linears.items() if ".mlp." in name)
    return sum(3 * 2 * mlp.hidden_size * mlp.intermediate_size for mlp in find_gated_mlps(model))


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6, help="of C4, for the perplexity")
    parser.add_argument("--calibration", type=int, default=8, help="windows that thresholds are set on")
    parser.add_argument("--group-size", type=int, help="by default the largest that divides the rows")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = machine.default_device()
    tokenizer, texts = AutoTokenizer.from_pretrained(args.model), load_texts(args.data)
    results = ResultFile(args.output, machine.facts(device, args.commit), append=True, digits=6)

    def windows(text: str, count: int) -> Tensor:
        return token_ids(tokenizer, texts[text], count * args.window)

    half = args.calibration // 2
    calibration = torch.cat([windows("wikitext_valid", half), windows("c4_end", args.calibration - half)])
    calibration = calibration.view(-1, args.window)
    run = {"sequence_length": args.window, "progress": False}

    for name in args.variants:
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
        if VARIANTS[name] is not None:
            arguments = dict(VARIANTS[name])
            data = calibration if arguments.pop("data", False) else None
            cats_ext.quantize(model, group_size=args.group_size, data=data, **arguments, **run)
        seconds = time.perf_counter() - started
        formats = {linear.row_format.name for linear in quantized_linears(model).values()}
        c4, options = windows("c4", args.windows), {"window": args.window, "progress": False}
        row = {"model": Path(args.model).name, "name": name, "formats": " ".join(sorted(formats))}
        row |= {"mlp_bytes": mlp_bytes(model), "tokens": len(c4), "ppl": perplexity(model, c4, **options).ppl}
        config = cats_ext.calibrate(model, calibration, sparsity=args.sparsity, rule="plain", **run)
        cats_ext.apply_cats(model, config)
        row |= {"sparsity": args.sparsity, "cats_ppl": perplexity(model, c4, **options).ppl, "seconds": seconds}
        results.add(row)
        print(f"{name}: {row['ppl']:.2f} dense, {row['cats_ppl']:.2f} with CATS", flush=True)


if __name__ == "__main__":
    main()
