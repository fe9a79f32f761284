"""Every measured number in README.md and docs is written by bench.tables from a result file, with ratios that fit."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "bench" / "tables"
WRITERS = sorted(path.stem for path in TABLES.glob("*.py") if "\nPAGE = Page(" in path.read_text())
GENERATED = re.compile(r"<!-- ([\w-]+): begin -->.*?<!-- \1: end -->", re.DOTALL)
# A rate, a ratio, a time or a difference of accuracies: what only a measurement can give.
MEASURED = re.compile(
    r"\d\s?(?:tokens? (?:a|per) second|tokens/s|[GT]B/s|us|ms|microseconds|milliseconds|minutes|points)\b|\d\.\d+x"
)
HAND_WRITTEN = {"quality-evidence.md"}  # has numbers in its text, each beside its result file
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in HAND_WRITTEN)]
# Not measured: what an example or a definition says, and what is measured in a test.
ALLOWED = {"docs/performance.md": ['"1.31x"'], "docs/transformers.md": ["takes 0.1 ms a layer"]}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_are_those_of_the_result_files(name):
    page = importlib.import_module(f"bench.tables.{name}").PAGE
    assert page.render() == page.path.read_text(), f"run python bench tables.{name}"


def test_every_table_has_a_writer():
    written = {importlib.import_module(f"bench.tables.{name}").PAGE.path for name in WRITERS}
    pages = {page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if GENERATED.search(page.read_text())}
    assert pages == written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_measured_number_is_written_by_hand(page):
    text = GENERATED.sub("", page.read_text())
    for allowed in ALLOWED.get(str(page.relative_to(ROOT)), ()):
        assert allowed in text
        text = text.replace(allowed, "")
    assert not MEASURED.search(text), MEASURED.search(text)


def ratios(table: str):
    """``(dense, sparse, ratio)`` of each cell like ``80.7 us, 1.46x`` in a table with a column of dense numbers."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    (column,) = (i for i, title in enumerate(header) if title in ("dense", "fastest dense", "transformers"))
    for row in rows:
        for cell in row[column + 1 :]:
            if match := re.match(r"([\d.]+)(?: \w+)?, ([\d.]+)x", cell):
                yield float(row[column].split()[0]), float(match[1]), float(match[2])
            elif match := re.fullmatch(r"([\d.]+)x", cell):
                yield float(row[column]), float(row[column + 1]), float(match[1])


@pytest.mark.parametrize("path", ["README.md", "docs/performance.md", "docs/comparison.md"])
def test_ratios_are_those_of_the_numbers_beside_them(path):
    tables = re.findall(
        r"(?:^\|.*\n)+", "\n".join(m[0] for m in GENERATED.finditer((ROOT / path).read_text())), re.MULTILINE
    )
    found = [ratio for table in tables if re.search(r"\dx\b", table) for ratio in ratios(table)]
    assert len(found) >= 2
    for dense, sparse, ratio in found:
        assert ratio in (pytest.approx(dense / sparse, abs=0.00501), pytest.approx(sparse / dense, abs=0.00501))
