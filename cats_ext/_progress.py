"""For long runs: a progress bar, remarks on standard error, and clean-up that an interrupt does not cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def finish_despite_interrupt(action: Callable[[], object]) -> None:
    """Run ``action``, which can be repeated. After an exception, run it again completely before passing that on."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on standard error. Yields a function that advances it by one of ``total`` steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def duration(seconds: float) -> str:
    """A rough time for people, in seconds up to two minutes, then in minutes, then in hours."""
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 120 * length:
            return f"{max(1, round(seconds / length))} {unit}"
    return f"{seconds / 3600:.1f} h"


def note(message: str) -> None:
    """Print a line on standard error, where the bars are."""
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)
