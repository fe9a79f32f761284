"""``cats report``: a directory of thresholds and measurements as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cats_ext._outputs import check_writable
from cats_ext.cli.common import escape, notes, write_output
from cats_ext.evaluation.html_report import html_report


def report(
    directory: Annotated[Path, typer.Argument(help="Written by 'cats calibrate', with results of 'cats eval' in it.")],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; without it report.html in the directory.")
    ] = None,
) -> None:
    """Write one self-contained HTML page on thresholds and what they cost, for a colleague.

    Figures: activations with their thresholds, sparsity reached in each layer, and
    perplexity against the weights read where 'cats eval --curve' measured it.

    Examples:

    $ cats report thresholds

    $ cats eval MODEL --cats thresholds --text held-out.txt --curve 0.3,0.7 -o thresholds/eval.json
    """
    target = out or directory / "report.html"
    check_writable("--output", target, directory=False)
    page = html_report(directory)
    write_output("--output", target, page)
    notes.print(f"[bold]{escape(str(target))}[/]", soft_wrap=True)
