"""The command line on models that were saved with thresholds, and its option --sparsity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models import tokens
from support.patched import config_for
from support.saved_model import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import cats_ext
from cats_ext.cli import app

GENERATE = ("--prompt", "the cat sat on", "--max-new-tokens", "24")


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """The same model dense and with thresholds, and other thresholds by themselves."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: root / name for name in ("dense", "sparse", "thresholds")}
    for name in ("dense", "sparse"):
        save_tiny_model(paths[name])
    model = AutoModelForCausalLM.from_pretrained(paths["dense"])
    config = config_for(model, 0.5)
    cats_ext.apply_cats(model, config).save_pretrained(paths["sparse"])
    config.at_sparsity(0.8).save_pretrained(paths["thresholds"])
    return paths


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], env={"COLUMNS": "200", "CATS_DEBUG": "0"})
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def generate(directory: Path, *arguments: object) -> dict:
    return run("generate", directory, *GENERATE, *arguments)


def test_a_checkpoint_is_generated_from_with_its_own_thresholds(directories):
    own = generate(directories["sparse"])
    assert own["sparsity"]["target"] == 0.5
    assert own["text"] == generate(directories["dense"], "--cats", directories["sparse"])["text"]
    assert own["text"] != generate(directories["dense"])["text"]
    other = generate(directories["sparse"], "--cats", directories["thresholds"])
    assert other["sparsity"]["target"] == 0.8
    assert other["text"] == generate(directories["dense"], "--cats", directories["thresholds"])["text"]


def test_another_sparsity(directories):
    document = generate(directories["sparse"], "--sparsity", 0.8)
    assert document["sparsity"]["target"] == 0.8
    assert document["text"] == generate(directories["dense"], "--cats", directories["thresholds"])["text"]
    dense = generate(directories["dense"])["text"]
    assert generate(directories["dense"], "--cats", directories["thresholds"], "--sparsity", 0)["text"] == dense


def test_a_sparsity_needs_thresholds(directories):
    arguments = ["generate", str(directories["dense"]), *GENERATE, "--sparsity", "0.6"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "CATS_DEBUG": "0"})
    message = "--sparsity 0.6 needs thresholds: --cats DIRECTORY, or a model saved with them"
    assert result.exit_code == 1 and message in result.stderr and result.stdout == ""


def test_calibration_and_evaluation_take_the_dense_model(directories, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(int(token)) for token in tokens(600) if token > 31))
    for name in ("dense", "sparse"):
        run("calibrate", directories[name], "--text", text, "-o", tmp_path / name, "--sequence-length", 128)
    dense, sparse = (cats_ext.CatsConfig.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert all(torch.equal(dense.thresholds[name], sparse.thresholds[name]) for name in sparse.thresholds)
    measure = ("--text", text, "--window", 128)
    dense = run("eval", directories["dense"], *measure)["text"]
    own = run("eval", directories["sparse"], *measure)["text"]
    with_option = run("eval", directories["dense"], "--cats", directories["sparse"], *measure)["text"]
    assert dense["variants"] == [] and len(own["variants"]) == 1
    assert own["dense"] == pytest.approx(dense["dense"])
    assert own == with_option
