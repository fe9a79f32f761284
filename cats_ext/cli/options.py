"""The options that commands share: their types for typer, and the checks of what they are set to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cats_ext._inputs import LARGEST_SEED
from cats_ext.cli import models, torchrun
from cats_ext.cli.text import is_text
from cats_ext.thresholds.rules import check_sparsity

_LARGEST = 2**31 - 1


def checked(check: Callable[[Any], object], *names: str, **options: Any) -> Any:
    """A typer option whose value, unless None, goes to ``check``; its ValueError is wrong usage, exit code 2."""

    def callback(value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return value

    return typer.Option(*names, callback=callback, **options)


def count(help: str, *names: str, least: int = 1, most: int = _LARGEST) -> Any:
    """An option for an integer from ``least`` to ``most``."""

    def check(value: int) -> None:
        if not least <= value <= most:
            raise ValueError(f"must be from {least} to {most}, got {value}")

    return checked(check, *names, help=help)


def text(help: str) -> Any:
    """An option for a text that a tokenizer can take."""

    def check(value: str) -> None:
        if not is_text(value):
            raise ValueError(f"must be UTF-8 text, got {value!r}")

    return checked(check, help=help)


def _check_temperature(value: float) -> None:
    # In float32, logits divided by less are infinite.
    if value != 0 and not 1e-6 <= value < math.inf:
        raise ValueError(f"must be 0 or at least 1e-6 and finite, got {value}")


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
    float | None,
    checked(
        partial(check_sparsity, "a sparsity"), help="In [0, 1); without it the one that the thresholds were saved with."
    ),
]
CatsDirectory = Annotated[Path | None, typer.Option("--cats", help="Directory written by 'cats calibrate'.")]
CheckWeights = Annotated[bool, typer.Option(help="Refuse thresholds of --cats that were made for other weights.")]
Temperature = Annotated[
    float, checked(_check_temperature, help="0 takes the most probable token (greedy), above 0 samples.")
]
Window = Annotated[int, count("Tokens in a window.", least=2)]


def seed(help: str) -> Any:
    """An option for what starts the random numbers."""
    return count(help, least=0, most=LARGEST_SEED)


SamplingSeed = Annotated[int, seed("For sampling.")]


def torch_dtype(precision: Precision | None, default: torch.dtype | str | None = None) -> torch.dtype | str | None:
    """The dtype of that name in torch."""
    return default if precision is None else getattr(torch, precision.value)


def numbers(option: str, text: str) -> list[float]:
    """The numbers in ``text``, which are separated by commas. Raises ValueError, with the option's name."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, got '{text}'") from None


def pick_device(name: str | None) -> torch.device:
    """The device of that name; None is CUDA if there is one, else the CPU. Raises ValueError if it is not there."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda" if torchrun.count() == 1 else f"cuda:{torchrun.local_rank()}")
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
