"""``cats demo`` on a tiny model: its numbers, its figure, and what it refuses before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.models import LAYERS

import cats_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_on_a_directory(model_dir, tmp_path):
    arguments = ("demo", "--model", model_dir, "--output", tmp_path / "figures", "--calibration-tokens", 2048)
    arguments += ("--eval-tokens", 600, "--max-new-tokens", 6, "--device", "cpu", "--prompt", "a cat")
    document = json_of(*arguments)
    assert document["layers"] == LAYERS and len(document["thresholds"]) == LAYERS
    assert document["calibration"]["tokens"] == 2048
    dense, plain, two = document["variants"]
    assert dense["reached"] is None
    assert all(variant["perplexity"] > 1 for variant in (dense, plain, two))
    for variant, up, down in ((plain, 0.5, 0.5), (two, 0.375, 0.625)):
        assert variant["reached"]["up_target"] == pytest.approx(up)
        assert variant["reached"]["up_sparsity"] == pytest.approx(up, abs=0.1)
        assert variant["reached"]["down_sparsity"] == pytest.approx(down, abs=0.1)
        assert variant["reached"]["bytes_share"] == pytest.approx(2 / 3, abs=0.1)
    for name in ("dense", "CATS, one threshold", "CATS, two thresholds"):
        assert document["continuations"][name]["new_tokens"] <= 6
    speed = document["tokens_per_second"]
    assert speed["speedup"] == pytest.approx(speed["sparse"] / speed["dense"])
    assert [len(times) for times in speed["rounds"].values()] == [3, 3]
    assert speed["worth"] == pytest.approx(1 / (1 - document["mlp_share"] * (1 - two["reached"]["bytes_share"])))
    assert Path(document["figure"]) == tmp_path / "figures" / "cats_demo.png"
    assert Path(document["figure"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_demo_on_a_gpu(model_dir, text_file, tmp_path):
    document = json_of("demo", "--model", model_dir, "--text", text_file, "-o", tmp_path, "--device", "cuda:0")
    assert document["dtype"] == "bfloat16" and document["compiled"]
    assert document["variants"][1]["reached"]["up_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_demo_on_text_of_the_user(model_dir, text_file, tmp_path):
    figure = tmp_path / "mine.png"
    arguments = ("demo", "--model", model_dir, "--text", text_file, "-o", figure, "--sparsity", 0.7)
    result = cats(*arguments, "--max-new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for heading in ("Thresholds", "Quality", "Text", "Speed", "Figure"):
        assert f"\n{heading} " in result.stdout
    assert "first four fifths of text.txt" in result.stdout and str(figure) in result.stdout.replace("\n", "")
    assert figure.exists()


def test_demo_at_sparsity_0_changes_nothing(model_dir, text_file, tmp_path):
    arguments = ("demo", "--model", model_dir, "--text", text_file, "-o", tmp_path, "--sparsity", 0)
    document = json_of(*arguments, "--max-new-tokens", 4, "--device", "cpu")
    dense, plain, two = (variant["perplexity"] for variant in document["variants"])
    assert plain == pytest.approx(dense, rel=1e-5) and two == pytest.approx(dense, rel=1e-5)
    assert document["tokens_per_second"]["worth"] == 1


def test_demo_ends_with_what_was_gained_and_lost():
    from cats_ext.cli.commands import demo

    report = type("Report", (), {"bytes_share": 2 / 3})
    variants = {demo.DENSE: demo.Variant("", None, 10.0), demo.TWO: demo.Variant("", None, 11.0, report)}
    assert demo.summary(variants, 1.25) == (
        "reading 67% of its MLP weights for each token, the model writes 1.25 times as fast, and its perplexity on "
        "text it has not seen is 10.0% higher (lower is better)."
    )
    variants[demo.TWO].perplexity = 10.0
    assert "is not faster on this machine (0.90x)" in demo.summary(variants, 0.9)
    assert demo.summary(variants, 0.9).endswith("is the same.")


def test_demo_side_by_side(model_dir, text_file, tmp_path, monkeypatch):
    from cats_ext.cli import options

    monkeypatch.setattr(options, "pick_device", lambda name: torch.device("cpu"))  # as if there were a GPU
    arguments = ("demo", "--model", model_dir, "--text", text_file, "-o", tmp_path, "--gpu", "--max-new-tokens", 4)
    document = json_of(*arguments)
    assert len(document["continuations"]) == 2 and document["summary"].startswith("reading ")
    shown = cats(*arguments).stdout
    assert "CATS, two thresholds: " in shown and shown.rstrip().splitlines()[-1].startswith("In short: reading ")
    monkeypatch.undo()
    assert "--gpu is for a CUDA device, got --device cpu" in error_of(*arguments, "--device", "cpu")


def test_demo_says_so_if_it_is_slower(capsys):
    from rich.console import Console

    from cats_ext.cli import generation
    from cats_ext.cli.commands import demo

    rates = iter([0, 9.0, 0, 6.0] * 3)  # warm-up, dense, warm-up, sparse
    report = type("Report", (), {"bytes_share": 2 / 3})
    variants = {demo.DENSE: demo.Variant(demo.DENSE, None), demo.TWO: demo.Variant(demo.TWO, None, report=report)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "encode_prompt", lambda *_, **__: None)
        patch.setattr(generation, "decoder", lambda *_, **__: None)
        patch.setattr(generation, "continue_prompt", lambda *_, **__: type("C", (), {"tokens_per_second": next(rates)}))
        result = demo.show_speed(Console(width=200), None, None, variants, 8, 0.6, 3.25)
    assert result["speedup"] == pytest.approx(6 / 9) and result["worth"] == pytest.approx(1.25)
    shown = capsys.readouterr().out
    assert (
        "6.0 tokens/s  (0.67x)" in shown and "Not faster here." in shown and "load average at the start: 3.2" in shown
    )


def test_demo_refuses_before_the_work(model_dir, text_file, monkeypatch):
    monkeypatch.setattr(cats_ext, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    assert "--prompt must not be empty" in error_of("demo", "--model", model_dir, "--text", text_file, "--prompt", "")
    assert cats("demo", "--max-new-tokens", 1).exit_code == 2
    assert "sparsity must be in [0, 1)" in error_of("demo", "--model", model_dir, "--sparsity", 1)
    assert "cannot be written: Not a directory" in error_of("demo", "--model", model_dir, "--output", text_file / "f")
    assert "does not exist" in error_of("demo", "--model", "./missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_demo_refuses_a_directory_that_cannot_be_written(model_dir, tmp_path):
    tmp_path.chmod(0o500)
    assert "figures" in error_of("demo", "--model", model_dir, "--output", tmp_path / "figures")
