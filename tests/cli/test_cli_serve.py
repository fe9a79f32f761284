"""``cats serve`` hands over to vLLM's server, and says what is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_runner import cats, error_of
from support.models import tiny_model
from support.patched import config_for

import cats_ext
from cats_ext import CatsConfig, apply_cats, apply_exact, quantize
from cats_ext.cli.commands import serve


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_model()
    apply_cats(model, config_for(model)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM were installed and found the plugin."""

    class Plugins:
        names = ("cats",)

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(serve, "find_spec", lambda name: importlib.util.find_spec("json"))
    monkeypatch.setattr(serve, "entry_points", lambda group: Plugins)
    return Plugins


def test_becomes_the_server(checkpoint, installed, monkeypatch):
    (checkpoint / "tokenizer.json").touch()
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    assert cats("serve", checkpoint, "--port", 8001, "--enforce-eager").exit_code == 0
    model = ["--model", str(checkpoint), "--port", "8001", "--enforce-eager"]
    assert commands == [[sys.executable, "-m", serve.SERVER, *model]]


def test_without_a_tokenizer(checkpoint, installed, monkeypatch):
    expected = f"model directory '{checkpoint}' has no tokenizer: save it there too, with tokenizer.save_pretrained"
    assert expected in error_of("serve", checkpoint)
    monkeypatch.setattr(os, "execv", lambda path, command: None)
    assert cats("serve", checkpoint, "--tokenizer", "./dense").exit_code == 0


def test_without_vllm(checkpoint, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    error = error_of("serve", checkpoint)
    assert "cats serve needs vLLM 0.23 to 0.32, which is not installed: pip install vllm" in error


def test_without_the_plugin(checkpoint, installed, monkeypatch):
    installed.names = ()
    assert "is not installed: pip install it" in error_of("serve", checkpoint)


def test_plugin_that_is_not_allowed(checkpoint, installed, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS must name cats too, or not be set, got 'other'" in error_of("serve", checkpoint)


def test_dense_checkpoint(tmp_path, installed):
    tiny_model().save_pretrained(tmp_path)
    assert "has no CATS config" in error_of("serve", tmp_path)


def test_dense_prefill(checkpoint, installed):
    config = CatsConfig.from_pretrained(checkpoint)
    config.sparse_prefill = False
    config.save_pretrained(checkpoint)
    assert "sparse_prefill=False, which is not supported under vLLM" in error_of("serve", checkpoint)


def both(model):
    return apply_cats(quantize(model, "int8", progress=False), config_for(model, importance="norm"))


@pytest.mark.parametrize(
    ("prepare", "activation", "facts"),
    [
        (lambda model: apply_cats(model, config_for(model)), "silu", "3 MLPs, sparsity 50%"),
        (lambda model: quantize(model, "int8", progress=False), "silu", "packed rows"),
        (lambda model: quantize(model, "int8", progress=False), "relu", "packed rows, zeros are skipped"),
        (both, "silu", "packed rows, 3 MLPs, sparsity 50%"),
        (apply_exact, "relu", "zeros are skipped"),
    ],
)
def test_says_what_is_served(prepare, activation, facts, tmp_path, installed, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda path, command: None)
    prepare(tiny_model(hidden_act=activation)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    result = cats("serve", tmp_path)
    assert result.exit_code == 0 and result.stderr.endswith(f"{tmp_path}: {facts}\n")


def test_sparse_by_itself_without_a_gated_relu(tmp_path, installed):
    apply_exact(tiny_model("arcee")).save_pretrained(tmp_path)
    assert "is sparse by itself, but not by a gated ReLU, which is not supported under vLLM" in error_of(
        "serve", tmp_path
    )


@pytest.mark.parametrize("module", ["cats_ext.integrations.vllm", "cats_ext.cli.commands.serve"])
def test_vllm_is_not_imported(module, tmp_path):
    code = f"import sys, {module}; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(Path(cats_ext.__file__).parents[1])}  # the one that is tested
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment).returncode == 0
