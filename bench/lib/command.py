"""The command line that benchmarks share."""

from __future__ import annotations

import argparse
from importlib.machinery import ModuleSpec
from pathlib import Path


def command(
    spec: ModuleSpec, description: str, output: str, *, required: bool = False, rows: bool = True
) -> argparse.ArgumentParser:
    """A parser with --output, whose help is ``output``, and with --commit if there are result ``rows``."""
    parser = argparse.ArgumentParser(
        prog="python bench " + spec.name.removeprefix("bench."),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=required, help=output)
    if rows:
        parser.add_argument("--commit", help="for the result rows; default: that of this repository")
    return parser
