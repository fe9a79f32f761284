"""The activation figure shows the counted data: shares add up, the threshold stands where it was put."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from cats_ext.evaluation.plots import ActivationPanel, linear_bins, plot_activations
from cats_ext.thresholds.histogram import Histogram


@pytest.fixture
def histogram() -> Histogram:
    histogram = Histogram()
    histogram.add(torch.linspace(0, 2, 20_001)[1:])
    return histogram


def test_bins_hold_the_right_shares(histogram):
    edges, shares = linear_bins(histogram, 1.0, 10)
    assert np.allclose(edges, np.linspace(0, 1, 11))
    assert np.allclose(shares, 0.05, atol=0.002)  # uniform on (0, 2]: half of it lies below 1
    assert shares.sum() == pytest.approx(0.5, abs=0.002)
    assert linear_bins(histogram, 4.0, 7)[1].sum() == pytest.approx(1.0)


def test_figure_is_written_and_marks_the_threshold(histogram, tmp_path):
    import matplotlib.image

    panels = [ActivationPanel(f"layer {i}", histogram, 0.5) for i in range(3)]
    path = plot_activations(panels, tmp_path / "figure.png", title="three layers")
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert width > 2 * height
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.3) & (image[..., 2] < 0.3)
    # the longest red column of each panel is its threshold line: full height of the axes
    assert all(red[:, i * width // 3 : (i + 1) * width // 3].sum(axis=0).max() > 0.5 * height for i in range(3))


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 1.999, 50.0])
def test_figure_with_thresholds_at_the_edges(histogram, tmp_path, threshold):
    path = plot_activations([ActivationPanel("layer", histogram, threshold)], tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_same_data_give_the_same_file(histogram, tmp_path):
    panels = [ActivationPanel("layer", histogram, 0.5)]
    first, second = (plot_activations(panels, tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert first == second


def test_no_panel_and_no_values_are_errors(tmp_path):
    with pytest.raises(ValueError, match="panels must not be empty"):
        plot_activations([], tmp_path / "figure.png")
    with pytest.raises(ValueError, match="empty"):
        plot_activations([ActivationPanel("layer", Histogram(), 0.5)], tmp_path / "figure.png")


def test_missing_matplotlib_is_named(histogram, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"cats_ext\[demo\]"):
        plot_activations([ActivationPanel("layer", histogram, 0.5)], tmp_path / "figure.png")
