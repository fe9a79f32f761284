"""README.md and docs keep their word: their Python runs as it stands; commands, files and errors they name exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.foreign_checkpoints import foreign_checkpoint
from support.saved_model import save_tiny_model
from typer.testing import CliRunner

from cats_ext.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = {"exact.md", "serving.md"}  # need a model that is sparse by itself, and vLLM: they have tests of their own
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A page of docs is read from top to bottom, README's snippets stand alone.
SNIPPETS = [
    *PYTHON.findall(README),
    *("\n".join(found) for page in PAGES if page.name not in NOT_RUN and (found := PYTHON.findall(page.read_text()))),
]
DOCUMENTS = "".join([README, *(page.read_text() for page in PAGES)])
COMMANDS = re.findall(r"^(?:\S+=\S+ |torchrun .* -m )?cats(?:_ext)? (\w+) ?(.*?)(?:  +#.*)?$", DOCUMENTS, re.MULTILINE)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) > 2 and all(SNIPPETS) and len(COMMANDS) >= 5


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippet_runs(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "my-model")
    foreign_checkpoint("awq").save(tmp_path / "my-model-awq")
    (tmp_path / "text.txt").write_text("The cat sat on a mat, and so did that other cat. " * 40)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_links_to_files(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_command_knows_its_options(command, arguments):
    if command == "serve":
        return  # other options are vLLM's
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    for option in re.findall(r"(?<!\S)--?[a-z]\S*", arguments):
        assert re.search(rf"{option}\b", help_text), f"cats {command} has no {option}"


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_troubleshooting_has_errors_of_the_code():
    """Each heading in backticks is a part of a message, with ``...`` for values."""
    constants = {
        node.value
        for path in (ROOT / "cats_ext").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        for part in filter(None, message.split("...")):
            assert any(part in constant for constant in constants), f"no message of cats_ext has {part!r}"
