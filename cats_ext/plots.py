"""Figures. Drawn with matplotlib's object interface: no display, no global state, the same file from the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cats_ext.histogram import Histogram

_SKIPPED, _KEPT, _LINE = "#c9ced6", "#2f6db5", "#c0392b"


@dataclass(frozen=True)
class ActivationPanel:
    """One layer of :func:`plot_activations`: ``histogram`` of |act(gate)| and the ``threshold`` chosen on it."""

    title: str
    histogram: Histogram
    threshold: float


def linear_bins(histogram: Histogram, upper: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin edges ``[bins + 1]`` from 0 to ``upper`` and the share of all values in each bin ``[bins]``.

    The histogram's buckets are 0.2 % wide, so that putting each one whole into the bin of its middle shifts nothing
    that could be seen.
    """
    first, counts = histogram.trimmed()
    bits = torch.arange(first, first + len(counts) + 1, dtype=torch.int32) << (23 - histogram.mantissa_bits)
    bucket_edges = bits.view(torch.float32).double().numpy()
    middles = (bucket_edges[:-1] + bucket_edges[1:]) / 2
    shares, edges = np.histogram(middles, bins=bins, range=(0, upper), weights=counts.double().numpy())
    return edges, shares / histogram.total


def plot_activations(panels: Sequence[ActivationPanel], path: str | Path, *, title: str | None = None) -> Path:
    """Histograms of |activation| side by side, each cut at its threshold (Figure 1 of arXiv 2404.08763).

    An axis ends where 4 % of the values are still to come, or at six times the threshold: the tail is long and flat.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no panel, or a panel without values.
    """
    if not panels:
        raise ValueError("panels must not be empty")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'cats_ext[demo]'") from error

    figure = Figure(figsize=(4 * len(panels), 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        upper = panel.histogram.quantile(0.96)
        if panel.threshold > 0:
            upper = min(max(upper, 1.5 * panel.threshold), 6 * panel.threshold)
        # a whole number of bins below the threshold, so that no bar has two colours
        below = round(60 * panel.threshold / upper)
        width = panel.threshold / below if below else upper / 60
        bins = int(np.ceil(upper / width))
        edges, shares = linear_bins(panel.histogram, bins * width, bins)
        colours = [_SKIPPED] * below + [_KEPT] * (bins - below)
        axis.bar(edges[:-1], 100 * shares, width=width, align="edge", color=colours, linewidth=0)
        axis.axvline(panel.threshold, color=_LINE, linewidth=1.5)
        skipped = panel.histogram.share_below(panel.threshold)
        axis.annotate(
            f"threshold {panel.threshold:.3g}\n{skipped:.0%} of neurons skipped",
            (0.98, 0.96),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=_LINE,
            fontsize=9,
        )
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("|act(gate)|")
        axis.set_xlim(0, edges[-1])
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("share of values (%)")
    if title:
        figure.suptitle(title, fontsize=12)
    path = Path(path)
    figure.savefig(path)
    return path
