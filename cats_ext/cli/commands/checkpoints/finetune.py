"""``cats finetune``: a sparse, ReLUfied or dense model tuned on text, written to a directory."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cats_ext._outputs import check_writable
from cats_ext.cli import options
from cats_ext.cli.common import escape, load, notes, output, print_json, result_table, show_next
from cats_ext.cli.text import dataset_texts, read_texts
from cats_ext.finetune import METHODS, FinetuneSettings
from cats_ext.finetune import finetune as tune
from cats_ext.finetune.trainer import check_integrations

Method = options.choices("Method", METHODS)
DEFAULTS = FinetuneSettings()


def finetune(
    model: options.Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="Directory for the tuned model and its checkpoints.")],
    text: options.OptionalTextFiles = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Instead of a file: NAME[:CONFIGURATION[:SPLIT]] of the Hugging Face hub, or a directory of data "
            "files. Its field 'text' is read, by default of the split train."
        ),
    ] = None,
    rows: Annotated[int, options.count("How many rows of --dataset are read at most.")] = 10_000,
    method: Annotated[
        Method, typer.Option(help="cats: masked by thresholds; relufication: with ReLU; dense: as it is.")
    ] = DEFAULTS.method,
    sparsity: Annotated[
        float | None, typer.Option(help="cats: share of neurons to skip; without it 0.5, or that of the thresholds.")
    ] = None,
    cats: options.CatsDirectory = None,
    check_weights: options.CheckWeights = True,
    steps: Annotated[int, options.count("Optimizer steps.")] = DEFAULTS.steps,
    full: Annotated[bool, typer.Option("--full", help="Tune all weights instead of LoRA adapters.")] = False,
    lora_rank: Annotated[int, options.count("Rank of the adapters.", most=1 << 16)] = DEFAULTS.lora_rank,
    lora_targets: Annotated[
        str | None, typer.Option(help="Linear modules to adapt, with commas; without it all but the output layer.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; without it 2e-4, 2e-5 with --full.")] = None,
    batch_size: Annotated[int, options.count("Windows in a step.")] = DEFAULTS.batch_size,
    sequence_length: options.Window = DEFAULTS.sequence_length,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Calibrate again after the tuning.")] = False,
    save_every: Annotated[int, options.count("Steps between checkpoints; the last two are kept.")] = 50,
    report_to: Annotated[
        str | None, typer.Option(help="Where Trainer logs to, with commas, or none; tensorboard if it is installed.")
    ] = None,
    seed: Annotated[int, options.seed("Of the windows' order and the adapters.")] = DEFAULTS.seed,
    device: options.Device = None,
    dtype: options.DType = None,
    json: options.Json = False,
) -> None:
    """Tune a model while its neurons are skipped, so that it recovers the lost quality.

    After an interruption, the same command continues from the last checkpoint. The result is
    a model with merged adapters, which every other command takes, and the sparsity it reached.

    Examples:

    $ cats finetune smollm2-135m --text notes.txt --sparsity 0.7 -o tuned

    $ cats finetune smollm2-135m --dataset allenai/c4:en -o tuned

    $ cats finetune ./mistral-7b --cats thresholds --text a.jsonl.gz --steps 1000 --recalibrate -o tuned
    """
    if method.value != "cats" and (sparsity is not None or cats is not None):
        option = f"--sparsity {sparsity}" if sparsity is not None else f"--cats {cats}"
        raise ValueError(f"{option} is for --method cats, got --method {method.value}")
    if bool(text) == (dataset is not None):
        given = f"got --text {text[0]} and --dataset {dataset}" if text else "got neither"
        raise ValueError(f"give --text or --dataset, {given}")
    if full and lora_targets is not None:
        raise ValueError(f"give --full or --lora-targets, not both, got --lora-targets {lora_targets}")
    check_writable("--output", out, directory=True)
    settings = FinetuneSettings(
        method=method.value,
        sparsity=DEFAULTS.sparsity if sparsity is None else sparsity,
        steps=steps,
        lora_rank=0 if full else lora_rank,
        lora_alpha=2.0 * lora_rank,
        lora_targets=tuple(name.strip() for name in lora_targets.split(",")) if lora_targets is not None else None,
        learning_rate=learning_rate if learning_rate is not None else 2e-5 if full else DEFAULTS.learning_rate,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    integrations = _integrations(report_to)
    if report_to is not None:
        check_integrations(integrations)
    where = options.pick_device(device)
    if where.type == "cuda":
        if where.index not in (None, 0):
            raise ValueError(f"--device {device}: tuning takes the first GPU; choose with CUDA_VISIBLE_DEVICES")
        where = torch.device("cuda", 0)
    texts = read_texts(text) if text else dataset_texts(dataset, rows)
    if full and dtype is None:
        dtype = options.Precision.FLOAT32  # small updates vanish in bfloat16 weights
    network, tokenizer, config = load(model, where, dtype, cats, check_weights)
    if method.value != "cats":
        config = None
    if config is not None:
        config = config if sparsity is None else config.at_sparsity(sparsity)
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
        report_to=integrations,
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
    titles = ("", "perplexity", "up skipped", "down skipped", "read", "furthest layer")
    table = result_table(titles, caption=caption)
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
            "[yellow]In some layers the sparsity differs from its target by more than 5%. The same command with "
            "--recalibrate sets new thresholds.[/]",
            soft_wrap=True,
        )
    commands = (f"eval {out} --text FILE", f"generate {out} --prompt TEXT")
    show_next(console, f"The tuned model is in [bold]{escape(str(out))}[/].", commands)
