"""``cats demo``: calibrates a real model, makes it sparse and compares it with the dense one, in a few minutes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

import cats_ext
from cats_ext._inputs import window_bos
from cats_ext._outputs import cannot_be_written, check_writable
from cats_ext.cli import models, options
from cats_ext.cli.common import escape, load, notes, output, patched, print_json, result_table, status
from cats_ext.cli.text import CALIBRATION_MODULES, HELD_OUT_MODULES, docstrings, read_texts, tokenize
from cats_ext.evaluation.comparison import perplexity
from cats_ext.evaluation.plots import ActivationPanel, plot_activations
from cats_ext.native.library import LIBRARIES
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.thresholds.rules import sparsity_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE, PLAIN, TWO = "dense", "CATS, one threshold", "CATS, two thresholds"
_ROUNDS = 3  # of timing; dense and sparse alternate


@dataclass
class Variant:
    """The model in one of its three forms, and what was measured of it."""

    name: str
    config: cats_ext.CatsConfig | None  # None: dense
    perplexity: float = 0.0
    report: cats_ext.SparsityReport | None = None

    @property
    def patch(self) -> Callable[[PreTrainedModel], object] | None:
        return None if self.config is None else lambda network: cats_ext.apply_cats(network, self.config)

    def to_dict(self) -> dict[str, Any]:
        reached = None if self.report is None else self.report.to_dict()
        return {"name": self.name, "perplexity": self.perplexity, "reached": reached}


def demo(
    model: Annotated[
        str, typer.Option(help="Directory, hub name or .gguf file. The demo model is downloaded once (98 MB).")
    ] = models.DEMO_MODEL.name,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Your text file (.txt, .jsonl, .gz), instead of Python's own documentation. Repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option("--output", "-o", help="The figure: a .png, or a directory for it.")] = Path(),
    sparsity: Annotated[float, typer.Option(help="Share of neurons to skip, in [0, 1).")] = 0.5,
    prompt: Annotated[str, options.text("What the model is asked.")] = "Why is the sky blue?",
    new_tokens: Annotated[int, options.count("Tokens to write, and to time.", "--max-new-tokens", least=2)] = 48,
    calibration_tokens: Annotated[int, options.count("Tokens to calibrate on.", least=128)] = 8192,
    eval_tokens: Annotated[int, options.count("Tokens to measure perplexity on.", least=2)] = 4096,
    device: options.Device = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="On a GPU: both models write side by side, live.")] = False,
    json: options.Json = False,
) -> None:
    """Make a real language model sparse: thresholds, perplexity, text, speed and a figure.

    Everything is measured on this machine in this run.

    Examples:

    $ cats demo

    $ cats demo --sparsity 0.7 --text my-notes.txt

    $ cats demo --model ./llama-3.2-1b --gpu --output figures/
    """
    from cats_ext.cli.generation import check_prompt, encode_prompt

    started, load_at_start = time.perf_counter(), os.getloadavg()[0]
    sparsity_split(sparsity, "plain")
    check_prompt(prompt)
    figure_path = _figure_path(out)
    if gpu and not (device or "cuda").startswith("cuda"):
        raise ValueError(f"--gpu is for a CUDA device, got --device {device}")
    where = options.pick_device(device or ("cuda" if gpu else None))
    calibration_text, held_out_text, source = _texts(text)

    console = output(json)
    network, tokenizer, _ = load(model, where)
    question = encode_prompt(tokenizer, prompt, chat=bool(tokenizer.chat_template))
    held_out = tokenize(tokenizer, [held_out_text], eval_tokens)
    document: dict[str, Any] = {"model": model, "device": str(where), "sparsity": sparsity, "prompt": prompt}
    document["load_at_start"] = load_at_start
    document |= show_model(console, model, network)
    variants = measure_variants(network, tokenizer, calibration_text, held_out, sparsity, calibration_tokens)
    document |= show_thresholds(console, variants[PLAIN], source)
    document["variants"] = show_quality(console, variants, held_out.numel())
    _heading(console, "Text", f"The most probable continuation of: [italic]{escape(prompt)}[/]")
    show = show_writing if gpu else show_text
    document["continuations"] = show(console, network, tokenizer, variants, question, new_tokens)
    document["tokens_per_second"] = show_speed(
        console, network, tokenizer, variants, new_tokens, document["mlp_share"], load_at_start
    )
    show_figure(console, variants[PLAIN], figure_path)
    document["figure"] = str(figure_path)
    document["seconds"] = time.perf_counter() - started
    console.print(f"\n[dim]{document['seconds']:.0f} s in total. For your own model:[/]")
    console.print("  cats calibrate MODEL --text FILE --rule two_threshold -o thresholds")
    console.print("  cats generate MODEL --cats thresholds --prompt TEXT")
    console.print("  cats bench --model MODEL --cats thresholds")
    document["summary"] = summary(variants, document["tokens_per_second"]["speedup"])
    console.print(f"\n[bold]In short:[/] {document['summary']}", soft_wrap=True)
    if json:
        print_json(document)


def _figure_path(out: Path) -> Path:
    """The path of the figure, checked before the work, which would be lost."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError("the demo's figure needs matplotlib: pip install 'cats_ext[demo]'")
    path = out if out.suffix == ".png" else out / "cats_demo.png"
    check_writable("--output", path, directory=False)
    return path


