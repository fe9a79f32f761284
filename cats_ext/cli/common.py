"""What the commands share beside their options: consoles, JSON, tables, one-sentence errors, and loading.

With ``--json`` standard output has the JSON document alone; everything for people goes to standard error.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

import cats_ext
from cats_ext._outputs import cannot_be_written, check_writable
from cats_ext.cli import models, torchrun
from cats_ext.cli.options import Precision, torch_dtype
from cats_ext.cli.streams import StandardOutputError
from cats_ext.native.library import LIBRARIES
from cats_ext.patching.apply import current_config, sparse_mlps
from cats_ext.thresholds.files import write_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

notes = Console(stderr=True, highlight=False)
"""The console for progress and remarks, with and without ``--json``."""

_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, NotImplementedError)
_USAGE_ERROR = typer.BadParameter.__base__  # of click, which typer has a copy of in some versions


class UnwrittenError(Exception):
    """A result could not be written to its file: with ``--json`` it is on standard output, beside the error."""

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


class Command(TyperCommand):
    """With ``--json``, wrong usage too leaves a JSON document on standard output."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        given = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _USAGE_ERROR as error:
            options = getattr(getattr(error, "param", None), "opts", ())
            for option, value in itertools.pairwise(given):
                if option in options and value[:40] not in error.message:  # typer's own errors may not have it
                    error.message += f", got {value[:40]!r}"
            if "--json" in given and torchrun.is_first_to_fail():
                print_json({"error": error.format_message()})
            raise


def debugging() -> bool:
    return os.environ.get("CATS_DEBUG", "0") not in ("", "0")


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an exception of ``command`` into a sentence on standard error and exit code 1, unless :func:`debugging`.

    With ``--json`` the sentence is on standard output too, as ``{"error": ...}``, of the first rank that fails.
    """

    @functools.wraps(command)
    def wrapped(**named: Any) -> None:
        notes.quiet = not torchrun.is_first()
        try:
            with torchrun.started(command.__name__):
                command(**named)
        except (typer.Exit, typer.Abort, _USAGE_ERROR, BrokenPipeError, StandardOutputError):
            raise
        except Exception as error:
            if debugging():
                raise
            message, notes.quiet = _sentence(error, named), False
            notes.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
            if named.get("json") and torchrun.is_first_to_fail():
                print_json({"error": message} | getattr(error, "document", {}))
            raise typer.Exit(1) from error

    return wrapped


def _sentence(error: Exception, named: dict[str, Any]) -> str:
    """What to say of ``error``, an exception of a command with the arguments ``named``."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in message:
        size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
        return f"there is not enough memory{f' for {size[1]} more' if size else ''}"
    if not isinstance(error, (*_EXPECTED, UnwrittenError)):
        return f"{type(error).__name__}: {message}. This is a defect; CATS_DEBUG=1 shows the traceback"
    if named.get("cats"):
        message = message.replace("check_weights=False to apply_cats", "--no-check-weights")
    argument, _, rest = message.partition(" ")  # an argument of the API is an option here
    if argument in (*named, "data") and rest.startswith(("must ", "is for ", "'")):
        return f"--{'text' if argument == 'data' else argument.replace('_', '-')} {rest}"
    return message


# --- output ----------------------------------------------------------------------------------------------------------


def output(as_json: bool) -> Console:
    """The console on which a command shows its result to a person."""
    return notes if as_json else Console(highlight=False)


def json_text(document: dict[str, Any]) -> str:
    """``document`` as JSON, with null for NaN and infinities, which JSON cannot express."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=2, allow_nan=False) + "\n"


def print_json(document: dict[str, Any]) -> None:
    """``document`` on standard output, at once: torchrun ends a rank when another one has failed."""
    sys.stdout.write(json_text(document))
    sys.stdout.flush()


def write_output(option: str, path: Path, text: str) -> None:
    """Write a file, all of it or nothing. Raises OSError, which names the ``option`` and the path."""
    if not torchrun.is_first():
        return
    check_writable(option, path, directory=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_together({path.resolve(): text.encode()})
    except OSError as error:
        raise cannot_be_written(option, path, error) from error


def result_table(titles: Sequence[str], **options: Any) -> Table:
    """A table of results: the first column is text, the others are numbers. ``options`` are Rich's for the table."""
    table = Table(**{"box": box.SIMPLE_HEAD} | options)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=number > 0)
    return table


