"""``cats calibrate``: thresholds for a model from text, written to a directory."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cats_ext.cli.common import (
    Device,
    DType,
    Json,
    Model,
    TextFiles,
    escape,
    load,
    one_sentence_errors,
    output,
    pick_device,
    print_json,
)
from cats_ext.cli.text import read_texts


class Rule(str, Enum):
    PLAIN = "plain"
    WEIGHTED = "weighted"
    TWO_THRESHOLD = "two_threshold"


class Importance(str, Enum):
    NORM = "norm"
    GRADIENT = "gradient"


class Allocation(str, Enum):
    UNIFORM = "uniform"
    SEARCH = "search"


@one_sentence_errors
def calibrate(
    model: Model,
    text: TextFiles,
    out: Annotated[Path, typer.Option("--output", "-o", help="Directory for the thresholds; made if missing.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of neurons to skip in every layer, in [0, 1).")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead: share of the MLP weights that a token may read, in (1/3, 1]; 2/3 without either."),
    ] = None,
    rule: Annotated[Rule, typer.Option(help="plain: the paper's, one threshold a layer.")] = Rule.TWO_THRESHOLD,
    down_sparsity: Annotated[
        float | None, typer.Option(help="two_threshold: share of down rows to skip; without it sparsity + 0.125.")
    ] = None,
    gate_power: Annotated[
        float | None, typer.Option(help="Exponent of the gate's weights, in [0, 1]. Without it the rule's own.")
    ] = None,
    last_gate_power: Annotated[float | None, typer.Option(help="The same of the last layer.")] = None,
    importance: Annotated[
        Importance | None,
        typer.Option(help="What weighs a neuron: norms, or gradients of the predictions (with a search, gradients)."),
    ] = None,
    allocation: Annotated[
        Allocation | None, typer.Option(help="All layers alike, or searched (without it, alike for a --sparsity).")
    ] = None,
    spread: Annotated[
        float, typer.Option(help="Of a search: how far a layer's sparsity may be from that of all layers alike.")
    ] = 1.0,
    dense_prefill: Annotated[bool, typer.Option("--dense-prefill", help="Compute prompts densely.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File that an interrupted calibration goes on from, called again.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to use at most.")] = 32768,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Windows run together.")] = 1,
    seed: Annotated[int, typer.Option(help="Chooses the windows where there are more than needed.")] = 0,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Find the thresholds at which a model skips a share of its neurons, on text of yours.

    Choose text like the one the model will work on; thirty thousand tokens are enough.

    Examples:

    $ cats calibrate smollm2-135m --text notes.txt -o thresholds

    $ cats calibrate ./mistral-7b --text a.txt --text b.jsonl.gz --budget 0.6 -o out
    """
    import cats_ext
    from cats_ext.thresholds.rules import sparsity_split

    if sparsity is not None:
        sparsity_split(sparsity, rule.value, down_sparsity)
    texts = read_texts(text)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--output '{out}' exists and is not a directory")
    where = pick_device(device)
    network, tokenizer = load(model, where, dtype)
    config = cats_ext.calibrate(
        network,
        texts,
        tokenizer=tokenizer,
        sparsity=sparsity,
        budget=budget,
        rule=rule.value,
        down_sparsity=down_sparsity,
        gate_power=gate_power,
        last_gate_power=last_gate_power,
        importance=importance and importance.value,
        allocation=allocation and allocation.value,
        spread=spread,
        checkpoint=checkpoint,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    config = replace(config, sparse_prefill=not dense_prefill)
    config.save_pretrained(out)
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
    console.print(f"Thresholds are in [bold]{escape(str(out))}[/]. Next:", soft_wrap=True)
    for command in (f"eval {model} --cats {out} --text FILE", f"generate {model} --cats {out} --prompt TEXT"):
        console.print(f"  cats {escape(command)}", soft_wrap=True)
