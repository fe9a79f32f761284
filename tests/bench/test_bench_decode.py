"""The benchmark of whole models runs, resumes its files, stops in time, and its figure is drawn from what it wrote."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "bench"), *sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, output: Path, *arguments: str) -> None:
    import bench_decode

    small = "--model tiny --prompt 16 --first-token 8 --new-tokens 6 --eager-tokens 4"
    small += " --repetitions 1 --turns 2 --commit abc"
    monkeypatch.setattr(sys, "argv", ["bench_decode.py", *small.split(), "--output", str(output), *arguments])
    bench_decode.main()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_figure(monkeypatch, tmp_path):
    import plot_decode

    run(monkeypatch, tmp_path, "--modes", "captured")
    run(monkeypatch, tmp_path, "--modes", "eager", "compiled", "deferred", "--sparsity", "0.7", "--prompt", "16", "24")
    rows, first = read(tmp_path / "decode.csv"), read(tmp_path / "first_token.csv")
    assert [(row["mode"], row["prompt"], float(row["sparsity"])) for row in rows] == [
        *(("captured", "16", s) for s in (0.0, 0.5, 0.7, 0.9)),
        *(("eager", prompt, s) for s in (0.7, 0.0) for prompt in ("16", "24")),
        *((mode, prompt, s) for prompt in ("16", "24") for mode in ("compiled", "deferred") for s in (0.7, 0.0)),
    ]
    assert {row["commit"] for row in rows} == {"abc"}
    assert [(row["prompt"], row["sparsity"]) for row in first] == [("8", "0.7")] and float(first[0]["of_dense"]) > 0
    for row in rows:
        assert float(row["ms_per_token"]) * float(row["tokens_per_s"]) == pytest.approx(1000, rel=1e-2)
    assert all(float(row["speedup"]) == 1 for row in rows if row["sparsity"] == "0.0")
    assert all(abs(float(row["reached"]) - float(row["sparsity"])) < 0.1 for row in rows if row["reached"])
    plot_decode.draw(tmp_path / "decode.csv", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_nothing_is_started_after_its_time(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--modes", "captured", "--seconds", "0")
    assert "out of time" in capsys.readouterr().out and not (tmp_path / "decode.csv").exists()
