"""Figures of the tuning experiment (arXiv 2404.08763, figures 2 and 5), drawn from its result files alone.

python bench tables.finetuning_figures bench/results/finetune
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.lib.results import read_rows
from cats_ext.evaluation.plots import Curve, curves_figure

MAIN = ("dense", "CATS 50%", "CATS 70%", "CATS 90%", "ReLUfication")


def quality(directory: Path) -> None:
    """Figure 2: accuracy and perplexity against steps."""
    rows = [row for row in read_rows(directory / "quality.csv") if row["task"] == "mean" and row["name"] in MAIN]
    tasks, text = [], []
    for name in MAIN:
        mine = [row for row in rows if row["name"] == name]
        steps = [int(row["step"]) for row in mine]
        errors = [100 * float(row["from_dense_se"]) for row in mine]
        tasks.append(Curve(name, steps, [100 * float(row["accuracy"]) for row in mine], errors))
        text.append(Curve(name, steps, [float(row["c4_ppl"]) for row in mine]))
    labels = {"x_label": "LoRA steps of 3,072 tokens"}
    figure = curves_figure(tasks, y_label="mean accuracy over eight tasks (%)", **labels)
    figure.savefig(directory / "tasks_by_step.png")
    figure = curves_figure(text, y_label="C4 perplexity", log=True, **labels)
    figure.savefig(directory / "perplexity_by_step.png")


def sparsity(directory: Path) -> None:
    """Figure 5: sparsity of each layer before and after, at unchanged thresholds."""
    from matplotlib.figure import Figure

    rows = read_rows(directory / "layers.csv")
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(MAIN[1:], ("#2f6db5", "#3a9a5b", "#8a5fb0", "#c0392b"), strict=True):
        last = max((int(row["step"]) for row in rows if row["name"] == name), default=0)
        for step, style in ((0, "--"), (last, "-")):
            mine = [row for row in rows if row["name"] == name and int(row["step"]) == step]
            label = f"{name}, {'before' if step == 0 else f'after {step} steps'}"
            shares = [50 * (float(row["up"]) + float(row["down"])) for row in mine]
            axis.plot([int(row["layer"]) for row in mine], shares, style, color=colour, linewidth=1.3, label=label)
    axis.set_xlabel("layer")
    axis.set_ylabel("neurons skipped, mean of up and down (%)")
    axis.set_ylim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    figure.savefig(directory / "sparsity_by_layer.png")


def main() -> None:
    directory = Path(sys.argv[1])
    for draw in (quality, sparsity):
        draw(directory)


if __name__ == "__main__":
    main()
