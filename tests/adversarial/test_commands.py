"""Absurd command lines are refused before any work, in a sentence that names the option and its value.

One value of each option; ``python -m tests.adversarial commands`` takes all, and more commands whose standard output
cannot be written.
"""

from __future__ import annotations

import os

import pytest
from adversarial.harness import commands
from adversarial.harness.record import Record

SEED = int(os.environ.get("CATS_ADVERSARIAL_SEED", 0))
SHORT = [(("env", "--json"), "closed"), (("env",), "full"), (("env", "--json"), "broken pipe"), (("--help",), "full")]


@pytest.fixture
def paths(model_dir, text_file, tmp_path):
    return {"place": str(tmp_path / "place"), "model": str(model_dir), "text": str(text_file)}


def test_absurd_values(paths):
    record = Record("command lines", SEED)
    commands.run(paths, record, most=1)
    record.check()


@pytest.mark.parametrize(("command", "output"), SHORT)
def test_output_that_cannot_be_written(command, output):
    assert (command, output) in commands.UNWRITABLE
    assert commands.run_unwritable(command, output) == ""


@pytest.mark.parametrize(
    ("arguments", "option", "value"),
    [
        *((arguments, option, "0.5") for arguments, option, _ in commands.TABLE if option in ("--sparsity", "--curve")),
        *((arguments, option, "{text}") for arguments, option, _ in commands.TABLE if option == "--text"),
        *((arguments, option, "8") for arguments, option, _ in commands.TABLE if option in ("--seed", "--batch-size")),
        *((arguments, option, "cpu") for arguments, option, _ in commands.TABLE if option == "--device"),
    ],
)
def test_what_is_right_is_accepted(paths, arguments, option, value):
    """The command lines of the table are refused for the option's value and nothing else."""
    assert commands.run_line(commands.CommandLine(arguments, option, value), paths) == ("accepted", "the work began")
