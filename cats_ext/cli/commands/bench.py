"""``cats bench`` and ``cats env``: the op against the dense MLP on this machine, and what this installation is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer

from cats_ext import env as environment
from cats_ext.cli import op_benchmark as benchmark
from cats_ext.cli import options
from cats_ext.cli.common import escape, note_uncompiled, output, print_json, result_table, status


def env(json: options.Json = False) -> None:
    """Versions, devices, and which kernels are compiled in and loaded. Goes into every bug report.

    Examples:

    $ cats env

    $ cats env --json
    """
    report = environment.collect()
    if json:
        print_json(report)
    else:
        print(environment.describe(report))


def bench(
    shape: Annotated[str, typer.Option(help=f"HxI, or one of {', '.join(benchmark.SHAPES)}.")] = "mistral-7b",
    sparsity: Annotated[str, typer.Option(help="Shares of neurons to skip, comma-separated.")] = "0,0.5,0.7,0.9",
    tokens: Annotated[int, options.count("Tokens in one call.")] = 1,
    dtype: options.DType = None,
    device: options.Device = None,
    passes: Annotated[int, options.count("Passes over all layers; the median counts.")] = 20,
    json: options.Json = False,
) -> None:
    """Time the sparse op against the dense PyTorch MLP on this machine.

    Both alternate over layers of distinct random weights that fit into no cache;
    on a GPU inside a CUDA graph, timed by device events. Each time is compared with
    the bytes that had to be read and the read rate of this machine, measured in the
    same run.

    Examples:

    $ cats bench

    $ cats bench --shape llama-2-7b --dtype bfloat16 --sparsity 0.5,0.7

    $ cats bench --shape 2048x8192 --tokens 4 --json
    """
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
