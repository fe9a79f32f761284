"""``cats calibrate``: thresholds for a model from text, written to a directory."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

import cats_ext
from cats_ext._outputs import cannot_be_written, check_writable
from cats_ext.calibration.settings import CalibrationSettings
from cats_ext.cli import options
from cats_ext.cli.common import escape, load, output, print_json, show_next
from cats_ext.cli.text import stream_texts
from cats_ext.data.texts import sample_texts
from cats_ext.thresholds.allocation import ALLOCATIONS
from cats_ext.thresholds.rules import IMPORTANCES, RULES

Rule = options.choices("Rule", RULES)
Importance = options.choices("Importance", IMPORTANCES)
Allocation = options.choices("Allocation", ALLOCATIONS)
DEFAULTS = CalibrationSettings()


def calibrate(
    model: options.Model,
    text: options.TextFiles,
    out: Annotated[Path, typer.Option("--output", "-o", help="Directory for the thresholds; made if missing.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of neurons to skip in every layer, in [0, 1).")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead: share of the MLP weights that a token may read, in (1/3, 1]; 2/3 without either."),
    ] = None,
    rule: Annotated[Rule, typer.Option(help="plain: the paper's, one threshold a layer.")] = DEFAULTS.rule,
    down_sparsity: Annotated[
        float | None, typer.Option(help="two_threshold: share of down rows to skip; without it sparsity + 0.125.")
    ] = None,
    gate_power: Annotated[
        float | None, typer.Option(help="Exponent of the gate's weights, in [0, 1]. Without it the rule's own.")
    ] = None,
    last_gate_power: Annotated[float | None, typer.Option(help="The same of the last layer.")] = None,
    importance: Annotated[
        Importance | None,
        typer.Option(help="Weights of neurons: norms, or gradients of the predictions. Without it the rule's own."),
    ] = None,
    allocation: Annotated[
        Allocation, typer.Option(help="All layers alike, or a search, which may lose less and takes twice as long.")
    ] = DEFAULTS.allocation,
    spread: Annotated[
        float, typer.Option(help="search: largest difference of a layer's sparsity from that of all layers alike.")
    ] = DEFAULTS.spread,
    dense_prefill: Annotated[bool, typer.Option("--dense-prefill", help="Compute prompts densely.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File from which the same command continues after an interruption.")
    ] = None,
    max_tokens: Annotated[int, options.count("Tokens to use at most.")] = DEFAULTS.max_tokens,
    sequence_length: options.Window = DEFAULTS.sequence_length,
    batch_size: Annotated[int, options.count("Windows run together.")] = DEFAULTS.batch_size,
    seed: Annotated[int, options.seed("Chooses the windows where there are more than needed.")] = DEFAULTS.seed,
    device: options.Device = None,
    dtype: options.DType = None,
    json: options.Json = False,
) -> None:
    """Find the thresholds at which a model skips a share of its neurons, on your text.

    Choose text like that of the model's later use; thirty thousand tokens are enough.

    Examples:

    $ cats calibrate smollm2-135m --text notes.txt -o thresholds

    $ cats calibrate ./mistral-7b --text a.txt --text b.jsonl.gz --budget 0.6 -o out
    """
    settings = CalibrationSettings(
        sparsity=sparsity,
        budget=budget,
        rule=rule.value,
        down_sparsity=down_sparsity,
        gate_power=gate_power,
        last_gate_power=last_gate_power,
        importance=importance and importance.value,
        allocation=allocation.value,
        spread=spread,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    check_writable("--output", out, directory=True)
    if checkpoint is not None:
        check_writable("--checkpoint", checkpoint, directory=False)
    where = options.pick_device(device)
    texts = sample_texts(stream_texts(text), max_tokens, sequence_length, seed)
    network, tokenizer, _ = load(model, where, dtype)
    config = cats_ext.calibrate(network, texts, tokenizer=tokenizer, checkpoint=checkpoint, **asdict(settings))
    config = replace(config, sparse_prefill=not dense_prefill)
    _save(config, out, checkpoint)
    if json:
        print_json({"directory": str(out), **config.to_dict()})
        return
    console = output(json)
    console.print(
        f"{len(config.layers)} layers calibrated on {config.calibration['tokens']:,} tokens; at the target a token "
        f"reads {config.bytes_share:.1%} of the MLP weights."
    )
    search = config.calibration.get("search")
    if search:
        console.print(
            "KL from the dense model, in nats a token: {uniform_kl:.4f} with all layers alike, {searched_kl:.4f} with "
            "the budget searched.".format(**search)
        )
    commands = (f"eval {model} --cats {out} --text FILE", f"generate {model} --cats {out} --prompt TEXT")
    show_next(console, f"Thresholds are in [bold]{escape(str(out))}[/].", commands)


def _save(config: cats_ext.CatsConfig, out: Path, checkpoint: Path | None) -> None:
    """Write ``config``, then remove the checkpoint; if ``out`` has become unwritable, say where the work is kept."""
    try:
        config.save_pretrained(out)
    except OSError as error:
        if checkpoint is not None:
            kept = f"the same command continues from --checkpoint {checkpoint}, with all passes done"
        else:
            elsewhere = tempfile.mkdtemp(prefix="cats-thresholds-")
            config.save_pretrained(elsewhere)
            kept = f"the thresholds are in {elsewhere}"
        raise OSError(f"{cannot_be_written('--output', out, error)}; {kept}") from error
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
