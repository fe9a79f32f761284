"""What a long run shows, and how it cleans up: a progress bar, notes, and work that an interrupt must not cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def finish_despite_interrupt(action: Callable[[], object]) -> None:
    """Run ``action``. If it is interrupted, run it again, to its end, before the exception is passed on."""
    try:
        action()
    except BaseException:
        action()
        raise


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on standard error; yields the function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def note(message: str) -> None:
    """A line on standard error, where the bars are."""
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)
