"""``cats eval``: perplexity of the dense and the sparse model side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from cats_ext.cli.common import (
    CatsDirectory,
    Device,
    DType,
    Json,
    Model,
    TextFiles,
    load_patched,
    one_sentence_errors,
    output,
    pick_device,
    print_json,
)
from cats_ext.cli.text import read_texts, tokenize, window_bos


@one_sentence_errors
def evaluate(
    model: Model,
    text: TextFiles,
    cats: CatsDirectory = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Perplexity on text, dense and (with --cats, or if saved with thresholds) sparse.

    With the sparsity reached and the bytes that it reads.

    Examples:

    $ cats eval smollm2-135m --text held-out.txt

    $ cats eval ./mistral-7b --cats thresholds --text held-out.jsonl.gz --json
    """
    import cats_ext
    from cats_ext.evaluation import perplexity

    texts = read_texts(text)
    network, tokenizer, config = load_patched(model, pick_device(device), dtype, cats)
    if config is not None:
        cats_ext.remove_cats(network)
    ids = tokenize(tokenizer, texts)
    options: dict[str, Any] = {"window": window, "max_windows": max_windows, "bos_token_id": window_bos(tokenizer)}

    dense = perplexity(network, ids, **options)
    document: dict[str, Any] = {
        "model": model,
        "tokens": dense.tokens,
        "window": window,
        "dense": {"nll": dense.nll, "perplexity": dense.ppl},
        "sparse": None,
    }
    if config is not None:
        cats_ext.apply_cats(network, config)
        with cats_ext.track_sparsity(network):
            sparse = perplexity(network, ids, **options)
        report = cats_ext.sparsity_report(network)
        document["sparse"] = {
            "nll": sparse.nll,
            "perplexity": sparse.ppl,
            "rule": config.rule,
            "target": config.sparsity,
            "target_bytes_share": config.bytes_share,
            "reached": report.to_dict(),
        }
    if json:
        print_json(document)
        return
    caption = f"{dense.tokens:,} predicted tokens in windows of {window}; read: share of the MLP weights"
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    table.add_column("", no_wrap=True)
    for title in ("perplexity", "change", "up skipped", "down skipped", "read"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("dense", f"{dense.ppl:.2f}", "", "0.0%", "0.0%", "100.0%")
    if config is not None:
        table.add_row(
            f"{config.rule} {config.sparsity:.0%}",
            f"{sparse.ppl:.2f}",
            f"{sparse.ppl / dense.ppl - 1:+.1%}",
            f"{report.up_sparsity:.1%}",
            f"{report.down_sparsity:.1%}",
            f"{report.bytes_share:.1%}",
        )
    output(json).print(table)
