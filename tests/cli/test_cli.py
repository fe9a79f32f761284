"""``cats`` itself: help, usage, version, the report on the installation, and errors with and without debugging."""

from __future__ import annotations

import pytest
from support.cli_runner import cats, error_of, json_of
from typer.testing import CliRunner

import cats_ext
from cats_ext.cli import app
from cats_ext.cli import op_benchmark as benchmark

COMMANDS = ("demo", "calibrate", "generate", "chat", "eval", "finetune", "report", "bench", "env")


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("CATS_DEBUG", "0")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = cats(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout and f" $ cats {command}" in result.stdout


def test_top_level_help_lists_every_command():
    result = cats("--help")
    assert result.exit_code == 0 and all(f" {command} " in result.stdout for command in COMMANDS)


def test_version():
    assert cats("--version").stdout == f"cats_ext {cats_ext.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("calibrate",),
        ("calibrate", "model", "-o", "out"),  # no text
        ("calibrate", "model", "--text", "a.txt", "-o", "out", "--rule", "best"),
        ("generate", "model"),  # no prompt
        ("generate", "model", "--prompt", "a", "--dtype", "int8"),
        ("bench", "--tokens", "many"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = cats(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage" in result.stderr


def test_env_text_and_json():
    assert json_of("env")["cats_ext"]["version"] == cats_ext.__version__
    assert "_C_cuda" in cats("env").stdout


def test_debug_lets_the_exception_through(monkeypatch):
    with pytest.raises(ValueError, match="shape must be"):
        CliRunner().invoke(app, ["--debug", "bench", "--shape", "big"], catch_exceptions=False)
    monkeypatch.setenv("CATS_DEBUG", "1")
    with pytest.raises(ValueError, match="shape must be"):
        CliRunner().invoke(app, ["bench", "--shape", "big"], catch_exceptions=False)


def test_a_defect_is_named_as_one(monkeypatch):
    monkeypatch.setattr(benchmark, "parse_shape", lambda name: [][0])
    assert "IndexError: list index out of range. This is a defect; CATS_DEBUG=1" in error_of("bench")
