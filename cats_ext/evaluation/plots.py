"""Figures. Drawn with matplotlib's object interface: no display, no global state, the same file from the same data."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cats_ext.thresholds.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SKIPPED, _KEPT, _LINE = "#c9ced6", "#2f6db5", "#c0392b"


@dataclass(frozen=True)
class ActivationPanel:
    """One layer of :func:`plot_activations`: ``histogram`` of |act(gate)| and the ``threshold`` chosen on it."""

    title: str
    histogram: Histogram
    threshold: float


def linear_bins(histogram: Histogram, upper: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin edges ``[bins + 1]`` from 0 to ``upper`` and the share of all values in each bin ``[bins]``.

    Each bucket of the histogram counts in the bin of its middle: buckets are 0.2 % wide, so no error is visible.
    """
    first, counts = histogram.trimmed()
    bits = torch.arange(first, first + len(counts) + 1, dtype=torch.int32) << (23 - histogram.mantissa_bits)
    bucket_edges = bits.view(torch.float32).double().numpy()
    middles = (bucket_edges[:-1] + bucket_edges[1:]) / 2
    shares, edges = np.histogram(middles, bins=bins, range=(0, upper), weights=counts.double().numpy())
    return edges, shares / histogram.total


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'cats_ext[demo]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _finish(axis: Axes, title: str | None = None) -> None:
    if title:
        axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def plot_activations(panels: Sequence[ActivationPanel], path: str | Path, *, title: str | None = None) -> Path:
    """:func:`activations_figure`, written to ``path``."""
    figure = activations_figure(panels, title=title)
    path = Path(path)
    figure.savefig(path)
    return path


def activations_figure(
    panels: Sequence[ActivationPanel], *, title: str | None = None, label: str = "|act(gate)|"
) -> Figure:
    """Histograms of |activation| side by side, each cut at its threshold (Figure 1 of arXiv 2404.08763).

    An axis ends at the 96 % quantile or at six times the threshold, since the tail is long and flat.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no panel, or a panel without values.
    """
    if not panels:
        raise ValueError("panels must not be empty")
    figure = _figure(4 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        upper = panel.histogram.quantile(0.96)
        if panel.threshold > 0:
            upper = min(max(upper, 1.5 * panel.threshold), 6 * panel.threshold)
        # an integer number of bins below the threshold, so that every bar has one colour
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
        axis.set(xlabel=label, xlim=(0, edges[-1]))
        _finish(axis, panel.title)
    axes[0].set_ylabel("share of values (%)")
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


@dataclass(frozen=True)
class Curve:
    """A line of :func:`curves_figure`: points in ascending x, each with a standard error of y (0: none is drawn)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


def curves_figure(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    dense: float | None = None,
    log: bool = False,
    title: str | None = None,
) -> Figure:
    """Curves over one axis, with the dense model as a line across: perplexity against bytes, accuracy against sparsity.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no curve.
    """
    if not curves:
        raise ValueError("curves must not be empty")
    figure = _figure(6.4, 4)
    axis = figure.subplots()
    for curve in curves:
        if curve.error is not None:
            axis.errorbar(curve.x, curve.y, yerr=curve.error, marker="o", markersize=4, capsize=2, label=curve.name)
        else:
            axis.plot(curve.x, curve.y, marker="o", markersize=4, label=curve.name)
    if dense is not None:
        axis.axhline(dense, color="black", linewidth=1, linestyle="--", label="dense")
    if log:
        from matplotlib.ticker import LogLocator, ScalarFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.minorticks_off()
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    _finish(axis, title)
    return figure


def reached_figure(layers: Sequence[Mapping[str, Any]], *, title: str | None = None) -> Figure:
    """Sparsity reached in each layer beside its target.

    Args:
        layers: as in ``SparsityReport.to_dict()["layers"]``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer.
    """
    if not layers:
        raise ValueError("layers must not be empty")
    figure = _figure(7, 3.4)
    axis = figure.subplots()
    numbers = range(len(layers))
    for key, colour in (("up", _KEPT), ("down", _LINE)):
        reached, target = ([100 * layer[f"{key}_{kind}"] for layer in layers] for kind in ("sparsity", "target"))
        axis.plot(numbers, reached, marker="o", markersize=3, color=colour, label=f"{key}, reached")
        axis.step(numbers, target, where="mid", color=colour, alpha=0.5)
    axis.set(ylim=(0, 100), xlabel="layer", ylabel="neurons skipped (%)")
    from matplotlib.lines import Line2D

    target = Line2D([], [], color="grey", alpha=0.5, label="target")
    axis.legend(handles=[*axis.get_lines()[::2], target], fontsize=8, frameon=False, ncols=3)
    _finish(axis, title)
    return figure


def svg(figure: Figure) -> str:
    """``figure`` as an SVG element for a page: the same text from the same data, and no XML header."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cats", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
