"""The documentation site: its navigation has every page, and the hook finds what pages link to."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import cats_ext
from cats_ext import evaluation, finetune
from cats_ext.integrations import vllm

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "site"
NAVIGATION = re.findall(r": ([\w./-]+\.md)$", (SITE / "mkdocs.yml").read_text(), re.MULTILINE)


@pytest.fixture
def hook():
    pytest.importorskip("mkdocs", reason="pip install 'cats_ext[docs]'")
    spec = importlib.util.spec_from_file_location("site_files", SITE / "site_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_navigation_has_every_page():
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(NAVIGATION)


def test_links_out_of_docs_lead_to_copies(hook):
    page = type("Page", (), {"file": type("File", (), {"src_uri": "performance.md"})})
    text = "[a](../bench/NOTES.md) [b](../README.md#limits) [c](quality.md) [d](https://x.org/a) [e](#f)"
    moved = hook.on_page_markdown(text, page, None, None)
    assert moved == "[a](bench/NOTES.md) [b](index.md#limits) [c](quality.md) [d](https://x.org/a) [e](#f)"


@pytest.mark.parametrize("package", [cats_ext, evaluation, finetune, vllm], ids=lambda package: package.__name__)
def test_api_has_every_public_function_and_class(package):
    documented = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = [name for name in package.__all__ if callable(getattr(package, name)) and name != "register"]
    assert public and {f"{package.__name__}.{name}" for name in public} <= set(documented)
