"""One self-contained HTML page on a directory of thresholds: how they were calibrated, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cats_ext.evaluation import plots
from cats_ext.thresholds.config import CatsConfig
from cats_ext.thresholds.files import CONFIG_FILE, read_json
from cats_ext.thresholds.rules import has_input_threshold

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead { border-bottom: 1px solid #99a } tr:hover td { background: #f3f5f8 }
th { white-space: normal; vertical-align: bottom } td.words { white-space: normal; min-width: 10rem } summary { cursor: pointer; font-weight: 600; margin: .8rem 0 }
svg { max-width: 100%; height: auto } .note { color: #556 }
@media (max-width: 40rem) { body { margin: 1rem auto } th, td { padding: .2rem .4rem; white-space: normal }
  td.words { min-width: 0 } svg { max-width: none; width: 40rem } }
""".strip()  # noqa: E501

_LONG = 30  # characters in a cell, above which it may have several lines


def html_report(directory: str | Path) -> str:
    """The page for a directory that ``cats calibrate`` and ``cats eval --output`` have written to.

    Args:
        directory: holds ``cats_config.json`` with its tensors; every other ``*.json`` written by ``cats eval`` adds its
            measurements.

    Raises:
        FileNotFoundError, ValueError: there is no valid config, or a measurement is not what ``cats eval`` wrote.
        ImportError: matplotlib is not installed.
    """
    directory = Path(directory)
    config = CatsConfig.from_pretrained(directory)
    results = _results(directory)
    title = f"CATS thresholds: {directory.resolve().name}"
    parts = [f"<h1>{escape(title)}</h1>", *_summary(config)]
    reached: dict[str, dict[str, Any]] = {}
    for name, document in results:
        try:
            reached = reached or _reached(config, document)
            parts += _text_section(name, document) + _task_section(name, document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{directory / name} is not what 'cats eval' wrote: {error!r}") from error
    if not results:
        parts.append(
            '<p class="note">Nothing is measured yet: <code>cats eval MODEL --cats DIR --text FILE --output '
            "DIR/eval.json</code>.</p>"
        )
    parts += _activation_section(config) + _layer_section(config, reached)
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _results(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """The documents that ``cats eval`` wrote, by file name; other JSON files are ignored."""
    found = []
    for path in sorted(directory.glob("*.json")):
        if path.name == CONFIG_FILE:
            continue
        document = read_json(path)
        if isinstance(document, dict) and "model" in document and ("text" in document or "tasks" in document):
            found.append((path.name, document))
    return found


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        words = (' class="words"' if len(value) > _LONG else "" for value in values)
        return "<tr>" + "".join(f"<{tag}{w}>{escape(v)}</{tag}>" for w, v in zip(words, values, strict=True)) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{cells("th", header)}</thead><tbody>{body}</tbody></table></div>'


def _drawn(figure: Any) -> str:
    return f'<div class="scroll">{plots.svg(figure)}</div>'


def _summary(config: CatsConfig) -> list[str]:
    facts = config.calibration
    weights = f"{config.importance} to the power {config.gate_power:g}, in the last layer {config.last_gate_power:g}"
    rows = [
        ("rule", config.rule),
        ("target sparsity", f"{config.sparsity:.1%}"),
        ("MLP weights that a token reads", f"{config.bytes_share:.1%}"),
        ("layers", str(len(config.layers))),
        ("model type", str(config.model_type)),
        ("gate weights", weights if config.gate_power else "none"),
        ("allocation", "searched" if config.losses is not None else "uniform"),
        ("prompts", "sparse" if config.sparse_prefill else "dense"),
    ]
    names = {"cats_ext_version": "cats_ext"}
    rows += [(names.get(key, key.replace("_", " ")), str(value)) for key, value in facts.items() if key != "search"]
    search = facts.get("search")
    if search:
        kl = "{uniform_kl:.4f} to {searched_kl:.4f} nats".format(**search)
        rows.append(("KL from the dense model, uniform to searched", kl))
    return [_table(("calibration", ""), rows)]


def _text_section(name: str, document: dict[str, Any]) -> list[str]:
    text = document.get("text")
    if not text:
        return []
    source = text["source"] if isinstance(text["source"], str) else ", ".join(text["source"])
    dense, variants = text["dense"], text["variants"]
    rows = [("dense", _number(dense["ppl"], ".2f"), "", "", "", "100.0%")]
    rows += [
        (
            row["name"],
            _number(row["sparse"]["ppl"], ".2f"),
            _number(row["nll_increase"], "+.4f") + _error(row["nll_increase_se"], ".4f"),
            _number(row["kl"], ".4f") + _error(row["kl_se"], ".4f"),
            _number(row["top1"], ".1%"),
            f"{row['reached']['bytes_share']:.1%}",
        )
        for row in variants
    ]
    header = ("", "perplexity", "nats a token", "KL, nats", "same top token", "MLP weights read")
    parts = [
        f"<h2>Text: {escape(source)}</h2>",
        f'<p class="note">{escape(name)}: {escape(document["model"])}, {escape(document["dtype"])}, '
        f"{dense['tokens']:,} predicted tokens in windows of {text['window']}.</p>",
        _table(header, rows),
    ]
    curve = sorted((row["reached"]["bytes_share"], row["sparse"]["ppl"]) for row in variants if row["sparsity"])
    if len(curve) > 1:
        points = plots.Curve(document["config"]["rule"], *zip(*curve, strict=True))
        labels = {"x_label": "share of MLP weights read", "y_label": "perplexity", "log": True}
        parts.append(_drawn(plots.curves_figure([points], dense=dense["ppl"], **labels)))
    for row in variants[:1]:
        figure = plots.reached_figure(row["reached"]["layers"], title=f"Sparsity reached, {row['name']}")
        parts.append(_drawn(figure))
    return parts


def _task_section(name: str, document: dict[str, Any]) -> list[str]:
    tasks = document.get("tasks")
    if not tasks:
        return []
    parts = ["<h2>Tasks</h2>", f'<p class="note">{escape(name)}: {escape(document["model"])}, zero-shot accuracy.</p>']
    header = ("task", "items", "dense", "sparse", "difference", "lost", "gained", "p")
    for variant in tasks["variants"]:
        rows = [
            (
                task["task"],
                str(task["items"]),
                _number(task["dense"], ".1%"),
                _number(task["sparse"], ".1%"),
                _number(100 * task["difference"], "+.1f") + _error(task["difference_se"], ".1f", 100),
                str(task["lost"]),
                str(task["gained"]),
                _number(task["p_value"], ".3f"),
            )
            for task in variant["tasks"]
        ]
        parts += [f"<h3>{escape(variant['name'])}</h3>", _table(header, rows)]
    if not tasks["variants"]:
        parts.append(_table(("task", "dense"), [(task, _number(a, ".1%")) for task, a in tasks["dense"].items()]))
    return parts


def _activation_section(config: CatsConfig) -> list[str]:
    names = [name for name in config.layers if name in config.statistics]
    panels = []
    for index in sorted({0, len(names) // 2, len(names) - 1}) if names else []:
        layer, statistics = config.layers[names[index]], config.statistics[names[index]]
        cut, _ = statistics.cuts(layer.up_sparsity, layer.down_sparsity)
        panels.append(plots.ActivationPanel(f"layer {index}", statistics.gate, cut))
    if not panels:
        return []
    label = "|act(gate)|, weighted" if config.gate_power else "|act(gate)|"
    return ["<h2>Activations and thresholds</h2>", _drawn(plots.activations_figure(panels, label=label))]


def _layer_section(config: CatsConfig, reached: dict[str, dict[str, Any]]) -> list[str]:
    """Every layer's targets and, if it was measured, what was reached; folded under the range of the targets."""
    matrices = ("up", "down", "input") if has_input_threshold(config.rule) else ("up", "down")
    header, rows = ["layer", *(f"{matrix} skipped" for matrix in matrices), "read"], []
    for name, layer in config.layers.items():
        shares = [*layer.split[: len(matrices)], layer.bytes_share]
        if reached:
            shares += [reached[name][f"{matrix}_sparsity"] for matrix in matrices]
        rows.append([name, *(f"{share:.1%}" for share in shares)])
    if reached:
        header += [f"{matrix} reached" for matrix in matrices]
    columns = zip(*(layer.split for layer in config.layers.values()), strict=True)
    spread = " and ".join(f"{_range(shares)} of {matrix}" for matrix, shares in zip(matrices, columns, strict=False))
    summary = f"<summary>{len(rows)} layers skip {spread}</summary>"
    return ["<h2>Each layer</h2>", f"<details>{summary}{_table(header, rows)}</details>"]


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _reached(config: CatsConfig, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By layer, what a measurement on a text found with these thresholds; empty if there was none."""
    targets = {name: (layer.up_sparsity, layer.down_sparsity) for name, layer in config.layers.items()}
    for variant in (document.get("text") or {}).get("variants", ()):
        layers = {layer["name"]: layer for layer in variant["reached"]["layers"]}
        if targets == {name: (layer["up_target"], layer["down_target"]) for name, layer in layers.items()}:
            return layers
    return {}


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _error(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else f" ± {scale * value:{form}}"
