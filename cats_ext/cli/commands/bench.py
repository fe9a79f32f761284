"""``cats bench``: the op and whole models against dense ones on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

import cats_ext
from cats_ext.cli import model_benchmark, options
from cats_ext.cli import op_benchmark as benchmark
from cats_ext.cli.common import escape, load, note_uncompiled, notes, output, print_json, result_table, status
from cats_ext.cli.text import CALIBRATION_MODULES, docstrings
from cats_ext.thresholds.rules import check_sparsity

TRIAL_TOKENS = 2048  # of calibration where no thresholds are given


def bench(
    shape: Annotated[
        str | None, typer.Option(help=f"HxI, or one of {', '.join(benchmark.SHAPES)}; without it mistral-7b.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead: a whole model. Directory, hub name or file.")] = None,
    cats: options.CatsDirectory = None,
    sparsity: Annotated[str, typer.Option(help="Shares of neurons to skip, comma-separated.")] = "0,0.5,0.7,0.9",
    tokens: Annotated[int | None, options.count("Tokens in one call, 1; with --model tokens to generate, 64.")] = None,
    dtype: options.DType = None,
    device: options.Device = None,
    passes: Annotated[
        int | None, options.count("Passes over all layers, 20, or rounds of a model, 3; the median counts.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Time the sparse op against the dense PyTorch MLP on this machine, or a whole model against itself.

    Both alternate over layers of distinct random weights that fit into no cache;
    on a GPU inside a CUDA graph, timed by device events. Each time is compared with
    the bytes that had to be read and the read rate of this machine, measured in the
    same run.

    With --model, tokens a second of the dense and the sparse model in every mode
    of generation that applies, and which of them to use.

    Examples:

    $ cats bench

    $ cats bench --shape llama-2-7b --dtype bfloat16 --sparsity 0.5,0.7

    $ cats bench --model ./my-model --cats thresholds --sparsity 0.5
    """
    if model is not None:
        if shape is not None:
            raise ValueError(f"give --shape or --model, not both, got {shape} and {model}")
        _bench_model(model, cats, sparsity, tokens or 64, dtype, device, passes or 3, json)
        return
    if cats is not None:
        raise ValueError(f"--cats is for --model, got '{cats}' without it")
    shape, tokens, passes = shape or "mistral-7b", tokens or 1, passes or 20
    hidden, intermediate = benchmark.parse_shape(shape)
    sparsities = options.numbers("--sparsity", sparsity)
    where = options.pick_device(device)
    note_uncompiled(where)
    default = torch.float32 if where.type == "cpu" else torch.bfloat16
    with status("Timing ...") as report:
        result = benchmark.run(
            hidden,
            intermediate,
            sparsities=sparsities,
            tokens=tokens,
            dtype=options.torch_dtype(dtype, default),
            device=where,
            passes=passes,
            report=report,
        )
    if json:
        print_json(asdict(result))
        return
    console = output(json)
    threads = f", {result.threads} thread{'s' * (result.threads != 1)}" if result.threads else ""
    console.print(
        f"{escape(shape)}: H {hidden}, I {intermediate}, {tokens} token{'s' * (tokens > 1)}, {result.dtype}, "
        f"{result.device}{threads}; {result.layers} layers, median of {result.passes} passes"
    )
    table = result_table(
        ("", "skipped", "us/layer", "MB read", "GB/s", "of limit", "speed-up"),
        caption=f"limit: a plain read of memory in the same run, {result.read_limit_gb_per_s:,.1f} GB/s",
    )
    for row in result.rows:
        table.add_row(
            row.variant,
            f"{row.sparsity:.1%}",
            f"{row.microseconds:,.1f}",
            f"{row.bytes_read / 1e6:,.1f}",
            f"{row.gb_per_s:,.1f}",
            f"{row.share_of_read_limit:.0%}",
            f"{row.speedup:.2f}x",
        )
    console.print(table)


def _bench_model(
    model: str,
    cats: Path | None,
    sparsity: str,
    tokens: int,
    dtype: options.Precision | None,
    device: str | None,
    rounds: int,
    json: bool,
) -> None:
    sparsities = sorted({value for value in options.numbers("--sparsity", sparsity) if value})
    if not sparsities:
        raise ValueError(f"--sparsity must have a number above 0 with --model, got '{sparsity}'")
    for value in sparsities:
        check_sparsity("--sparsity", value)
    network, tokenizer, config = load(model, options.pick_device(device), dtype, cats)
    source = str(cats or model)
    if config is None:
        source = f"{TRIAL_TOKENS:,} tokens of Python's documentation, by the plain rule: for timing only"
        notes.print(f"[dim]No thresholds given: from {source}[/]", soft_wrap=True)
        text, settings = docstrings(CALIBRATION_MODULES), {"rule": "plain", "sparsity": 0.5, "progress": False}
        config = cats_ext.calibrate(network, text, tokenizer=tokenizer, max_tokens=TRIAL_TOKENS, **settings)
    with status("Timing ...") as report:
        found = model_benchmark.measure(
            network, tokenizer, config, sparsities, new_tokens=max(2, tokens), rounds=rounds, report=report
        )
    share_read = {value: config.at_sparsity(value).bytes_share for value in sparsities}
    sentence = model_benchmark.advice(found, share_read.__getitem__)
    if json:
        rates = {mode.name: {str(value): rate for value, rate in mode.rates.items()} for mode in found}
        facts = {"model": model, "device": str(network.device), "dtype": str(network.dtype).removeprefix("torch.")}
        print_json(facts | {"thresholds": source, "tokens_per_second": rates, "advice": sentence})
        return
    console = output(json)
    table = result_table(
        ("tokens a second", "dense", *(f"{value:.0%} skipped" for value in sparsities)),
        caption=f"median of {rounds} rounds of {tokens} tokens; in brackets, against the fastest dense mode",
    )
    fastest = max(mode.rates[0.0] for mode in found)
    for mode in found:
        cells = (f"{rate:,.1f} ({rate / fastest:.2f}x)" for rate in mode.rates.values())
        table.add_row(mode.name, *cells)
    console.print(table)
    console.print(sentence, soft_wrap=True)
