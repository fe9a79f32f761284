"""Markdown tables from result files, and their places in a document: between ``<!-- NAME: begin -->`` and ``end``."""

from __future__ import annotations

from collections.abc import Callable

from bench.lib import results
from bench.lib.machine import ROOT


def read(name: str) -> list[dict[str, str]]:
    return results.read_rows(ROOT / "bench" / "results" / name)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def link(name: str) -> str:
    return f"[`{name}`](bench/results/{name})"


def image(name: str, text: str) -> str:
    return f"![{text}](bench/results/{name})"


def ratio(more: str, less: str) -> str:
    """``more / less`` of two numbers as they are shown, so that a reader who divides them gets the same."""
    return f"{float(more) / float(less):.2f}x"


def source(name: str, row: dict[str, str]) -> str:
    return f"{link(name)}, torch {row['torch']}, commit {row['commit']}, {row['date']}"


def source_by_tokens(name: str, rows: list[dict[str, str]]) -> str:
    """As :func:`source`, of a file whose rows of more tokens may be from other commits."""
    commits: dict[int, str] = {}  # the last row of so many tokens decides
    for row in rows:
        commits[int(row["tokens"])] = row["commit"]
    about, before = source(name, rows[0]), rows[0]["commit"]
    for tokens in sorted(commits):
        if commits[tokens] != before:
            about += f"; from {tokens} tokens on commit {commits[tokens]}"
            before = commits[tokens]
    return about


class Page:
    """A document, ``path`` from the repository's root, and what makes each of its tables."""

    def __init__(self, path: str, tables: dict[str, Callable[[], str]]) -> None:
        self.path, self.tables = ROOT / path, tables
        self.up = "../" * path.count("/")

    def render(self) -> str:
        """The document with every table as the result files have it; one without its file says so."""
        page = self.path.read_text()
        for name, make in self.tables.items():
            begin, end = (f"<!-- {name}: {mark} -->" for mark in ("begin", "end"))
            before, rest = page.split(begin)
            try:
                text = make().replace("(bench/", f"({self.up}bench/")
            except FileNotFoundError:
                text = "Not measured yet."
            page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
        return page

    def write(self) -> None:
        self.path.write_text(self.render())
