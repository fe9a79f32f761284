"""``cats eval``: what sparsity costs, measured beside the dense model: perplexity, KL, agreement, tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import cats_ext
from cats_ext._inputs import window_bos
from cats_ext._outputs import check_writable
from cats_ext.cli import options
from cats_ext.cli.common import (
    UnwrittenError,
    escape,
    json_text,
    load,
    note_drift,
    output,
    patched,
    print_json,
    result_table,
    write_output,
)
from cats_ext.cli.text import NAMED_TEXTS, named_text, read_texts, tokenize
from cats_ext.evaluation.comparison import compare, perplexity
from cats_ext.evaluation.tasks import answers, check_tasks, compare_answers, local_task
from cats_ext.patching.exact.apply import apply_config
from cats_ext.thresholds.exact import EXACT
from cats_ext.thresholds.rules import check_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: options.Model,
    text: options.OptionalTextFiles = None,
    named: Annotated[
        str | None, typer.Option("--set", help=f"Instead of a file: {', '.join(NAMED_TEXTS)} (needs a network).")
    ] = None,
    cats: options.CatsDirectory = None,
    check_weights: options.CheckWeights = True,
    sparsities: Annotated[
        str | None, typer.Option("--curve", help="Further sparsities to measure, comma-separated, from stored counts.")
    ] = None,
    relufication: Annotated[
        bool, typer.Option("--relufication", help="Measure the model with ReLU for its activation too.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Multiple-choice tasks of lm-evaluation-harness, comma-separated.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Directory with a NAME.jsonl(.gz) per task, instead of downloads.")
    ] = None,
    limit: Annotated[int | None, options.count("Use only the first so many items of a task.")] = None,
    batch_size: Annotated[int, options.count("Task requests run together.")] = 16,
    window: options.Window = 1024,
    max_windows: Annotated[int | None, options.count("Use only the first so many windows.")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSON there too; 'cats report' reads it.")
    ] = None,
    device: options.Device = None,
    dtype: options.DType = None,
    json: options.Json = False,
) -> None:
    """Measure a model on text and tasks, dense and (with thresholds) sparse side by side.

    Text: perplexity, the KL divergence from the dense model and how often both find
    the same token most probable, with standard errors over windows; the sparsity reached
    and the share of the MLP weights read. Tasks: accuracies with the significance of
    the difference (exact McNemar test).

    Examples:

    $ cats eval smollm2-135m --text held-out.txt

    $ cats eval ./mistral-7b --cats thresholds --text held-out.jsonl.gz --curve 0.3,0.7

    $ cats eval ./mistral-7b --cats thresholds --tasks arc_easy,piqa --output thresholds/eval.json
    """
    if text and named:
        raise ValueError(f"give --text or --set, not both, got '{text[0]}' and '{named}'")
    if not (text or named or tasks):
        raise ValueError("give something to measure on: --text FILE, --set NAME or --tasks NAMES")
    curve = _curve(sparsities)
    if out is not None:
        check_writable("--output", out, directory=False)
    where = options.pick_device(device)
    texts = named_text(named) if named else read_texts(text) if text else []
    chosen = _tasks(tasks, task_data)
    network, tokenizer, config = load(model, where, dtype, cats, check_weights)
    if config is None and curve:
        raise ValueError("--curve needs thresholds: --cats DIRECTORY, or a model saved with them")
    document: dict[str, Any] = {
        "model": model,
        "dtype": str(network.dtype).removeprefix("torch."),
        "config": None if config is None else {k: v for k, v in config.to_dict().items() if k != "layers"},
    }
    if texts:
        ids = tokenize(tokenizer, texts, None if max_windows is None else max_windows * window)
        windows = {"window": window, "max_windows": max_windows, "bos_token_id": window_bos(tokenizer)}
        document["text"] = {
            "source": named or [str(path) for path in text],
            **measure_text(network, ids, variants_of(config, curve, relufication), windows),
        }
    if chosen:
        run = {"limit": limit, "batch_size": batch_size}
        document["tasks"] = measure_tasks(network, tokenizer, chosen, variants_of(config, [], relufication), run)
    if not json:
        console = output(json)
        if texts:
            show_text(console, document["text"])
        if chosen:
            show_tasks(console, document["tasks"])
    if out is not None:
        try:
            write_output("--output", out, json_text(document))
        except OSError as error:
            raise UnwrittenError(str(error), document) from error
    if json:
        print_json(document)


def _curve(sparsities: str | None) -> list[float]:
    values = options.numbers("--curve", sparsities) if sparsities is not None else []
    for value in values:
        check_sparsity("--curve", value)
    return values


def _tasks(tasks: str | None, task_data: Path | None) -> list[Any]:
    names = [name.strip() for name in tasks.split(",")] if tasks else []
    if task_data is not None:
        return [local_task(name, task_data) for name in names]
    check_tasks(names)
    return names


@dataclass(frozen=True)
class Variant:
    """A sparse form of the model, and the function that makes a dense one so; without a config it is ReLUfied."""

    name: str
    patch: Callable[[PreTrainedModel], object]
    config: cats_ext.CatsConfig | None = None


def variants_of(config: cats_ext.CatsConfig | None, curve: list[float], relufication: bool) -> list[Variant]:
    """``config`` as it is and at the sparsities of ``curve``, and the ReLUfied model if wanted."""
    configs = [] if config is None else [config, *(config.at_sparsity(sparsity) for sparsity in curve)]
    names = [c.rule if c.rule == EXACT else f"{c.rule} {c.sparsity:.0%}" for c in configs]
    variants = [Variant(name, partial(apply_config, config=c), c) for name, c in zip(names, configs, strict=True)]
    return [*variants, Variant("ReLUfication", cats_ext.apply_relufication)] if relufication else variants


def measure_text(
    network: PreTrainedModel, ids: Any, variants: list[Variant], windows: dict[str, Any]
) -> dict[str, Any]:
    """The dense model's perplexity, and a row for each sparse variant; ``windows`` are options of :func:`compare`."""
    if not variants:
        dense = perplexity(network, ids, **windows)
        return {"window": windows["window"], "dense": asdict(dense), "variants": []}
    rows = []
    for variant in variants:
        with patched(network, variant.patch):
            with cats_ext.track_sparsity(network):
                found = compare(network, ids, **windows)
            report = cats_ext.sparsity_report(network)
        config = variant.config
        row = {
            "name": variant.name,
            "sparsity": config and config.sparsity,
            "bytes_share_target": config and config.bytes_share,
        }
        row |= {key: value for key, value in found.to_dict().items() if key != "dense"}
        rows.append(row | {"reached": report.to_dict()})
        if config is not None:
            note_drift(report, variant.name)
    return {"window": windows["window"], "dense": asdict(found.dense), "variants": rows}


