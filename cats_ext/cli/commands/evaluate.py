"""``cats eval``: what sparsity costs, measured beside the dense model: perplexity, KL, agreement, tasks."""

from __future__ import annotations

import contextlib
import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cats_ext.cli.common import (
    CatsDirectory,
    Device,
    DType,
    Json,
    Model,
    escape,
    finite,
    load_patched,
    note_drift,
    one_sentence_errors,
    output,
    pick_device,
    print_json,
)
from cats_ext.cli.text import NAMED_TEXTS, named_text, read_texts, tokenize, window_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cats_ext import CatsConfig


@one_sentence_errors
def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Text file: .txt, .jsonl (field 'text'), either also .gz. Repeatable."),
    ] = None,
    named: Annotated[
        str | None, typer.Option("--set", help=f"Instead of a file: {', '.join(NAMED_TEXTS)} (needs a network).")
    ] = None,
    cats: CatsDirectory = None,
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
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many items of a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Task requests run together.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSON there too; 'cats report' reads it.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    json: Json = False,
) -> None:
    """Measure a model on text and tasks, dense and (with thresholds) sparse side by side.

    Text: perplexity, the KL divergence from the dense model and how often both find
    the same token likeliest, with standard errors over windows; the sparsity reached
    and the share of the MLP weights read. Tasks: accuracies with the significance of
    the difference (exact McNemar test).

    Examples:

    $ cats eval smollm2-135m --text held-out.txt

    $ cats eval ./mistral-7b --cats thresholds --text held-out.jsonl.gz --curve 0.3,0.7

    $ cats eval ./mistral-7b --cats thresholds --tasks arc_easy,piqa --output thresholds/eval.json
    """
    import cats_ext

    if text and named:
        raise ValueError(f"give --text or --set, not both, got '{text[0]}' and '{named}'")
    if not (text or named or tasks):
        raise ValueError("give something to measure on: --text FILE, --set NAME or --tasks NAMES")
    curve = _curve(sparsities)
    texts = named_text(named) if named else read_texts(text) if text else []
    chosen = _tasks(tasks, task_data)
    _check_output(out)
    where = pick_device(device)
    network, tokenizer, config = load_patched(model, where, dtype, cats)
    if config is not None:
        cats_ext.remove_cats(network)
    if config is None and curve:
        raise ValueError("--curve needs thresholds: --cats DIRECTORY, or a model saved with them")
    document: dict[str, Any] = {
        "model": model,
        "dtype": str(network.dtype).removeprefix("torch."),
        "config": None if config is None else {k: v for k, v in config.to_dict().items() if k != "layers"},
    }
    if texts:
        ids = tokenize(tokenizer, texts)
        options: dict[str, Any] = {"window": window, "max_windows": max_windows, "bos_token_id": window_bos(tokenizer)}
        document["text"] = {
            "source": named or [str(path) for path in text],
            **measure_text(network, ids, config, curve, relufication, options),
        }
    if chosen:
        run = {"limit": limit, "batch_size": batch_size}
        document["tasks"] = measure_tasks(network, tokenizer, chosen, config, relufication, run)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_module.dumps(finite(document), indent=2) + "\n", encoding="utf-8")
    if json:
        print_json(document)
        return
    console = output(json)
    if texts:
        show_text(console, document["text"])
    if chosen:
        show_tasks(console, document["tasks"])


def _curve(sparsities: str | None) -> list[float]:
    from cats_ext.thresholds.rules import check_sparsity

    try:
        values = [float(part) for part in sparsities.split(",")] if sparsities else []
    except ValueError:
        raise ValueError(f"--curve must be numbers separated by commas, got '{sparsities}'") from None
    for value in values:
        check_sparsity("--curve", value)
    return values


def _tasks(tasks: str | None, task_data: Path | None) -> list[Any]:
    from cats_ext.evaluation.tasks import local_task

    names = [name.strip() for name in tasks.split(",")] if tasks else []
    return [name if task_data is None else local_task(name, task_data) for name in names]


