"""The benchmark of whole models runs, resumes its files, stops in time, and its figure is drawn from what it wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.decode import gpt_fast, speed
from bench.lib.results import read_rows
from bench.tables import decode_figure

pytestmark = pytest.mark.usefixtures("one_thread")


def run(monkeypatch, output: Path, *arguments: str) -> None:
    small = "--model tiny --prompt 16 --first-token 8 --new-tokens 6 --eager-tokens 4"
    small += " --repetitions 1 --turns 2 --commit abc"
    monkeypatch.setattr(sys, "argv", ["speed.py", *small.split(), "--output", str(output), *arguments])
    speed.main()


def test_rows_and_figure(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--modes", "captured")
    run(monkeypatch, tmp_path, "--modes", "eager", "compiled", "deferred", "--sparsity", "0.7", "--prompt", "16", "24")
    rows, first = read_rows(tmp_path / "decode.csv"), read_rows(tmp_path / "first_token.csv")
    assert [(row["mode"], row["prompt"], float(row["sparsity"])) for row in rows] == [
        *(("captured", "16", s) for s in (0.0, 0.5, 0.7, 0.9)),
        *(("eager", prompt, s) for s in (0.7, 0.0) for prompt in ("16", "24")),
        *((mode, prompt, s) for prompt in ("16", "24") for mode in ("compiled", "deferred") for s in (0.7, 0.0)),
    ]
    assert {row["commit"] for row in rows} == {"abc"}
    assert [(row["prompt"], row["sparsity"]) for row in first] == [("8", "0.7")] and float(first[0]["of_dense"]) > 0
    assert all(float(row["speedup"]) == 1 for row in rows if row["sparsity"] == "0.0")
    assert all(abs(float(row["reached"]) - float(row["sparsity"])) < 0.1 for row in rows if row["reached"])
    decode_figure.draw(tmp_path / "decode.csv", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_nothing_is_started_after_its_time(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--modes", "captured", "--seconds", "0")
    assert "out of time" in capsys.readouterr().out and not (tmp_path / "decode.csv").exists()


def test_a_peer_that_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"--peer-path .*: there is no generate\.py, so it is no checkout of gpt-fast"):
        gpt_fast.load(tmp_path)
