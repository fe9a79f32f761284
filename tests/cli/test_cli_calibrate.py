"""``cats calibrate``: what it writes and prints, and what it refuses."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.models import LAYERS

import cats_ext
from cats_ext.calibration import passes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calibrate_writes_what_the_api_would(model_dir, text_file, thresholds):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = text_file.read_text()
    expected = cats_ext.calibrate(model, text, tokenizer=tokenizer, rule="plain", sequence_length=128, progress=False)
    written = cats_ext.CatsConfig.from_pretrained(thresholds)
    assert written.thresholds.keys() == expected.thresholds.keys() and len(written.thresholds) == LAYERS
    for name, threshold in expected.thresholds.items():
        assert torch.equal(threshold, written.thresholds[name])


def test_calibrate_json_and_options(model_dir, text_file, tmp_path):
    more = tmp_path / "more.jsonl.gz"
    with gzip.open(more, "wt") as file:
        file.writelines(json.dumps({"text": "another cat " * 20, "id": i}) + "\n" for i in range(3))
    document = json_of(
        *("calibrate", model_dir, "--text", text_file, "--text", more, "-o", tmp_path / "out" / "deep"),
        *("--rule", "two_threshold", "--sparsity", 0.6, "--down-sparsity", 0.75, "--seed", 3),
        *("--max-tokens", 512, "--sequence-length", 64, "--batch-size", 2, "--gate-power", 1),
    )
    assert document["directory"] == str(tmp_path / "out" / "deep")
    assert document["rule"] == "two_threshold" and document["gate_power"] == 1
    assert document["calibration"]["tokens"] == 512 and document["calibration"]["seed"] == 3
    config = cats_ext.CatsConfig.from_pretrained(document["directory"])
    (layer, *_) = config.layers.values()
    assert layer.up_sparsity == pytest.approx(0.45) and layer.down_sparsity == 0.75
    assert config.bytes_share == pytest.approx(document["bytes_share"])


def test_three_thresholds_from_calibration_to_text(model_dir, text_file, tmp_path):
    out, text = tmp_path / "out", ("--text", text_file, "--sequence-length", 64)
    document = json_of("calibrate", model_dir, *text, "-o", out, "--rule", "three_threshold", "--sparsity", 0.6)
    (layer, *_) = document["layers"].values()
    assert document["rule"] == "three_threshold" and layer["input_sparsity"] == pytest.approx(0.36)
    measured = json_of("eval", model_dir, "--cats", out, "--text", text_file, "--window", 128, "--curve", 0.3)
    first, second = (variant["reached"] for variant in measured["text"]["variants"])
    assert first["input_target"] == pytest.approx(0.36) and second["input_target"] == pytest.approx(0.18)
    assert first["bytes_share"] < second["bytes_share"]
    generated = json_of("generate", model_dir, "--cats", out, "--prompt", "the cat", "--max-new-tokens", 8)
    assert generated["text"]
    error = error_of("calibrate", model_dir, *text, "-o", out, "--rule", "three_threshold", "--allocation", "search")
    assert "--allocation must be 'uniform' for the rule 'three_threshold', got 'search'" in error


def test_calibrate_says_what_to_do_next(model_dir, text_file, tmp_path):
    result = cats("calibrate", model_dir, "--text", text_file, "-o", tmp_path / "out")
    assert result.exit_code == 0 and f"{LAYERS} layers calibrated" in result.stdout
    assert f"cats generate {model_dir} --cats {tmp_path / 'out'}" in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("--sparsity", value, "--sparsity must be in [0, 1)") for value in (-0.1, 1, 1.5, "nan")),
        ("--budget", 0.2, "budget must be in (1/3, 1]"),
        ("--gate-power", 2, "--gate-power must be in [0, 1], got 2.0"),
        ("--spread", 0, "spread must be a number in (0, 1], got 0.0"),
    ],
)
def test_calibrate_refuses_settings_before_loading(option, value, message):
    assert message in error_of("calibrate", "./missing", "--text", "missing.txt", "-o", "out", option, value)


def test_calibrate_spreads_a_budget(model_dir, text_file, tmp_path):
    arguments = ("--rule", "two_threshold", "--importance", "gradient", "--gate-power", 0.5, "--sequence-length", 128)
    search = (*arguments, "--allocation", "search")
    result = cats("calibrate", model_dir, "--text", text_file, "-o", tmp_path, "--budget", 0.6, *search)
    assert result.exit_code == 0, result.stderr
    assert "with the budget searched" in " ".join(result.stdout.split())
    config = cats_ext.CatsConfig.from_pretrained(tmp_path)
    assert config.bytes_share <= 0.6 + 1e-6 and config.losses is not None and config.importance == "gradient"
    assert config.sparse_prefill
    uniform = ("--dense-prefill", "--checkpoint", tmp_path / "checkpoint")
    json_of("calibrate", model_dir, "--text", text_file, "-o", tmp_path, "--budget", 0.6, *arguments, *uniform)
    config = cats_ext.CatsConfig.from_pretrained(tmp_path)
    assert config.losses is None and config.bytes_share == pytest.approx(0.6) and not config.sparse_prefill
    assert not (tmp_path / "checkpoint").exists()
    both = ("--budget", 0.6, "--sparsity", 0.5)
    assert "give sparsity or budget" in error_of("calibrate", model_dir, "--text", text_file, "-o", tmp_path, *both)


def test_calibrate_refuses_bad_text(model_dir, tmp_path):
    out = tmp_path / "out"

    def message(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return error_of("calibrate", model_dir, "--text", tmp_path / name, "-o", out)

    assert "does not exist" in error_of("calibrate", model_dir, "--text", tmp_path / "missing.txt", "-o", out)
    assert "no text in" in message("empty.txt", b" \n")
    assert "got 5" in message("short.txt", b"a cat")
    assert "not UTF-8" in message("latin.txt", "café".encode("latin-1") * 99)
    assert "not a complete gzip file" in message("cut.txt.gz", gzip.compress(b"a cat " * 999)[:-9])
    assert "not a complete gzip file" in message("no.txt.gz", b"a cat " * 99)
    assert "line 2 of" in message("bad.jsonl", b'{"text": "a cat"}\n{"txt": "a cat"}\n')
    assert "must be a string, got int" in message("number.jsonl", b'{"text": 1}\n')
    assert not out.exists()


@pytest.mark.parametrize("option", ["--output", "--checkpoint"])
def test_calibrate_tries_to_write_before_it_reads_anything(option, tmp_path):
    (tmp_path / "file").touch()
    other = ("--output", tmp_path / "out") if option == "--checkpoint" else ()
    for path in (tmp_path / "file" / "deep", "/proc/deep", tmp_path / ("x" * 300)):
        message = error_of("calibrate", "./missing", "--text", "missing.txt", option, path, *other)
        assert f"{option} '{path}' cannot be written: " in message
    if option == "--checkpoint":
        assert f"--checkpoint '{tmp_path}' is a directory" in error_of(
            "calibrate", "./missing", "--text", "missing.txt", option, tmp_path, *other
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_loses_nothing(model_dir, text_file, tmp_path, monkeypatch):
    arguments = ("calibrate", model_dir, "--text", text_file, "-o", tmp_path / "out", "--rule", "plain")
    save = cats_ext.CatsConfig.save_pretrained

    def full(config, directory):
        if str(directory) == str(tmp_path / "out"):
            raise OSError(28, "No space left on device")
        save(config, directory)

    monkeypatch.setattr(cats_ext.CatsConfig, "save_pretrained", full)
    message = error_of(*arguments)
    start = f"--output '{tmp_path / 'out'}' cannot be written: No space left on device; the thresholds are in "
    kept = message.partition(start)[2]
    assert len(cats_ext.CatsConfig.from_pretrained(kept).layers) == LAYERS
    shutil.rmtree(kept)
    checkpoint = ("--checkpoint", tmp_path / "counts")
    message = error_of(*arguments, *checkpoint)
    assert f"the same command continues from --checkpoint {tmp_path / 'counts'}" in message
    monkeypatch.undo()
    monkeypatch.setattr(passes, "_options", None)  # no pass runs
    json_of(*arguments, *checkpoint)
    assert not (tmp_path / "counts").exists()


def test_calibrate_refuses_a_file_as_output(model_dir, text_file):
    assert "is not a directory" in error_of("calibrate", model_dir, "--text", text_file, "-o", text_file)
