"""``cats exact``: what a model that is sparse by itself can skip without changing anything, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import cats_ext
from cats_ext._inputs import window_bos
from cats_ext._outputs import check_writable
from cats_ext.cli import options
from cats_ext.cli.common import escape, load, notes, output, print_json, result_table
from cats_ext.cli.text import read_texts, tokenize
from cats_ext.evaluation.comparison import perplexity
from cats_ext.patching.exact.detection import ExactLayer, find_exact_layers


def exact(
    model: options.Model,
    text: options.OptionalTextFiles = None,
    window: options.Window = 1024,
    max_windows: Annotated[int | None, options.count("Use only the first so many windows.")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the model there, so that it is loaded patched.")
    ] = None,
    device: options.Device = None,
    dtype: options.DType = None,
    json: options.Json = False,
) -> None:
    """Show which layers are exactly zero for many inputs and what they skip; with --text how much.

    Such models (ReLUfied Llamas, OPT, Nemotron, Gemma 3n and others) compute the same
    from fewer weights: nothing is calibrated. In Python it is cats_ext.apply_exact.

    Examples:

    $ cats exact ./prosparse-llama-2-7b --text held-out.txt

    $ cats exact ./opt-6.7b --output ./opt-6.7b-exact
    """
    if out is not None:
        check_writable("--output", out, directory=True)
    where = options.pick_device(device)
    texts = read_texts(text) if text else []
    network, tokenizer, _ = load(model, where, dtype)
    layers, refused = find_exact_layers(network)
    rows = [_row(layer) for layer in layers]
    cats_ext.apply_exact(network)
    report = None
    if texts:
        ids = tokenize(tokenizer, texts, None if max_windows is None else max_windows * window)
        with cats_ext.track_sparsity(network):
            perplexity(network, ids, window=window, max_windows=max_windows, bos_token_id=window_bos(tokenizer))
        report = cats_ext.sparsity_report(network)
        for row, layer in zip(rows, report.layers, strict=True):
            row |= {"sparsity": layer.down_sparsity, "bytes_share": layer.bytes_share}
    if out is not None:
        network.save_pretrained(out)
        tokenizer.save_pretrained(out)
    if json:
        found = None if report is None else report.to_dict()
        print_json({"model": model, "layers": rows, "left_dense": refused, "sparsity": found})
        return
    table = result_table(["layer", *(key.replace("_", " ") for key in rows[0] if key != "name")])
    for row in rows:
        table.add_row(*(f"{value:.1%}" if isinstance(value, float) else str(value) for value in row.values()))
    output(json).print(table)
    for name, reason in refused.items():
        notes.print(f"[yellow]{escape(name)} stays dense: {escape(reason)}[/]", soft_wrap=True)


def _row(layer: ExactLayer) -> dict[str, Any]:
    return {"name": layer.name, "activation": layer.activation, "skipped": layer.skipped}