def show_next(console: Console, result: str, commands: Iterable[str]) -> None:
    """Say what was written, and which ``cats`` commands take it."""
    console.print(f"{result} Next:", soft_wrap=True)
    for command in commands:
        console.print(f"  cats {escape(command)}", soft_wrap=True)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, plain lines elsewhere. Yields a function that shows another message."""
    if notes.is_terminal:
        with notes.status(message) as spinner:
            yield spinner.update
    else:
        notes.print(message)
        yield notes.print


def note_uncompiled(device: torch.device) -> None:
    """Say so if the kernels for ``device`` are missing, instead of the op's warning."""
    library = LIBRARIES["_C_cuda" if device.type == "cuda" else "_C"]
    if not library.loaded:
        notes.print(
            f"[yellow]No kernel for {device.type} is loaded, so the PyTorch reference runs: right, but slow. "
            f"{library.name}: {escape(library.reason or '')}[/]",
            soft_wrap=True,
        )
        warnings.filterwarnings("ignore", message="cats_ext has no compiled kernel", category=RuntimeWarning)


def note_drift(report: cats_ext.SparsityReport, what: str, tolerance: float = 0.05) -> None:
    """Say so if the sparsity of a layer on ``what`` differs from its target by more than ``tolerance``."""
    drifted = report.drifted(tolerance)
    if drifted:
        notes.print(
            f"[yellow]{escape(what)}: in {len(drifted)} of {len(report.layers)} layers the sparsity is more than "
            f"{tolerance:.0%} from its target, furthest in {escape(drifted[0].name)}. Is this text like the "
            "calibration's?[/]",
            soft_wrap=True,
        )


# --- models ----------------------------------------------------------------------------------------------------------


def load(
    name: str,
    device: torch.device,
    precision: Precision | None = None,
    cats: Path | None = None,
    check_weights: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, cats_ext.CatsConfig | None]:
    """As :func:`load_patched`, with the model dense: the config is left to be applied."""
    network, tokenizer, config = load_patched(name, device, precision, cats, check_weights=check_weights)
    return network if config is None else cats_ext.remove_cats(network), tokenizer, config


def load_patched(
    name: str,
    device: torch.device,
    precision: Precision | None,
    cats: Path | None,
    sparsity: float | None = None,
    check_weights: bool = True,
    default: torch.dtype | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, cats_ext.CatsConfig | None]:
    """The model, its tokenizer, and the config it is patched with; None for a dense model.

    Args:
        cats: directory of thresholds; without it those of the checkpoint are used, if it has any.
        sparsity: another sparsity than the thresholds were saved with.
        check_weights: False takes thresholds in ``cats`` that were made for other weights.
        default: the dtype without ``precision``; "auto" is that of the checkpoint, None the usual one of the device.
    """
    config = None if cats is None else _load_config(cats)
    note_uncompiled(device)
    silence_transformers()
    if name == models.DEMO_MODEL.name and not Path(name).is_dir():
        # Before the spinner starts: the download shows its own progress.
        models.obtain(models.DEMO_MODEL)
    with status(f"Loading {escape(name)} ..."):
        network, tokenizer = models.load_model(name, device=device, dtype=torch_dtype(precision, default))
    if config is not None:
        dense = cats_ext.remove_cats(network) if sparse_mlps(network) else network
        cats_ext.apply_cats(dense, config, check_weights=check_weights)
    patched = bool(sparse_mlps(network))
    if sparsity is not None:
        if not patched:
            raise ValueError(f"--sparsity {sparsity} needs thresholds: --cats DIRECTORY, or a model saved with them")
        cats_ext.set_sparsity(network, sparsity)
    return network, tokenizer, current_config(network) if patched else None


def silence_transformers() -> None:
    """No remarks and bars of its own, unless :func:`debugging`."""
    from transformers.utils import logging

    if not debugging():
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _load_config(directory: Path) -> cats_ext.CatsConfig:
    try:
        return cats_ext.CatsConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"--cats '{directory}': {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def patched(network: PreTrainedModel, patch: Callable[[PreTrainedModel], object] | None) -> Iterator[None]:
    """Inside, ``network`` is what ``patch`` makes of it, or dense if None; afterwards it is dense again."""
    if patch is None:
        yield
        return
    patch(network)
    try:
        yield
    finally:
        cats_ext.remove_cats(network)
