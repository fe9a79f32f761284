"""How benchmarks are run: the commands that documents name exist, and an installed cats_ext wins over the sources."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python bench ([a-z_]+\.[a-z_]+)((?:\\\n|[^`\n])*)")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("bench/*/*.py")]
OPTIONS: dict[str, set[str]] = {}  # by benchmark, the options that documents give it
for document in DOCUMENTS:
    for name, arguments in COMMAND.findall(document.read_text()):
        OPTIONS.setdefault(name, set()).update(re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments))


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "bench", *arguments], capture_output=True, text=True, **options)


def test_the_list_has_what_documents_name(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("usage: python bench NAME")
    assert OPTIONS.keys() == set(result.stderr.split("one of\n")[1].split())


@pytest.mark.parametrize("name", sorted(name for name, options in OPTIONS.items() if options))
def test_commands_have_the_options_that_documents_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"bench.{name}", run_name="__main__")
    help_text = capsys.readouterr().out
    assert exit.value.code == 0 and help_text.startswith(f"usage: python bench {name} ")
    usage = help_text[: help_text.index("\n\n")]
    assert OPTIONS[name] <= set(re.findall(r"--[a-z][a-z-]*", usage))


def test_an_installed_package_wins_over_the_sources(tmp_path):
    (tmp_path / "cats_ext.py").write_text("raise SystemExit('the installed one')")
    result = run("quality.task_requests", env={"PYTHONPATH": str(tmp_path)}, cwd=ROOT)
    assert result.stderr.strip() == "the installed one"
