"""The documentation site: its navigation has every page, and the hook finds what pages link to."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

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
