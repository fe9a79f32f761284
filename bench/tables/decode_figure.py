"""Draws figure 4 of arXiv 2404.08763, tokens per second against sparsity, from the decode.csv of decode.speed.

python bench tables.decode_figure bench/results/h100/decode.csv bench/results/h100/decode.png
python bench tables.decode_figure bench/results/h100/decode.csv bench/results/h100/decode_engine.png captured

The second form draws the named modes only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.lib.results import read_rows

COLOURS = {"captured": "#2f6db5", "deferred": "#c2712b", "compiled": "#3a9a5b", "eager": "#8a8f98"}
TITLES = {
    "captured": "captured step (DecodeEngine)",
    "deferred": "generate, compiled, stop check deferred",
    "compiled": "generate, static cache, compiled",
    "eager": "generate",
}


def draw(source: Path, target: Path, modes: Sequence[str] = ()) -> None:
    rows = [row for row in read_rows(source) if not modes or row["mode"] in modes]
    if not rows:
        raise SystemExit(f"{source} has no row with mode {' or '.join(modes)}")
    models = list(dict.fromkeys(row["model"] for row in rows))
    prompts = sorted({int(row["prompt"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(models), 3.8 if modes else 5), dpi=150, layout="constrained")
    lines = {}
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for mode in COLOURS:
            for prompt, style in zip(prompts, ("-o", "--s", ":^", "-.v"), strict=False):
                group = [r for r in rows if (r["model"], r["mode"], int(r["prompt"])) == (model, mode, prompt)]
                points = sorted((float(row["sparsity"]), float(row["tokens_per_s"])) for row in group)
                if not points:
                    continue
                label = f"{TITLES[mode]}, prompt {prompt:,}"
                x, y = zip(*points, strict=True)
                (lines[label],) = axis.plot([100 * s for s in x], y, style, color=COLOURS[mode], markersize=4)
                for s, value in points if prompt == prompts[0] else ():
                    axis.annotate(
                        f"{value:.0f}", (100 * s, value), (0, 5), textcoords="offset points", ha="center", fontsize=7
                    )
        axis.set_title(model, fontsize=11)
        axis.set_xlabel("neurons skipped (%; 0 is the dense model)")
        axis.set_ylabel("tokens per second, batch 1")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    figure.suptitle(f"{first['device']}, torch {first['torch']}, commits {commits}", fontsize=9)
    figure.legend(lines.values(), lines, fontsize=7, frameon=False, ncols=2, loc="outside lower center")
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
