"""Result files: CSV, whole after every row; each row carries the facts of the run (``machine.facts``)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """Replaces ``path`` at once; ``columns`` in the order of their first occurrence if not given."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


class ResultFile:
    """A table that grows row by row, each with ``facts`` added.

    Without ``path`` rows are only kept. ``append`` continues a file that is there already, else it is replaced.
    ``digits`` rounds floats to so many significant digits.
    """

    def __init__(
        self, path: Path | None, facts: dict[str, Any], *, append: bool = False, digits: int | None = None
    ) -> None:
        self.path, self.facts, self.digits = path, facts, digits
        self.rows: list[dict[str, Any]] = read_rows(path) if append and path and path.exists() else []

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows += [{key: self._rounded(value) for key, value in (row | self.facts).items()} for row in rows]
        if self.path:
            write_rows(self.path, self.rows)

    def _rounded(self, value: Any) -> Any:
        return f"{value:.{self.digits}g}" if self.digits and isinstance(value, float) else value
