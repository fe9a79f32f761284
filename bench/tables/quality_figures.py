"""Figures of the quality benchmark, drawn from its result files alone.

python bench tables.quality_figures bench/results/quality
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.lib.results import read_rows
from bench.quality.measure import rule_of
from cats_ext.evaluation.plots import Curve, curves_figure, reached_figure

LABELS = {
    "two_threshold": "two thresholds by gradients: the default",
    "two_threshold search": "the same, searched",
    "two_threshold unweighted": "two thresholds without gate weights",
    "two_threshold norms": "two thresholds by norms, power 1/3",
    "two_threshold weighted": "two thresholds by norms, power 1 in all layers",
    "gradient search": "by gradients, power 1/2 in all layers, searched",
    "gradient search and last layer": "by gradients, power 1/2 and searched in all layers",
}


def pareto(directory: Path) -> None:
    rows = [row for row in read_rows(directory / "text.csv") if row["text"] == "wikitext" and "," not in row["name"]]
    curves = []
    for rule in dict.fromkeys(rule_of(row["name"]) for row in rows if row["sparsity"]):
        points = sorted((float(row["bytes"]), float(row["ppl"])) for row in rows if rule_of(row["name"]) == rule)
        if len(points) > 1:
            curves.append(Curve(LABELS.get(rule, rule), *zip(*points, strict=True)))
    figure = curves_figure(
        curves,
        x_label="share of the MLP weights read",
        y_label="WikiText-2 perplexity",
        dense=float(rows[0]["dense_ppl"]),
        log=True,
    )
    figure.savefig(directory / "pareto.png")


def tasks(directory: Path) -> None:
    """Mean accuracy against the share of neurons skipped, as the difference from the dense model."""
    read_share = {
        row["name"]: float(row["bytes"]) for row in read_rows(directory / "text.csv") if row["text"] == "wikitext"
    }
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in read_rows(directory / "tasks.csv"):
        if row["task"] == "mean" and row["name"] in read_share and "," not in row["name"]:
            rule = rule_of(row["name"]) if row["sparsity"] else row["name"]
            values = (
                150 * (1 - read_share[row["name"]]),
                *(100 * float(row[k]) for k in ("difference", "difference_se")),
            )
            points.setdefault(LABELS.get(rule, rule), []).append(values)
    curves = [Curve(rule, *zip(*sorted(some), strict=True)) for rule, some in points.items()]
    labels = {"x_label": "neurons skipped, mean of up and down (%)", "y_label": "accuracy, points from dense"}
    curves_figure(curves, dense=0.0, **labels).savefig(directory / "tasks.png")


def reached(directory: Path) -> None:
    name = "two_threshold 50%"
    rows = [row for row in read_rows(directory / "layers.csv") if row["text"] == "wikitext" and row["name"] == name]
    layers = [
        {f"{k}_{kind}": float(row[column]) for k in ("up", "down") for kind, column in _columns(k)} for row in rows
    ]
    title = "WikiText-2 test, the default at two thirds of the weights"
    reached_figure(layers, title=title).savefig(directory / "reached.png")


def _columns(k: str) -> tuple[tuple[str, str], ...]:
    return ("sparsity", k), ("target", f"{k}_target")


def activations(directory: Path) -> None:
    from matplotlib.figure import Figure

    rows = read_rows(directory / "activations.csv")
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(4 * len(layers), 3.4), dpi=150, layout="constrained")
    for axis, layer in zip(figure.subplots(1, len(layers)), layers, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        low, threshold = [float(row["low"]) for row in mine], float(mine[0]["threshold"])
        colours = ["#c9ced6" if at < threshold else "#2f6db5" for at in low]
        axis.bar(low, [100 * float(row["share"]) for row in mine], width=low[1] - low[0], align="edge", color=colours)
        axis.axvline(threshold, color="#c0392b", linewidth=1.5)
        axis.set_title(f"layer {layer}, threshold {threshold:.3g}", fontsize=10)
        axis.set_xlabel("|act(gate)|")
    figure.axes[0].set_ylabel("share of values (%)")
    figure.savefig(directory / "activations.png")


def main() -> None:
    directory = Path(sys.argv[1])
    for draw in (pareto, tasks, reached, activations):
        draw(directory)


if __name__ == "__main__":
    main()