def _check_output(out: Path | None) -> None:
    """Found out before the work, so that nothing is lost for a wrong path."""
    if out is not None and out.is_dir():
        raise IsADirectoryError(f"--output '{out}' is a directory")


@contextlib.contextmanager
def _variant(network: PreTrainedModel, config: CatsConfig | None) -> Iterator[None]:
    """The model with ``config``, or ReLUfied; dense again after."""
    import cats_ext

    if config is None:
        cats_ext.apply_relufication(network)
    else:
        cats_ext.apply_cats(network, config)
    try:
        yield
    finally:
        cats_ext.remove_cats(network)


def measure_text(
    network: PreTrainedModel,
    ids: Any,
    config: CatsConfig | None,
    curve: list[float],
    relufication: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The dense model's perplexity, and a row for each sparse variant of it."""
    import cats_ext
    from cats_ext.evaluation.comparison import compare, perplexity

    variants: list[tuple[str, CatsConfig | None]] = []
    if config is not None:
        for each in (config, *(config.at_sparsity(sparsity) for sparsity in curve)):
            variants.append((f"{each.rule} {each.sparsity:.0%}", each))
    if relufication:
        variants.append(("ReLUfication", None))
    if not variants:
        dense = perplexity(network, ids, **options)
        return {"window": options["window"], "dense": asdict(dense), "variants": []}
    rows = []
    for name, each in variants:
        with _variant(network, each):
            with cats_ext.track_sparsity(network):
                found = compare(network, ids, **options)
            report = cats_ext.sparsity_report(network)
        row = {"name": name, "sparsity": each and each.sparsity, "bytes_share_target": each and each.bytes_share}
        row |= {key: value for key, value in found.to_dict().items() if key != "dense"}
        rows.append(row | {"reached": report.to_dict()})
        if each is not None:
            note_drift(report, name)
    return {"window": options["window"], "dense": asdict(found.dense), "variants": rows}


def measure_tasks(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    config: CatsConfig | None,
    relufication: bool,
    run: dict[str, Any],
) -> dict[str, Any]:
    """The dense model's accuracies, and those of each sparse variant beside them with their tests."""
    from cats_ext.evaluation.tasks import answers, compare_answers

    dense = answers(network, tokenizer, tasks, **run)
    accuracy = {name: sum(right) / len(right) for name, right in dense.items()}
    document: dict[str, Any] = {"items": {name: len(right) for name, right in dense.items()}, "dense": accuracy}
    document["variants"] = []
    for name, each in ((config and f"{config.rule} {config.sparsity:.0%}", config), ("ReLUfication", None)):
        if (each is None) if name != "ReLUfication" else not relufication:
            continue
        with _variant(network, each):
            found, mean = compare_answers(dense, answers(network, tokenizer, tasks, **run))
        rows = [task.to_dict() for task in (*found.values(), mean)]
        document["variants"].append({"name": name, "tasks": rows})
    return document


def show_text(console: Console, found: dict[str, Any]) -> None:
    dense = found["dense"]
    caption = f"{dense['tokens']:,} predicted tokens in windows of {found['window']}; read: share of the MLP weights"
    table = _table(console, caption=caption)
    table.add_column("")
    titles = ("perplexity", "change", "KL, nats", "same top\ntoken", "up\nskipped", "down\nskipped", "read")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
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
    columns = ("items", "dense", "sparse", "difference", "lost", "gained", "p")
    for variant in found["variants"] or [{"name": "dense", "tasks": []}]:
        table = _table(console, title=escape(variant["name"]))
        table.add_column("task", no_wrap=True)
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
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


def _table(console: Console, **options: Any) -> Table:
    """A table whose columns fit into 80 characters, and stand further apart where there is room."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1 if console.width >= 100 else 0), **options)


def _error(value: float, form: str, unit: str = "") -> str:
    """A standard error to be put under a value; nothing where there is none."""
    return "" if value != value else f"\n±{value:{form}}{unit}"
