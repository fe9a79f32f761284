"""The options that commands share: their types for typer, and the checks of what they are set to."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from cats_ext.cli import models


def choices(name: str, values: Iterable[str]) -> type[Enum]:
    """An Enum for an option: typer lists its ``values`` in --help and exits with code 2 for any other."""
    return Enum(name, {value.upper(): value for value in values}, type=str)


Precision = choices("Precision", ("float32", "bfloat16", "float16"))
_MODEL_HELP = f"Directory, hub name, .gguf file, or '{models.DEMO_MODEL.name}' for the demo model."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; without it cuda if there is one.")]
DType = Annotated[Precision | None, typer.Option(help="Without it float32 on cpu and bfloat16 on cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, and nothing else.")]
_TEXT = typer.Option("--text", help="Text file: .txt, .jsonl (field 'text'), either also .gz. Repeatable.")
TextFiles = Annotated[list[Path], _TEXT]
OptionalTextFiles = Annotated[list[Path] | None, _TEXT]
Sparsity = Annotated[
    float | None, typer.Option(help="In [0, 1); without it the one that the thresholds were saved with.")
]
CatsDirectory = Annotated[Path | None, typer.Option("--cats", help="Directory written by 'cats calibrate'.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token (greedy), above 0 samples.")]
SamplingSeed = Annotated[int, typer.Option(help="For sampling.")]
Window = Annotated[int, typer.Option(help="Tokens in a window.")]


def torch_dtype(precision: Precision | None, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype of that name in torch."""
    return default if precision is None else getattr(torch, precision.value)


def numbers(option: str, text: str) -> list[float]:
    """The numbers in ``text``, which are separated by commas. Raises ValueError, with the option's name."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, got '{text}'") from None


def check_output(out: Path | None, *, directory: bool) -> None:
    """Raise OSError if ``--output`` cannot be a directory, or a file. Called before the work, which would be lost."""
    if out is not None and directory and out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--output '{out}' exists and is not a directory")
    if out is not None and not directory and out.is_dir():
        raise IsADirectoryError(f"--output '{out}' is a directory")


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA if there is one, else the CPU. Raises ValueError if it is not there."""
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
