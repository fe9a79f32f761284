"""The tuning experiment's tables say what was measured."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

FACTS = {"device": "a card", "torch": "2", "commit": "abc", "date": "today"}


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "bench"), *sys.path])
    import finetune_measure

    return finetune_measure


def line(step, ppl, first, second, layers=None, **more):
    answers = {"first": first, "second": second}
    return {"step": step, "c4": ppl, "wikitext": ppl / 2, "answers": answers, "layers": layers} | more


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_variant_is_compared_with_the_dense_one_at_the_same_step(measured, tmp_path):
    work, out = tmp_path / "work", tmp_path
    work.mkdir()
    lines = {
        "dense": [line(0, 30.0, "1111", "0000"), line(25, 20.0, "1100", "0000")],
        "sparse": [
            line(0, 40.0, "1000", "0000", [[0.4, 0.5, 0.6, 0.7]], bytes=0.6, up=0.4, down=0.6),
            line(25, 25.0, "1110", "0001", [[0.3, 0.5, 0.5, 0.7]], bytes=0.7, up=0.3, down=0.5),
        ],
    }
    for name, each in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in each)
        (work / f"{name}.jsonl").write_text(text + '{"step": 50, "c4"')  # being written
    measured.write_tables(work, out, [*lines, "waiting"], FACTS)
    quality = {(row["name"], row["step"], row["task"]): row for row in rows(out / "quality.csv")}
    assert len(quality) == 4 * 3
    found = quality["sparse", "25", "mean"]
    assert float(found["accuracy"]) == pytest.approx((0.75 + 0.25) / 2)
    assert float(found["from_dense"]) == pytest.approx((0.25 + 0.25) / 2)
    assert (found["c4_ppl"], found["bytes"], found["items"], found["commit"]) == ("25", "0.7", "8", "abc")
    assert float(quality["sparse", "0", "first"]["from_dense"]) == -0.75
    assert quality["dense", "25", "mean"]["from_dense"] == "0" and quality["dense", "0", "mean"]["bytes"] == ""
    layers = rows(out / "layers.csv")
    assert [(row["name"], row["step"], row["up"], row["down_target"]) for row in layers] == [
        ("sparse", "0", "0.4", "0.7"),
        ("sparse", "25", "0.3", "0.7"),
    ]
    assert not (out / "tuned.csv").exists()
