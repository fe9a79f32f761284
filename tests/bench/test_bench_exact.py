"""The benchmarks of models that are sparse by themselves run, small and on the CPU, and fill their tables."""

from __future__ import annotations

import multiprocessing
import re
import sys
import threading

import pytest

from bench.decode import exact as models
from bench.kernels import exact as layers
from bench.lib.results import read_rows
from bench.tables import exact as tables
from bench.tables.pages import Page, read, source_by_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def run(monkeypatch, module, output, arguments: str) -> list[dict[str, str]]:
    monkeypatch.setattr(sys, "argv", ["exact.py", *arguments.split(), "--commit", "abc", "--output", str(output)])
    module.main()
    rows = read_rows(output)
    assert {row["commit"] for row in rows} == {"abc"}
    monkeypatch.setattr(tables, "read", lambda name: rows)
    return rows


def test_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "compiled", lambda function, tuned: function)
    monkeypatch.setattr(layers, "DEVICE", layers.torch.device("cpu"))
    sizes = "--shrink 32 --layers 2 --repetitions 1 --tokens 1 3"
    rows = run(monkeypatch, layers, tmp_path / "exact.csv", sizes)
    assert {(row["layer"], row["tokens"]) for row in rows} == {(name, n) for name in layers.KINDS for n in "13"}
    for row in rows:
        dense, shared = row["path"].startswith("dense"), row["tokens"] == "3"
        assert (float(row["rows_read"]) == 1) == dense and float(row["us"]) > 0
        assert dense or 0.02 < float(row["rows_read"]) < (0.4 if shared else 0.2)
    lines = tables.layers().splitlines()
    assert lines[2] == "| one MLP, bf16 |  | 1 token | 3 tokens |"
    titles = [line.split("|")[2].strip() for line in lines[4:]]
    assert titles == ["fastest dense", *list(tables.PATHS)[:3]] * 2 + ["fastest dense", *tables.PATHS] + titles[:4]
    assert all(re.search(r"\| \d+\.\d us, \d+\.\d\dx \|", line) for line in lines if "zeros skipped" in line)


def test_models(monkeypatch, tmp_path):
    def threads(*arguments) -> list:
        pipes = [multiprocessing.Pipe() for _ in models.PATHS]
        for path, (_, there) in zip(models.PATHS, pipes, strict=True):
            name, *lengths = arguments
            threading.Thread(target=models.serve, args=(there, name, path, *lengths), daemon=True).start()
        return [here for here, _ in pipes]

    monkeypatch.setattr(models, "start", threads)
    names = "tiny tiny-gemma-3n"
    rows = run(
        monkeypatch,
        models,
        tmp_path / "decode.csv",
        f"--model {names} --modes captured --prompt 8 --new-tokens 4 --turns 2",
    )
    assert [(row["model"], row["path"]) for row in rows] == [(n, p) for n in names.split() for p in models.PATHS]
    sparsity = [float(row["sparsity"]) for row in rows]
    assert sparsity[::2] == [0, 0] and 0.4 < sparsity[1] < 0.6 and sparsity[3] > 0.9
    monkeypatch.setattr(tables, "TITLES", {name: name for name in names.split()})
    assert re.search(r"\| tiny-gemma-3n, `DecodeEngine` \| \d+\.\d \| \d+\.\d, \d+\.\d\dx \|", tables.models())


def test_pages_have_what_is_measured(tmp_path):
    (tmp_path / "page.md").write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in "ab"))
    page = Page(str(tmp_path / "page.md"), {"a": lambda: str(read("no such file.csv")), "b": lambda: "a table"})
    assert "begin -->\nNot measured yet.\n" in page.render() and "begin -->\na table\n" in page.render()


def test_the_source_of_rows_of_several_commits():
    row = {"torch": "2", "date": "2026-01-01"}
    rows = [
        row | {"tokens": str(tokens), "commit": commit} for tokens, commit in [(1, "a"), (2, "a"), (4, "b"), (8, "c")]
    ]
    assert source_by_tokens("x.csv", rows).endswith(
        "commit a, 2026-01-01; from 4 tokens on commit b; from 8 tokens on commit c"
    )
    assert source_by_tokens("x.csv", rows[:2]).endswith("commit a, 2026-01-01")