def _texts(files: list[Path] | None) -> tuple[str, str, str]:
    """Text to calibrate on, other text to measure on, and a description of the first."""
    if not files:
        source = "docstrings of Python's standard library"
        return docstrings(CALIBRATION_MODULES), docstrings(HELD_OUT_MODULES), source
    whole = "\n\n".join(read_texts(files))
    cut = len(whole) * 4 // 5
    return whole[:cut], whole[cut:], f"the first four fifths of {', '.join(path.name for path in files)}"


def show_model(console: Console, name: str, network: PreTrainedModel) -> dict[str, Any]:
    mlps = find_gated_mlps(network)
    mlp_weights = sum(3 * mlp.hidden_size * mlp.intermediate_size for mlp in mlps)
    # a token reads all weights; of an input embedding that is not the output layer too, only one row
    weights = sum(parameter.numel() for parameter in network.parameters())
    if network.get_input_embeddings().weight is not network.get_output_embeddings().weight:
        weights -= network.get_input_embeddings().weight.numel()
    compiled = LIBRARIES["_C_cuda" if network.device.type == "cuda" else "_C"].loaded
    title = models.DEMO_MODEL.title if name == models.DEMO_MODEL.name else name
    threads = torch.get_num_threads()
    cpu = f"a CPU with {threads} thread{'s' * (threads != 1)}"
    on = torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else cpu
    dtype = str(network.dtype).removeprefix("torch.")
    console.print(
        Panel.fit(
            f"[bold]{escape(title)}[/], {dtype}, on {on}\n"
            f"{len(mlps)} layers of {mlps[0].intermediate_size:,} MLP neurons, hidden size {mlps[0].hidden_size:,}\n"
            f"A token reads {weights / 1e6:,.0f} M weights, {mlp_weights / weights:.0%} of them in the MLPs",
            title="cats demo",
            title_align="left",
        )
    )
    return {"dtype": dtype, "layers": len(mlps), "mlp_share": mlp_weights / weights, "compiled": compiled}


def measure_variants(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    held_out: torch.Tensor,
    sparsity: float,
    tokens: int,
) -> dict[str, Variant]:
    """The three forms by name: calibrated on ``tokens`` tokens of ``text``, and measured on ``held_out`` ``[T]``."""
    variants = {DENSE: Variant(DENSE, None)}
    for name, rule in ((PLAIN, "plain"), (TWO, "two_threshold")):
        notes.print(f"[dim]Calibrating: {name}[/]")
        config = cats_ext.calibrate(network, text, tokenizer=tokenizer, sparsity=sparsity, rule=rule, max_tokens=tokens)
        variants[name] = Variant(name, config)
    bos = window_bos(tokenizer)
    for variant in variants.values():
        notes.print(f"[dim]Measuring: {variant.name}[/]")
        with patched(network, variant.patch):
            if variant.config is not None:
                cats_ext.track_sparsity(network)
            variant.perplexity = perplexity(network, held_out, bos_token_id=bos).ppl
            variant.report = None if variant.config is None else cats_ext.sparsity_report(network)
    return variants


