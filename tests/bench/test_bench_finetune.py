"""The tuning experiment's tables say what was measurement."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import VOCABULARY, tiny_model, tokens

import cats_ext
from bench.lib.results import read_rows
from bench.training import measurement, steps

FACTS = {"device": "a card", "torch": "2", "commit": "abc", "date": "today"}


@pytest.fixture
def adapted():
    """A patched model under adapters that change something."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    cats_ext.apply_cats(model, cats_ext.calibrate(model, tokens(256), sparsity=0.6, progress=False))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()


def line(step, ppl, first, second, layers=None, **more):
    answers = {"first": first, "second": second}
    return {"step": step, "c4": ppl, "wikitext": ppl / 2, "answers": answers, "layers": layers} | more


def test_each_variant_is_compared_with_the_dense_one_at_the_same_step(tmp_path):
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
    measurement.write_tables(work, out, [*lines, "waiting"], FACTS)
    quality = {(row["name"], row["step"], row["task"]): row for row in read_rows(out / "quality.csv")}
    assert len(quality) == 4 * 3
    found = quality["sparse", "25", "mean"]
    assert float(found["accuracy"]) == pytest.approx((0.75 + 0.25) / 2)
    assert float(found["from_dense"]) == pytest.approx((0.25 + 0.25) / 2)
    assert (found["c4_ppl"], found["bytes"], found["items"], found["commit"]) == ("25", "0.7", "8", "abc")
    assert float(quality["sparse", "0", "first"]["from_dense"]) == -0.75
    assert quality["dense", "25", "mean"]["from_dense"] == "0" and quality["dense", "0", "mean"]["bytes"] == ""
    layers = read_rows(out / "layers.csv")
    assert [(row["name"], row["step"], row["up"], row["down_target"]) for row in layers] == [
        ("sparse", "0", "0.4", "0.7"),
        ("sparse", "25", "0.3", "0.7"),
    ]
    assert not (out / "tuned.csv").exists()


def test_what_is_measured_is_the_model_with_merged_adapters(adapted, tmp_path):
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    requests = [[[1, 2, 3], [token]] for token in range(2, VOCABULARY, 5)]
    tasks = {"task": [{"answer": 0, "requests": requests[:2]}, {"answer": None, "requests": requests[2:3]}]}
    ids = {"c4": tokens(300), "wikitext": tokens(200)}
    measurement.Measure(tmp_path / "rows", [0], ids, tasks, 64).measure(adapted, 0)
    (row,) = measurement._lines(tmp_path / "rows")
    assert adapted.training and all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    assert row["bytes"] == pytest.approx(0.6, abs=0.1) and len(row["answers"]["task"]) == 2
    merged = adapted.merge_and_unload().eval()
    assert row["c4"] == pytest.approx(cats_ext.evaluation.perplexity(merged, ids["c4"], progress=False).ppl, rel=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_steps_of_both_kinds_in_turns(tuning):
    times, peaks = steps.measure("tiny", tuning, (1, 20), 2, torch.device("cpu"))
    assert {kind: len(each) for kind, each in times.items()} == {"dense": 2, "patched": 2}
    assert all(seconds > 0 for each in times.values() for seconds in each) and set(peaks) == {"dense", "patched"}
