"""``cats report``: one page that needs nothing else, with the numbers of the files it was made from."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from support.cli_runner import cats, error_of, json_of
from support.models import tiny_model, tokens

from cats_ext import CatsConfig, calibrate
from cats_ext.evaluation.html_report import html_report
from cats_ext.evaluation.plots import Curve, activations_figure, curves_figure, reached_figure, svg

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def measured(model_dir, text_file, thresholds, tmp_path_factory):
    """A directory with thresholds and the results of ``cats eval``."""
    directory = tmp_path_factory.mktemp("report") / "mine & <yours>"
    shutil.copytree(thresholds, directory)
    arguments = ("--text", text_file, "--window", 128, "--curve", "0.2,0.7", "--relufication", "--device", "cpu")
    json_of("eval", model_dir, "--cats", thresholds, *arguments, "-o", directory / "eval.json")
    return directory


class Checker(HTMLParser):
    """Every opened tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href"):
                assert value.startswith("#"), (tag, key, value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page(measured):
    result = cats("report", measured)
    assert result.exit_code == 0, result.stderr
    page = (measured / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "script" not in checker.tags
    assert checker.tags.count("svg") == 3  # the curve, the layers, the activations
    assert page.count('<div class="scroll"><svg') == 3 and page.count("<table>") == page.count('"scroll"><table>')
    assert "mine &amp; &lt;yours&gt;" in page and "<yours>" not in page
    text = " ".join(checker.text)
    document = json.loads((measured / "eval.json").read_text())["text"]
    for row in document["variants"]:
        assert row["name"] in text and f"{row['sparse']['ppl']:.2f}" in text and f"{row['kl']:.4f}" in text
    assert f"{document['dense']['ppl']:.2f}" in text and "cats ext" not in text
    config = CatsConfig.from_pretrained(measured)
    assert all(name in text for name in config.layers) and f"{config.bytes_share:.1%}" in text
    assert "up reached" in text and 'name="viewport"' in page and checker.tags.count("details") == 1
    for layer in document["variants"][0]["reached"]["layers"]:
        cells = [layer["name"], *(f"{layer[key]:.1%}" for key in ("up_target", "down_target"))]
        row = next(row for row in re.findall(r"<tr>.*?</tr>", page) if f"<td>{layer['name']}</td>" in row)
        cells += [f"{layer[key]:.1%}" for key in ("up_sparsity", "down_sparsity")]
        assert all(f"{cell}</td>" in row for cell in cells)
    assert cats("report", measured).exit_code == 0  # its own output is no input
    assert (measured / "report.html").read_text(encoding="utf-8") == page


def test_page_without_measurements_says_how_to_get_them(thresholds, tmp_path):
    out = tmp_path / "new" / "page.html"
    assert cats("report", thresholds, "-o", out).exit_code == 0
    page = out.read_text(encoding="utf-8")
    assert "Nothing is measured yet" in page and "up reached" not in page


def test_tasks_and_search_are_shown(tmp_path):
    from support.models import tiny_model, tokens

    config = calibrate(
        tiny_model(), tokens(600), gate_power=0.5, budget=0.6, allocation="search", sequence_length=150, progress=False
    )
    config.save_pretrained(tmp_path)
    task = {"task": "piqa", "items": 9, "dense": 0.5, "dense_se": 0.1, "sparse": 0.25, "sparse_se": None, "lost": 3}
    task |= {"gained": 1, "difference": -0.25, "difference_se": 0.125, "p_value": 0.625}
    tasks = {"dense": {"piqa": 0.5}, "variants": [{"name": "two_threshold 60%", "tasks": [task]}]}
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "tasks": tasks}))
    page = html_report(tmp_path)
    for words in ("piqa", "50.0%", "-25.0 ± 12.5", "0.625", "gradient to the power 0.5", "weighted"):
        assert words in page, words
    assert "{uniform_kl:.4f} to {searched_kl:.4f} nats".format(**config.calibration["search"]) in page
    (tmp_path / "other.json").write_text('["not of cats eval"]')
    assert html_report(tmp_path) == page
    tasks["variants"] = []
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "tasks": tasks}))
    assert "piqa" in html_report(tmp_path)


def test_errors(thresholds, tmp_path):
    assert "is not a directory with a CATS config" in error_of("report", tmp_path / "missing")
    assert "--output" in error_of("report", thresholds, "-o", tmp_path)
    shutil.copytree(thresholds, tmp_path / "bad")
    (tmp_path / "bad" / "eval.json").write_text("{")
    assert "eval.json is not valid JSON" in error_of("report", tmp_path / "bad")


def test_figures_are_drawn_from_their_arguments():
    curves = [Curve("plain", [0.5, 0.7], [40.0, 30.0]), Curve("two", [0.5, 0.7], [35.0, 28.0], [1.0, 0.5])]
    axis = curves_figure(curves, x_label="bytes", y_label="perplexity", dense=25.0, log=True).axes[0]
    plain = axis.get_lines()[0]
    assert list(plain.get_xdata()) == [0.5, 0.7] and list(plain.get_ydata()) == [40.0, 30.0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["plain", "dense", "two"]
    layers = [dict(up_sparsity=0.4, up_target=0.5, down_sparsity=0.6, down_target=0.7)] * 3
    axis = reached_figure(layers).axes[0]
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[40] * 3, [50] * 3, [60] * 3, [70] * 3]
    text = svg(reached_figure(layers))
    assert text.startswith("<svg") and svg(reached_figure(layers)) == text
    assert not re.search(r"https?://(?!www\.w3\.org|purl|creativecommons|matplotlib)", text)


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (lambda: curves_figure([], x_label="x", y_label="y"), "curves must not be empty"),
        (lambda: reached_figure([]), "layers must not be empty"),
        (lambda: activations_figure([]), "panels must not be empty"),
    ],
)
def test_figures_of_nothing(figure, message):
    with pytest.raises(ValueError, match=message):
        figure()


@pytest.mark.parametrize("text", [{"source": "a"}, "a", {"source": "a", "dense": {"ppl": "x"}, "variants": []}])
def test_a_measurement_of_another_form_is_named(thresholds, tmp_path, text):
    shutil.copytree(thresholds, tmp_path / "out")
    (tmp_path / "out" / "eval.json").write_text(json.dumps({"model": "a", "dtype": "b", "text": text}))
    with pytest.raises(ValueError, match=r"eval\.json is not what 'cats eval' wrote: "):
        html_report(tmp_path / "out")


def test_columns_of_the_gate_have_a_column(tmp_path):
    config = calibrate(tiny_model(), tokens(300), rule="three_threshold", progress=False)
    config.save_pretrained(tmp_path)
    page = html_report(tmp_path)
    assert "input skipped" in page and "30% of input" in page