def _three(names: list[str]) -> list[tuple[int, str]]:
    """First, middle and last layer, each once."""
    picked = sorted({0, len(names) // 2, len(names) - 1})
    return [(index, names[index]) for index in picked]


def show_thresholds(console: Console, plain: Variant, source: str) -> dict[str, Any]:
    config = plain.config
    _heading(
        console,
        "Thresholds",
        f"In each layer, the value of |act(gate)| below which {config.sparsity:.0%} of the neurons lie, over "
        f"{config.calibration['tokens']:,} tokens of {source}. Reached: the share skipped on text it has not seen.",
    )
    table, target = _table("layer", "threshold", "target", "reached"), f"{config.sparsity:.1%}"
    reached = {layer.name: layer for layer in plain.report.layers}
    for index, name in _three(list(config.layers)):
        table.add_row(str(index), f"{config.thresholds[name].item():.4f}", target, f"{reached[name].up_sparsity:.1%}")
    table.add_section()
    table.add_row("all", "", target, f"{plain.report.up_sparsity:.1%}")
    _show(console, table)
    thresholds = {name: threshold.item() for name, threshold in config.thresholds.items()}
    return {"calibration": {"source": source, **config.calibration}, "thresholds": thresholds}


def show_quality(console: Console, variants: dict[str, Variant], tokens: int) -> list[dict[str, Any]]:
    _heading(
        console,
        "Quality",
        f"Perplexity on {tokens:,} tokens of other text; lower is better. The second threshold is on act(gate) * up "
        "and decides which rows of the down projection are read.",
    )
    table = _table("", "perplexity", "up skipped", "down skipped", "MLP weights read")
    for variant in variants.values():
        report = variant.report
        shares = (0.0, 0.0, 1.0) if report is None else (report.up_sparsity, report.down_sparsity, report.bytes_share)
        table.add_row(variant.name, f"{variant.perplexity:.2f}", *(f"{share:.1%}" for share in shares))
    _show(console, table)
    return [variant.to_dict() for variant in variants.values()]


def show_text(
    console: Console,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: dict[str, Variant],
    question: torch.Tensor,
    new_tokens: int,
) -> dict[str, Any]:
    from cats_ext.cli.generation import continue_prompt

    written = {}
    grid = Table.grid(padding=(0, 2))
    for variant in variants.values():
        with status(f"Writing: {variant.name} ..."), patched(network, variant.patch):
            written[variant.name] = continue_prompt(network, tokenizer, question, new_tokens)
        grid.add_row(variant.name, escape(written[variant.name].text.strip()))
    _show(console, grid)
    return {name: asdict(continuation) for name, continuation in written.items()}


def show_writing(
    console: Console,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: dict[str, Variant],
    question: torch.Tensor,
    new_tokens: int,
) -> dict[str, Any]:
    """As :func:`show_text` for the dense model and two thresholds, live in two columns, with tokens a second."""
    from cats_ext.cli.generation import continue_prompt, decoder

    engine, names = decoder(network), (DENSE, TWO)
    texts, titles, written = dict.fromkeys(names, ""), dict.fromkeys(names, "waiting"), {}

    def columns() -> Table:
        grid = Table(*(f"{name}: {titles[name]}" for name in names), box=None, expand=True, padding=(0, 2))
        grid.add_row(*(escape(texts[name].strip()) for name in names))
        return grid

    with Live(columns(), console=console, refresh_per_second=10) as live:
        for name in names:

            def write(piece: str, name: str = name) -> None:
                texts[name] += piece
                live.update(columns())

            with patched(network, variants[name].patch):
                continue_prompt(network, tokenizer, question, 4, exact_length=True, engine=engine)  # captures the step
                titles[name] = "writing"
                done = continue_prompt(network, tokenizer, question, new_tokens, write=write, engine=engine)
            titles[name], texts[name], written[name] = f"{done.tokens_per_second:.0f} tokens/s", done.text, done
            live.update(columns())
    return {name: asdict(continuation) for name, continuation in written.items()}


def show_speed(
    console: Console,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: dict[str, Variant],
    new_tokens: int,
    mlp_share: float,
    load: float,
) -> dict[str, Any]:
    """Decode speed, dense and sparse alternating, each warmed up, for the same number of tokens after the same text."""
    from cats_ext.cli.generation import continue_prompt, decoder, encode_prompt

    engine = decoder(network)
    ids = encode_prompt(tokenizer, "Once upon a time", chat=False)
    rates: dict[str, list[float]] = {DENSE: [], TWO: []}
    with status("Timing ...") as report:
        for turn in range(_ROUNDS):
            for name, times in rates.items():
                report(f"Timing: {name}, round {turn + 1} of {_ROUNDS} ...")
                with patched(network, variants[name].patch):
                    continue_prompt(network, tokenizer, ids, 4, exact_length=True, engine=engine)
                    timed = continue_prompt(network, tokenizer, ids, new_tokens, exact_length=True, engine=engine)
                    times.append(timed.tokens_per_second)
    dense, fast = (statistics.median(rates[name]) for name in (DENSE, TWO))
    worth = 1 / (1 - mlp_share * (1 - variants[TWO].report.bytes_share))
    _heading(
        console,
        "Speed",
        f"Median of {_ROUNDS} alternating rounds, one token at a time. At equal bandwidth the weights not read are "
        f"worth {worth:.2f}x; attention and the output layer stay as they are.",
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_row(DENSE, f"{dense:.1f} tokens/s")
    grid.add_row(TWO, f"{fast:.1f} tokens/s  ({fast / dense:.2f}x)")
    _show(console, grid)
    if fast < dense:
        console.print(
            "  [yellow]Not faster here.[/] Other work on the machine or the small size of the model hides the gain "
            f"(load average at the start: {load:.1f} on {os.cpu_count()} cores). 'cats bench' times the op alone, in "
            "the size of a 7B model."
        )
    return {"dense": dense, "sparse": fast, "speedup": fast / dense, "worth": worth, "rounds": rates}


def summary(variants: dict[str, Variant], speedup: float) -> str:
    """What was gained and what was lost, in one sentence."""
    dense, two = variants[DENSE], variants[TWO]
    change = two.perplexity / dense.perplexity - 1
    lost = f"{abs(change):.1%} {'higher' if change > 0 else 'lower'} (lower is better)"
    gained = (
        f"writes {speedup:.2f} times as fast" if speedup >= 1 else f"is not faster on this machine ({speedup:.2f}x)"
    )
    return (
        f"reading {two.report.bytes_share:.0%} of its MLP weights for each token, the model {gained}, and its "
        f"perplexity on text it has not seen is {lost if abs(change) >= 5e-4 else 'the same'}."
    )


def show_figure(console: Console, plain: Variant, path: Path) -> None:
    config = plain.config
    panels = [
        ActivationPanel(f"layer {index}", config.statistics[name].gate, config.thresholds[name].item())
        for index, name in _three(list(config.layers))
    ]
    title = f"Neurons below the threshold (grey) are skipped: {config.sparsity:.0%} in each layer"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_activations(panels, path, title=title)
    except OSError as error:
        raise cannot_be_written("--output", path, error) from error
    silu = all(layer.activation == "silu" for layer in config.layers.values())
    peak = " The peak at 0.28 is SiLU's lowest value, -0.28." if silu else ""
    _heading(console, "Figure", f"|act(gate)| in {len(panels)} layers, with the thresholds.{peak}")
    console.print(f"  [bold]{escape(str(path))}[/]", soft_wrap=True)


def _heading(console: Console, title: str, explanation: str) -> None:
    console.print(f"\n[bold cyan]{title}[/]  {explanation}")


def _table(*titles: str) -> Table:
    return result_table(titles, box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))


def _show(console: Console, content: Any) -> None:
    console.print(Padding(content, (0, 0, 0, 2)))
