"""Texts for the commands: files, Python's docstrings, and named sets, with a stand-in for their loader."""

from __future__ import annotations

import gzip
import sys
from types import SimpleNamespace

import pytest

from cats_ext.cli.text import CALIBRATION_MODULES, HELD_OUT_MODULES, docstrings, named_text, read_texts, stream_texts


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


def test_docstrings_are_long_prose_and_do_not_overlap():
    calibration, held_out = docstrings(CALIBRATION_MODULES), docstrings(HELD_OUT_MODULES)
    assert len(calibration) > 150_000 and len(held_out) > 60_000
    assert not set(CALIBRATION_MODULES) & set(HELD_OUT_MODULES)
    assert calibration == docstrings(CALIBRATION_MODULES)
    shared = set(calibration.split("\n\n")) & set(held_out.split("\n\n"))
    assert sum(map(len, shared)) < 0.01 * len(held_out)
    assert "license" not in calibration.lower()[:2000]


def test_python_without_library_sources_asks_for_text(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--text FILE"):
        docstrings(CALIBRATION_MODULES)


def test_read_texts_keeps_order_and_drops_blanks(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": " "}\n')
    assert read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"]) == ["first", "second"]


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\n', encoding="utf-8")
    assert read_texts([tmp_path / "a.jsonl"]) == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("name", ["long.txt", "long.txt.gz"])
def test_a_stream_has_every_character(name, tmp_path):
    text = "".join(f"zwölf {i} 猫\r\n" for i in range(150_000))
    (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb").write(text.encode())
    parts = [part for _, part in stream_texts([tmp_path / name])]
    assert "".join(parts) == text and len(parts) > 2 and all(part[0].isspace() for part in parts[1:])
