"""Figures of the quality benchmark, drawn from its result files alone.

python bench/quality_plots.py bench/results/quality
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from cats_ext.plots import Curve, curves_figure, reached_figure


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rule_of(name: str) -> str:
    """The variant's name without its sparsity or budget: points of one rule make a curve."""
    return name.rsplit(" ", 1)[0]


def pareto(directory: Path) -> None:
    rows = [row for name in ("text.csv", "text_cpu.csv") for row in read(directory / name)]
    rows = [row for row in rows if row["text"] == "wikitext" and row["sparsity"]]
    curves = []
    for rule in dict.fromkeys(rule_of(row["name"]) for row in rows):
        points = sorted((float(row["bytes"]), float(row["ppl"])) for row in rows if rule_of(row["name"]) == rule)
        curves.append(Curve(rule, *zip(*points, strict=True)))
    figure = curves_figure(
        curves,
        x_label="share of the MLP weights read",
        y_label="WikiText-2 perplexity",
        dense=float(rows[0]["dense_ppl"]),
        log=True,
    )
    figure.savefig(directory / "pareto.png")


def tasks(directory: Path) -> None:
    """Accuracy against sparsity, as the difference from the dense model: two runs had items of their own."""
    rows = [row for row in read(directory / "tasks_mixed.csv") if row["task"] == "mean" and row["rule"] == "plain"]
    points = {"plain": [(100 * float(row["sparsity"]), row["difference"], row["difference_se"]) for row in rows]}
    for row in read(directory.parent / "finetune" / "quality.csv"):
        if (row["task"], row["step"]) == ("mean", "0") and row["bytes"] and "," not in row["name"]:
            rule = "two thresholds, by gradients" if row["name"].startswith("CATS") else row["name"]
            skipped = 150 * (1 - float(row["bytes"]))
            points.setdefault(rule, []).append((skipped, row["from_dense"], row["from_dense_se"]))
    curves = []
    for rule, some in points.items():
        x, y, error = zip(*sorted(some), strict=True)
        curves.append(Curve(rule, x, [100 * float(v) for v in y], [100 * float(v) for v in error]))
    labels = {"x_label": "neurons skipped, mean of up and down (%)", "y_label": "accuracy, points from dense"}
    curves_figure(curves, dense=0.0, **labels).savefig(directory / "tasks.png")


def reached(directory: Path) -> None:
    rows = [row for row in read(directory / "layers.csv") if row["text"] == "wikitext" and row["sparsity"]]
    name = "two 50%"
    layers = [
        {f"{k}_{kind}": float(row[column]) for k in ("up", "down") for kind, column in _columns(k)}
        for row in rows
        if row["name"] == name
    ]
    reached_figure(layers, title=f"WikiText-2 test, {name}").savefig(directory / "reached.png")


def _columns(k: str) -> tuple[tuple[str, str], ...]:
    return ("sparsity", k), ("target", f"{k}_target")


def activations(directory: Path) -> None:
    from matplotlib.figure import Figure

    rows = read(directory / "activations.csv")
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
