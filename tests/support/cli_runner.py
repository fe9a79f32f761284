"""Runs ``cats`` in this process, for the tests of its commands."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from cats_ext.cli import app


def cats(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "CATS_DEBUG": "0"})


def json_of(*arguments: object) -> dict:
    """The JSON that a command prints, which must be all of its standard output."""
    result = cats(*arguments, "--json")
    assert result.exit_code == 0, f"{result.stderr}{result.exception!r}"
    return json.loads(result.stdout)


def error_of(*arguments: object) -> str:
    """The one sentence of a command that fails with exit code 1."""
    result = cats(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output and result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return line


def usage_error_of(*arguments: object) -> str:
    """What a command says that fails with exit code 2."""
    result = cats(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return " ".join(result.stderr.replace("│", " ").split())
