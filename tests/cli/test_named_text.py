"""``--set``: texts by name, with a stand-in for the package that downloads them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from cats_ext.cli.text import HELD_OUT_MODULES, docstrings, named_text


class Rows(list):
    def take(self, count: int) -> list:
        return self[:count]


def hub(monkeypatch, load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_docstrings_need_no_network():
    assert named_text("docstrings") == [docstrings(HELD_OUT_MODULES)]


def test_wikitext_is_one_text_and_c4_many(monkeypatch):
    asked = []

    def load(path, configuration, split, streaming):
        asked.append((path, configuration, split, streaming))
        return Rows({"text": f"line {i}\n"} for i in range(700))

    hub(monkeypatch, load)
    (whole,) = named_text("wikitext2")
    assert whole.startswith("line 0\nline 1\n") and whole.endswith("line 699\n")
    assert len(named_text("c4")) == 500
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)
    assert asked[1] == ("allenai/c4", "en", "validation", True)


def test_errors_name_the_set(monkeypatch):
    with pytest.raises(ValueError, match="--set must be one of wikitext2, c4, docstrings, got 'novels'"):
        named_text("novels")

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    hub(monkeypatch, offline)
    with pytest.raises(OSError, match=r"allenai/c4 cannot be loaded \(ConnectionError: no route to the hub\)"):
        named_text("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"--set wikitext2 needs the package datasets: pip install"):
        named_text("wikitext2")
