"""README.md and docs keep their word: their Python runs as it stands, and the commands and files they name exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from support.saved_model import save_tiny_model
from typer.testing import CliRunner

from cats_ext.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# A document of its own is read from top to bottom, README's snippets stand alone.
SNIPPETS = [
    *PYTHON.findall(README),
    *(
        "\n".join(PYTHON.findall((ROOT / "docs" / name).read_text()))
        for name in ("transformers.md", "quantization.md", "finetuning.md")
    ),
]
DOCUMENTS = "".join([README, *((ROOT / "docs" / name).read_text() for name in ("quantization.md", "finetuning.md"))])
COMMANDS = re.findall(r"^cats (\w+) ?(.*?)(?:  +#.*)?$", DOCUMENTS, re.MULTILINE)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) > 2 and all(SNIPPETS) and len(COMMANDS) >= 5


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:40])
def test_snippet_runs(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "my-model")
    (tmp_path / "text.txt").write_text("The cat sat on a mat, and so did that other cat. " * 40)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_to_files(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_command_knows_its_options(command, arguments):
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    for option in re.findall(r"(?<!\S)--?[a-z]\S*", arguments):
        assert re.search(rf"{option}\b", help_text), f"cats {command} has no {option}"


@pytest.mark.parametrize("name", ["readme", "finetuning", "quality"])
def test_tables_are_those_of_the_result_files(name):
    page = importlib.import_module(f"bench.tables.{name}").PAGE
    assert page.render() == page.path.read_text(), f"run python bench tables.{name}"
