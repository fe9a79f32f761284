"""What a model loses with its MLPs in packed rows of several formats, dense and with CATS, and in the int4 of others.

    python bench quality.quantized --model MODEL --data ../shared/data --output bench/results/quality/quantized.csv

Every variant starts from MODEL, a directory or a .gguf file, in float32. Thresholds are calibrated on the quantised
model, by the plain rule, on text that is half WikiText-2's validation part and half the end of the C4 sample; so are
the errors of rounding compensated where a variant says so. Perplexity, and the KL divergence from the model as it is,
are measured on the beginning of C4. The peers' weights are rounded by their packages (``pip install hqq torchao``), and
measured dense. Rows are written as they are known.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import cats_ext
from bench.lib import machine
from bench.lib.command import command
from bench.lib.results import ResultFile
from bench.quality.quantized_peers import PEERS
from bench.quality.texts import load_texts, token_ids
from cats_ext.cli.models import load_model
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.quantization import quantized_linears
from cats_ext.rows.formats import GROUP_SIZES

# Arguments of cats_ext.quantize by name, data=True for the calibration text; None is the model as it is.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "as it is": None,
    "int8": dict(weights="int8"),
    "fp8": dict(weights="fp8"),
    "int4, zero points": dict(weights="int4", down="int4"),
    "int4": dict(weights="int4", down="int4", zero_points=False),
    "int4, zero points, down int8": dict(weights="int4", down="int8"),
    "int4, down int8": dict(weights="int4", down="int8", zero_points=False),
    "int4, zero points, compensated": dict(weights="int4", down="int4", data=True),
    "int4, compensated": dict(weights="int4", down="int4", zero_points=False, data=True),
    "int4, zero points, down int8, compensated": dict(weights="int4", down="int8", data=True),
    "int4, down int8, compensated": dict(weights="int4", down="int8", zero_points=False, data=True),
    "int4, zero points, up and down int8": dict(weights="int8", gate="int4"),
    "int4, zero points, gate and down int8": dict(weights="int8", up="int4"),
}


def mlp_bytes(model: nn.Module) -> int:
    """Bytes of the MLPs' weights; of dense ones as if they were in 16 bits."""
    linears = quantized_linears(model)
    if linears:
        return sum(linear.weight.numel() for name, linear in linears.items() if ".mlp." in name)
    return sum(3 * 2 * mlp.hidden_size * mlp.intermediate_size for mlp in find_gated_mlps(model))


@torch.no_grad()
def round_as(model: nn.Module, name: str, group_size: int | None) -> tuple[str, int]:
    """Round the MLPs' weights as a peer does. Returns the sizes of groups, and bytes, four of them a group's own."""
    sizes, bytes_of_all = set(), 0
    for mlp in find_gated_mlps(model):
        module = model.get_submodule(mlp.name)
        for child in ("gate_proj", "up_proj", "down_proj"):
            weight = module.get_submodule(child).weight
            size = group_size or next(size for size in reversed(GROUP_SIZES) if weight.shape[1] % size == 0)
            weight.copy_(PEERS[name](weight.data, size))
            sizes.add(f"g{size}")
            bytes_of_all += weight.numel() // 2 + weight.numel() // size * 4
    return " ".join(sorted(sizes)), bytes_of_all


def calibration_windows(tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], count: int, length: int) -> Tensor:
    """``[count, length]`` token ids: WikiText-2's validation part, and as much of the end of the C4 sample."""
    half = count // 2
    parts = {"wikitext_valid": half, "c4_end": count - half}
    return torch.cat([token_ids(tokenizer, texts[name], n * length).view(-1, length) for name, n in parts.items()])


def quantize_as(model: nn.Module, name: str, group_size: int | None, calibration: Tensor) -> str:
    """Quantise the MLPs as a variant says, which may use the calibration text. Returns the formats."""
    if VARIANTS[name] is not None:
        arguments = dict(VARIANTS[name])
        data = calibration if arguments.pop("data", False) else None
        run = {"sequence_length": calibration.shape[1], "progress": False}
        cats_ext.quantize(model, group_size=group_size, data=data, **arguments, **run)
    return " ".join(sorted({linear.row_format.name for linear in quantized_linears(model).values()}))


@torch.inference_mode()
def log_probabilities(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    for ids in windows:
        yield model(input_ids=ids[None].to(model.device)).logits[0].float().log_softmax(-1)


@torch.inference_mode()
def measure(model: nn.Module, windows: Tensor, reference: list[Tensor]) -> tuple[float, float]:
    """Perplexity, and the KL divergence from ``reference``, the log probabilities of another model."""
    loss = divergence = 0.0
    for ids, wanted, found in zip(windows, reference, log_probabilities(model, windows), strict=True):
        loss -= float(found[:-1].gather(1, ids[1:, None].to(found.device)).mean())
        divergence += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return math.exp(loss / len(windows)), divergence / len(windows)


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6, help="of C4, for the perplexity")
    parser.add_argument("--calibration", type=int, default=8, help="windows that thresholds are set on")
    parser.add_argument("--group-size", type=int, help="by default the largest that divides the rows")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dense", action="store_true", help="without thresholds")
    every = [*VARIANTS, *PEERS]
    parser.add_argument("--variants", nargs="+", default=every, choices=every)
    args = parser.parse_args()

    device = machine.default_device()
    original, tokenizer = load_model(args.model, device=device, dtype=torch.float32)
    texts = load_texts(args.data)
    results = ResultFile(args.output, machine.facts(device, args.commit), append=True, digits=6)

    calibration = calibration_windows(tokenizer, texts, args.calibration, args.window)
    c4 = token_ids(tokenizer, texts["c4"], args.windows * args.window).view(-1, args.window)
    reference = list(log_probabilities(original, c4))
    for name in args.variants:
        started = time.perf_counter()
        model = copy.deepcopy(original)
        if name in PEERS:
            formats, size = round_as(model, name, args.group_size)
        else:
            formats = quantize_as(model, name, args.group_size, calibration)
            size = mlp_bytes(model)
        seconds = time.perf_counter() - started
        ppl, kl = measure(model, c4, reference)
        row = {
            "model": Path(args.model).name.removesuffix(".gguf"),
            "name": name,
            "formats": formats,
            "mlp_bytes": size,
        }
        row |= {"tokens": c4.numel(), "ppl": ppl, "kl": kl, "sparsity": args.sparsity, "cats_ppl": "", "cats_kl": ""}
        if name not in PEERS and not args.dense:
            run = {"sequence_length": args.window, "progress": False}
            config = cats_ext.calibrate(model, calibration, sparsity=args.sparsity, rule="plain", **run)
            cats_ext.apply_cats(model, config)
            row["cats_ppl"], row["cats_kl"] = measure(model, c4, reference)
        results.add(row | {"seconds": seconds})
        print(", ".join(f"{key} {value}" for key, value in results.rows[-1].items() if key != "model"), flush=True)


if __name__ == "__main__":
    main()
