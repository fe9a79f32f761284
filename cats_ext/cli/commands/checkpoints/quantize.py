"""``cats quantize``: a model with its weights in packed rows, written to a directory."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import cats_ext
from cats_ext._outputs import cannot_be_written, check_writable
from cats_ext.calibration.settings import CalibrationSettings
from cats_ext.cli import options
from cats_ext.cli.common import (
    escape,
    load_patched,
    note_uncompiled,
    output,
    print_json,
    show_next,
    silence_transformers,
)
from cats_ext.cli.models import check_directory
from cats_ext.cli.text import stream_texts
from cats_ext.data.texts import sample_texts
from cats_ext.quantization import quantized_linears
from cats_ext.quantization.config import SCOPES, QuantizationConfig
from cats_ext.quantization.foreign import method_of

Scope = options.choices("Scope", SCOPES)
DEFAULTS, CALIBRATION = QuantizationConfig(), CalibrationSettings()
_MATRIX = "The same of this matrix alone."


def quantize(
    model: options.Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Directory for the quantised model; made if missing.")],
    weights: Annotated[str, typer.Option(help="int4, int8, fp8, or a format such as int4_g64_zp.")] = DEFAULTS.weights,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128. Without it the largest that fits.")
    ] = None,
    zero_points: Annotated[bool, typer.Option(help="Give each group of int4 a zero point.")] = DEFAULTS.zero_points,
    gate: Annotated[str | None, typer.Option(help=_MATRIX)] = None,
    up: Annotated[str | None, typer.Option(help=_MATRIX)] = None,
    down: Annotated[str | None, typer.Option(help=f"{_MATRIX} Without it int8 with --weights int4.")] = DEFAULTS.down,
    scope: Annotated[Scope, typer.Option(help="all: attention too, and the output layer in int8.")] = DEFAULTS.scope,
    text: options.OptionalTextFiles = None,
    max_tokens: Annotated[int, options.count("Tokens of --text to use at most.")] = CALIBRATION.max_tokens,
    sequence_length: options.Window = CALIBRATION.sequence_length,
    seed: Annotated[int, options.seed("Chooses the windows where there are more than needed.")] = CALIBRATION.seed,
    device: options.Device = None,
    dtype: Annotated[options.Precision | None, typer.Option(help="Of what stays dense; without it as it is.")] = None,
    json: options.Json = False,
) -> None:
    """Round a model's weights to int4, int8 or fp8, and write it.

    With --text, errors of rounding are compensated by what each layer gets on that text
    (GPTQ). The directory is a model like any other: calibrate it, since thresholds
    depend on the weights. Thresholds that a model was saved with stay as they are.

    A directory that AWQ, GPTQ, compressed-tensors or torchao quantised keeps its weights, but for the
    down projection: --down, --group-size and --zero-points say how that is rounded again
    (without --down in int8 where int4 would lose too much).

    Examples:

    $ cats quantize smollm2-135m -o quantised

    $ cats quantize ./mistral-7b --text notes.txt --down int4 --scope all -o quantised

    $ cats quantize ./mistral-7b-awq -o quantised
    """
    config = QuantizationConfig(weights, group_size, zero_points, gate, up, down, scope.value)
    check_writable("--output", out, directory=True)
    where = options.pick_device(device)
    errors: dict[str, float] = {}
    if method := method_of(model):
        chosen = QuantizationConfig(group_size=group_size, zero_points=zero_points, down=down)
        if config != chosen or text is not None:
            raise ValueError(
                f"--weights, --gate, --up, --scope and --text must be left out for '{model}', "
                f"which {method} has quantised"
            )
        network, tokenizer, before, errors = _convert(model, chosen, where, options.torch_dtype(dtype, "auto"))
        done: dict[str, Any] = {"method": method}
    else:
        texts = None if text is None else sample_texts(stream_texts(text), max_tokens, sequence_length, seed)
        network, tokenizer, _ = load_patched(model, where, dtype, None, default="auto")
        before = _bytes(network)
        run = {"max_tokens": max_tokens, "sequence_length": sequence_length, "seed": seed}
        cats_ext.quantize(network, **asdict(config), data=texts, tokenizer=tokenizer, **run)
        done = config.to_dict()
    try:
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise cannot_be_written("--output", out, error) from error
    linears = quantized_linears(network)
    downs = {name: error for name, error in errors.items() if linears[name].input_rows}
    kept = {name: error for name, error in errors.items() if name not in downs}
    if errors:
        done |= {"down_errors": downs, "kept_errors": kept}
    formats = sorted({linear.row_format.name for linear in linears.values()})
    if json:
        sizes = {"layers": len(linears), "formats": formats, "bytes_before": before, "bytes": _bytes(network)}
        print_json({"directory": str(out), **done, **sizes})
        return
    console = output(json)
    console.print(
        f"{len(linears)} layers in {', '.join(formats)}; all weights take {_bytes(network) / 1e6:,.0f} MB of "
        f"{before / 1e6:,.0f} before."
    )
    if downs:
        counts = Counter(linears[name].row_format.name for name in downs)
        kinds = ", ".join(f"{count} in {name}" for name, count in counts.items())
        worst = max(downs, key=downs.__getitem__)
        rest = (
            f", but for float16 scales and zero points: relative error up to {max(kept.values()):.4f}" if kept else ""
        )
        console.print(
            f"Down projections were rounded again, {kinds}: relative error {min(downs.values()):.4f} to "
            f"{downs[worst]:.4f} ({worst}). All other layers compute with the weights of the file{rest}.",
            soft_wrap=True,
        )
    show_next(console, f"The model is in [bold]{escape(str(out))}[/].", [f"calibrate {out} --text FILE -o thresholds"])


def _convert(
    directory: str, down: QuantizationConfig, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, Any, int, dict[str, float]]:
    """The converted model, its tokenizer, the size of its files, and the errors of its layers."""
    from transformers import AutoTokenizer

    note_uncompiled(device)
    silence_transformers()
    check_directory(Path(directory))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    formats = {"down": down.down, "group_size": down.group_size, "zero_points": down.zero_points}
    network, errors = cats_ext.convert_quantized(directory, **formats, dtype=dtype, device=device)
    return network, tokenizer, sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")), errors


def _bytes(network: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
