"""What the commands share: consoles, JSON output, one sentence for an error, options, and loading.

With ``--json`` standard output carries the JSON document alone; everything for people goes to standard error.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from cats_ext.cli import models
from cats_ext.ops.library import LIBRARIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cats_ext.patching.tracking import SparsityReport
    from cats_ext.thresholds.config import CatsConfig

notes = Console(stderr=True, highlight=False)
"""Where progress and remarks go, whatever the result's form."""

_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, NotImplementedError)


class Precision(str, Enum):
    """Dtypes of the command line; an Enum gives the choices in --help and exit code 2 for any other."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.value)


MODEL_HELP = f"Directory, hub name, .gguf file, or '{models.DEMO_MODEL.name}' for the demo model."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; without it cuda if there is one.")]
DType = Annotated[Precision | None, typer.Option(help="Without it float32 on cpu and bfloat16 on cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else.")]
TextFiles = Annotated[
    list[Path], typer.Option("--text", help="Text file: .txt, .jsonl (field 'text'), either also .gz. Repeatable.")
]
Sparsity = Annotated[
    float | None, typer.Option(help="In [0, 1); without it the one that the thresholds were saved with.")
]
CatsDirectory = Annotated[Path | None, typer.Option("--cats", help="Directory written by 'cats calibrate'.")]


def debugging() -> bool:
    return os.environ.get("CATS_DEBUG", "0") not in ("", "0")


def one_sentence_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an exception of ``command`` into a sentence on standard error and exit code 1; debugging, let it through."""

    @functools.wraps(command)
    def wrapped(*args: Any, **named: Any) -> None:
        try:
            command(*args, **named)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if debugging():
                raise
            if isinstance(error, _EXPECTED):
                message = str(error) or type(error).__name__
            else:
                message = f"{type(error).__name__}: {error}. This is a defect; CATS_DEBUG=1 shows the traceback"
            notes.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
            raise typer.Exit(1) from error

    return wrapped


def escape(text: str) -> str:
    """``text`` with nothing in it taken for Rich markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(text)


def output(as_json: bool) -> Console:
    """Where a command shows its result to a person."""
    return notes if as_json else Console(highlight=False)


def finite(value: Any) -> Any:
    """``value`` with null for what is not finite, since JSON has no word for that."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(document: dict[str, Any]) -> None:
    """``document`` on standard output."""
    sys.stdout.write(json.dumps(finite(document), indent=2, allow_nan=False) + "\n")


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got '{name}'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch {torch.__version__} finds no CUDA device ('cats env' says more)")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, plain lines elsewhere. Gives a function that says what is being done now."""
    if notes.is_terminal:
        with notes.status(message) as spinner:
            yield spinner.update
    else:
        notes.print(message)
        yield notes.print


def note_uncompiled(device: torch.device) -> None:
    """Say so if the kernels for ``device`` are missing, in place of the warning that the op would give."""
    library = LIBRARIES["_C_cuda" if device.type == "cuda" else "_C"]
    if not library.loaded:
        notes.print(
            f"[yellow]No kernel for {device.type} is loaded, so the PyTorch reference runs: right, but slow. "
            f"{library.name}: {escape(library.reason or '')}[/]",
            soft_wrap=True,
        )
        warnings.filterwarnings("ignore", message="cats_ext has no compiled kernel", category=RuntimeWarning)


def note_drift(report: SparsityReport, what: str, tolerance: float = 0.05) -> None:
    """Say so if layers are further than ``tolerance`` from the sparsity they were calibrated to."""
    drifted = report.drifted(tolerance)
    if drifted:
        notes.print(
            f"[yellow]{escape(what)}: in {len(drifted)} of {len(report.layers)} layers the sparsity is more than "
            f"{tolerance:.0%} from its target, furthest in {escape(drifted[0].name)}. Is this text like the "
            "calibration's?[/]",
            soft_wrap=True,
        )


def load(
    name: str, device: torch.device, precision: Precision | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model and its tokenizer; thresholds that a checkpoint carries are left out."""
    from cats_ext.patching.apply import remove_cats, sparse_mlps

    network, tokenizer = _load(name, device, precision)
    return (remove_cats(network) if sparse_mlps(network) else network), tokenizer


def load_patched(
    name: str, device: torch.device, precision: Precision | None, cats: Path | None, sparsity: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CatsConfig | None]:
    """The model, its tokenizer, and what it is patched with: thresholds of ``cats``, else its own, None if it has none.

    ``sparsity`` is another one than the thresholds were saved with.
    """
    from cats_ext.patching.apply import apply_cats, current_config, remove_cats, set_sparsity, sparse_mlps
    from cats_ext.thresholds.config import CatsConfig

    config = None if cats is None else CatsConfig.from_pretrained(cats)
    network, tokenizer = _load(name, device, precision)
    if config is not None:
        apply_cats(remove_cats(network) if sparse_mlps(network) else network, config)
    patched = bool(sparse_mlps(network))
    if sparsity is not None:
        if not patched:
            raise ValueError(f"--sparsity {sparsity} needs thresholds: --cats DIRECTORY, or a model saved with them")
        set_sparsity(network, sparsity)
    return network, tokenizer, current_config(network) if patched else None


def _load(
    name: str, device: torch.device, precision: Precision | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``models.load_model``, without the loader's own bars and remarks."""
    from transformers.utils import logging

    note_uncompiled(device)
    if not debugging():
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if name == models.DEMO_MODEL.name and not Path(name).is_dir():
        # Outside the spinner, since the download draws its own progress.
        models.obtain(models.DEMO_MODEL)
    with status(f"Loading {escape(name)} ..."):
        return models.load_model(name, device=device, dtype=precision and precision.dtype)
