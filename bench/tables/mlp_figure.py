"""Draws figure 3 of arXiv 2404.08763, latency of a layer's MLP against sparsity, from the mlp.csv of kernels.mlp.

python bench tables.mlp_figure bench/results/h100/mlp.csv bench/results/h100/mlp.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from bench.lib.results import read_rows

# Path in the result file: label, colour, style. Dense is a level line, since it has no sparsity.
PATHS = {
    "dense": ("dense, fastest", "#8a8f98", "-"),
    "optimal_whole_gate": ("optimal, gate projection whole", "#c0392b", "--"),
    "optimal": ("optimal, gate projection reduced too", "#c0392b", ":"),
    "cats_triton": ("CATS, published Triton kernels", "#d98c2b", "-s"),
    "teal_triton": ("TEAL, published Triton kernel, fp16 (inputs of all three sparse)", "#8e5bb5", "-^"),
    "sparse_mlp": ("cats_ext", "#2f6db5", "-o"),
    "two_threshold": ("cats_ext, two thresholds", "#2f6db5", "D"),
}


def curve(rows: list[dict[str, str]], path: str) -> list[tuple[float, float]]:
    """(sparsity in %, microseconds) of one path; of dense the fastest variant, over the whole width."""
    points = [(100 * float(row["sparsity"]), float(row["us"])) for row in rows if row["path"] == path]
    if path == "dense":
        fastest = min(us for _, us in points)
        return [(0.0, fastest), (100 * max(float(row["sparsity"]) for row in rows), fastest)]
    return sorted(points)


def draw(source: Path, dtype: str = "bf16") -> Figure:
    rows = [row for row in read_rows(source) if row["tokens"] == "1"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["dtype"] == dtype))
    if not shapes:
        raise SystemExit(f"{source} has no row with dtype {dtype} and 1 token")
    rows = [row for row in rows if row["dtype"] == dtype or row["path"] == "teal_triton"]
    figure = Figure(figsize=(5.6 * len(shapes), 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    for axis, shape in zip(axes, shapes, strict=True):
        group = [row for row in rows if row["shape"] == shape]
        for path, (label, colour, style) in PATHS.items():
            if points := curve(group, path):
                ours = path == "sparse_mlp"
                x, y = zip(*points, strict=True)
                shown = dict(linewidth=2.2 if ours else 1.4, markersize=4, zorder=2 + ours)
                if path == "two_threshold":
                    shown = dict(markersize=8, markerfacecolor="none", zorder=4)
                axis.plot(x, y, style, color=colour, label=label, **shown)
                for s, us in points if ours else ():
                    axis.annotate(f"{us:.0f}", (s, us), (0, -11), textcoords="offset points", ha="center", fontsize=7)
        first = group[0]
        axis.set_title(f"{shape}, {first['hidden_size']}x{first['intermediate_size']}", fontsize=11)
        axis.set_xlabel("neurons skipped (%)")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"microseconds a layer, 1 token, {dtype}")
    axes[0].legend(fontsize=7, frameon=False, loc="lower left")
    first = rows[0]
    figure.suptitle(f"{first['device']}, torch {first['torch']}, commit {first['commit']}", fontsize=9)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1])).savefig(sys.argv[2])