def measure_tasks(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    variants: list[Variant],
    run: dict[str, Any],
) -> dict[str, Any]:
    """The dense model's accuracies, and those of each sparse variant with the tests of the difference."""
    dense = answers(network, tokenizer, tasks, **run)
    rows = []
    for variant in variants:
        with patched(network, variant.patch):
            found, mean = compare_answers(dense, answers(network, tokenizer, tasks, **run))
        rows.append({"name": variant.name, "tasks": [task.to_dict() for task in (*found.values(), mean)]})
    return {
        "items": {name: len(right) for name, right in dense.items()},
        "dense": {name: sum(right) / len(right) for name, right in dense.items()},
        "variants": rows,
    }


def show_text(console: Console, found: dict[str, Any]) -> None:
    dense = found["dense"]
    caption = f"{dense['tokens']:,} predicted tokens in windows of {found['window']}; read: share of the MLP weights"
    titles = ("", "perplexity", "change", "KL, nats", "same top\ntoken", "up\nskipped", "down\nskipped", "read")
    table = _table(console, titles, caption=caption)
    table.add_row("dense", f"{dense['ppl']:.2f}", "", "", "", "0.0%", "0.0%", "100.0%")
    for row in found["variants"]:
        reached, ppl = row["reached"], row["sparse"]["ppl"]
        table.add_row(
            row["name"],
            f"{ppl:.2f}",
            f"{ppl / dense['ppl'] - 1:+.1%}{_error(100 * row['nll_increase_se'] * ppl / dense['ppl'], '.1f', '%')}",
            f"{row['kl']:.4f}{_error(row['kl_se'], '.4f')}",
            f"{row['top1']:.1%}{_error(100 * row['top1_se'], '.1f', '%')}",
            *(f"{reached[key]:.1%}" for key in ("up_sparsity", "down_sparsity", "bytes_share")),
        )
    console.print(table)


def show_tasks(console: Console, found: dict[str, Any]) -> None:
    titles = ("task", "items", "dense", "sparse", "difference", "lost", "gained", "p")
    for variant in found["variants"] or [{"name": "dense", "tasks": []}]:
        table = _table(console, titles, title=escape(variant["name"]))
        table.columns[0].no_wrap = True
        for task in variant["tasks"]:
            table.add_row(
                task["task"],
                str(task["items"]),
                f"{task['dense']:.1%}{_error(100 * task['dense_se'], '.1f', '%')}",
                f"{task['sparse']:.1%}{_error(100 * task['sparse_se'], '.1f', '%')}",
                f"{100 * task['difference']:+.1f}{_error(100 * task['difference_se'], '.1f')}",
                str(task["lost"]),
                str(task["gained"]),
                f"{task['p_value']:.3f}",
            )
        if not found["variants"]:
            for name, accuracy in found["dense"].items():
                table.add_row(name, str(found["items"][name]), f"{accuracy:.1%}", "", "", "", "", "")
        console.print(table)


def _table(console: Console, titles: tuple[str, ...], **options: Any) -> Table:
    """A table whose columns fit into 80 characters, with more space between them where the console is wider."""
    return result_table(titles, padding=(0, 1 if console.width >= 100 else 0), **options)


def _error(value: float, form: str, unit: str = "") -> str:
    """A standard error for the line under a value; empty if it is NaN."""
    return "" if value != value else f"\n±{value:{form}}{unit}"
