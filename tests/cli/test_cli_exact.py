"""``cats exact``, and the other commands on the models that it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_runner import cats, error_of, json_of
from support.saved_model import save_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "relu"
    save_tiny_model(path, family="llama-relu2")
    (path.parent / "text.txt").write_text("the cat sat on the mat. " * 40)
    return path


def test_what_is_found(directory):
    found = json_of("exact", directory)
    assert [row["name"] for row in found["layers"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert {row["skipped"] for row in found["layers"]} == {"up and down rows"}
    assert found["left_dense"] == {} and found["sparsity"] is None
    table = cats("exact", directory)
    assert "model.layers.2.mlp" in table.stdout and table.exit_code == 0


def test_a_text_shows_the_natural_sparsity_and_the_model_is_saved(directory, tmp_path):
    text, out = directory.parent / "text.txt", tmp_path / "exact"
    found = json_of("exact", directory, "--text", text, "--window", "64", "--output", out)
    assert all(0.2 < row["sparsity"] < 0.8 and row["bytes_share"] < 0.9 for row in found["layers"])
    assert found["sparsity"]["down_sparsity"] > 0.2
    generated = [json_of("generate", d, "--prompt", "the cat", "--max-new-tokens", "8") for d in (directory, out)]
    assert generated[0]["text"] == generated[1]["text"]
    assert generated[1]["sparsity"]["down_sparsity"] > 0.2 and generated[0]["sparsity"] is None
    (variant,) = json_of("eval", out, "--text", text, "--window", "64")["text"]["variants"]
    assert variant["name"] == "exact" and abs(variant["kl"]) < 1e-4


def test_a_model_with_nothing_to_gain(tmp_path):
    save_tiny_model(tmp_path)
    assert "has no MLP that is exactly zero for many inputs" in error_of("exact", tmp_path)
