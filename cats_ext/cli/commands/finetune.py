"""``cats finetune``: a sparse, ReLUfied or dense model tuned on text, written to a directory."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from cats_ext.cli.common import (
    CatsDirectory,
    Device,
    DType,
    Json,
    Model,
    Precision,
    TextFiles,
    escape,
    load_patched,
    notes,
    one_sentence_errors,
    output,
    pick_device,
    print_json,
)
from cats_ext.cli.text import dataset_texts, read_texts


class Method(str, Enum):
    CATS = "cats"
    RELUFICATION = "relufication"
    DENSE = "dense"


@one_sentence_errors
def finetune(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Directory for the tuned model and its checkpoints.")],
    text: TextFiles = [],  # noqa: B006  not written to
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Instead of a file: NAME[:CONFIGURATION[:SPLIT]] of the Hugging Face hub, or a directory of data "
            "files. Its field 'text' is read, by default of the split train."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of --dataset are read at most.")] = 10_000,
    method: Annotated[Method, typer.Option(help="cats: masked by thresholds; dense: as it is.")] = Method.CATS,
    sparsity: Annotated[
        float | None, typer.Option(help="cats: share of neurons to skip; without it 0.5, or that of the thresholds.")
    ] = None,
    cats: CatsDirectory = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    full: Annotated[bool, typer.Option("--full", help="Tune all weights instead of LoRA adapters.")] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    lora_targets: Annotated[
        str | None, typer.Option(help="Linear modules to adapt, with commas; without it all but the output layer.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest; 2e-4, or 2e-5 with --full.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows of a step.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Set the thresholds anew after the tuning.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; the last two are kept.")] = 50,
    report_to: Annotated[
        str | None, typer.Option(help="Where Trainer logs to, with commas, or none; tensorboard if it is installed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the windows' order and the adapters.")] = 0,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Tune a model while its neurons are skipped, so that it wins back what that cost.

    Interrupted, the same command goes on from the last checkpoint. The result is a model with
    merged adapters that every other command takes, and the sparsity it has kept.

    Examples:

    $ cats finetune smollm2-135m --text notes.txt --sparsity 0.7 -o tuned

    $ cats finetune smollm2-135m --dataset allenai/c4:en -o tuned

    $ cats finetune ./mistral-7b --cats thresholds --text a.jsonl.gz --steps 1000 --recalibrate -o tuned
    """
    import cats_ext
    from cats_ext.finetune.run import FinetuneSettings
    from cats_ext.finetune.run import finetune as tune

    if method is not Method.CATS and (sparsity is not None or cats is not None):
        option = f"--sparsity {sparsity}" if sparsity is not None else f"--cats {cats}"
        raise ValueError(f"{option} is for --method cats, got --method {method.value}")
    if bool(text) == (dataset is not None):
        given = f"got --text {text[0]} and --dataset {dataset}" if text else "got neither"
        raise ValueError(f"give --text or --dataset, {given}")
    if full and lora_targets is not None:
        raise ValueError(f"give --full or --lora-targets, not both, got --lora-targets {lora_targets}")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--output '{out}' exists and is not a directory")
    settings = FinetuneSettings(
        method=method.value,
        sparsity=0.5 if sparsity is None else sparsity,
        steps=steps,
        lora_rank=0 if full else lora_rank,
        lora_alpha=2.0 * lora_rank,
        lora_targets=tuple(name.strip() for name in lora_targets.split(",")) if lora_targets else None,
        learning_rate=learning_rate if learning_rate is not None else 2e-5 if full else 2e-4,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    texts = read_texts(text) if text else dataset_texts(dataset, rows)
    where = pick_device(device)
    if where.type == "cuda":
        if where.index not in (None, 0):
            raise ValueError(f"--device {device}: tuning takes the first GPU; choose with CUDA_VISIBLE_DEVICES")
        where = torch.device("cuda", 0)
    if full and dtype is None:
        dtype = Precision.FLOAT32  # small updates vanish in bfloat16 weights
    network, tokenizer, config = load_patched(model, where, dtype, cats)
    if config is not None:
        cats_ext.remove_cats(network)
        if method is not Method.CATS:
            config = None
        elif sparsity is not None:
            config = config.at_sparsity(sparsity)
    if config is not None:
        settings = replace(settings, sparsity=config.sparsity)
    found = tune(
        network,
        texts,
        out,
        settings,
        tokenizer=tokenizer,
        config=config,
        recalibrate=recalibrate,
        save_every=save_every,
        report_to=_integrations(report_to),
    )
    if json:
        print_json(found)
    else:
        _show(found, output(json), out)


def _integrations(report_to: str | None) -> tuple[str, ...]:
    if report_to is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    return tuple(name.strip() for name in report_to.split(",") if name.strip() != "none")


def _show(found: dict[str, Any], console: Any, out: Path) -> None:
    caption = f"{found['held_out_tokens']:,} tokens held out"
    table = Table("", box=box.SIMPLE_HEAD, caption=caption)
    for title in ("perplexity", "up skipped", "down skipped", "read", "furthest layer"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in ("before", "after", "recalibrated"):
        row = found[name]
        if row is None:
            continue
        cells = ["", "", "", ""]
        if row["sparsity"] is not None:
            cells = [f"{row['sparsity'][key]:.1%}" for key in ("up_sparsity", "down_sparsity", "bytes_share", "drift")]
            if found["settings"]["method"] != "cats":
                cells[-1] = ""  # no target to be far from
        table.add_row(name, f"{row['ppl']:.2f}", *cells)
    console.print(table)
    last = found["recalibrated"] or found["after"]
    if found["settings"]["method"] == "cats" and last["sparsity"]["drift"] > 0.05:
        notes.print(
            "[yellow]In some layers the sparsity is more than 5% from its target: --recalibrate, called again, sets "
            "the thresholds anew.[/]",
            soft_wrap=True,
        )
    console.print(f"The tuned model is in [bold]{escape(str(out))}[/]. Next:", soft_wrap=True)
    for command in (f"eval {out} --text FILE", f"generate {out} --prompt TEXT"):
        console.print(f"  cats {escape(command)}", soft_wrap=True)
