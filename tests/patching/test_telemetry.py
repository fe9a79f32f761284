"""Live telemetry: bytes that follow from the counts, a warning on drift, counts inside captured CUDA graphs."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, LAYERS, tiny_model, tokens
from support.patched import InterruptAt

from cats_ext import (
    CatsMLP,
    SparsityDriftWarning,
    apply_cats,
    calibrate,
    reset_sparsity,
    sparsity_report,
    track_sparsity,
)


@pytest.fixture
def model():
    model = tiny_model()
    return apply_cats(model, calibrate(model, tokens(600), rule="plain", sequence_length=200, progress=False))


def run(model, ids):
    with torch.no_grad():
        model(input_ids=ids[None])


def test_bytes_read_follow_the_masks(model):
    """Masking is live: other thresholds, other outputs, and as many bytes less as neurons are skipped more."""
    ids, read, outputs = tokens(12), [], []
    for factor in (0.0, 1.0, 3.0):
        for layer in model.model.layers:
            layer.mlp.threshold.mul_(factor) if factor != 1.0 else None
        reset_sparsity(model)
        with track_sparsity(model), torch.no_grad():
            for token in ids:
                outputs.append(model(input_ids=token[None, None]).logits)
        report = sparsity_report(model)
        read.append(report.bytes_read)
        kept = sum(1 - layer.up_sparsity for layer in report.layers)
        row = HIDDEN * 4
        assert report.bytes_read == pytest.approx(12 * row * INTERMEDIATE * (LAYERS + 2 * kept), rel=1e-9)
        assert report.to_dict()["bytes_read"] == report.bytes_read
        if factor == 0.0:
            assert report.bytes_read == 12 * LAYERS * 3 * INTERMEDIATE * row
            for layer, (_, buffer) in zip(model.model.layers, thresholds_of(model), strict=True):
                layer.mlp.threshold.copy_(buffer)
    assert read[0] > read[1] > read[2]
    assert not torch.allclose(outputs[0], outputs[12], atol=1e-3)


def thresholds_of(model):
    config = model.model.layers[0].mlp.cats.config
    return config.thresholds.items()


def test_no_warning_on_text_like_the_calibrations(model):
    with track_sparsity(model):
        run(model, tokens(300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsity_report(model, tolerance=0.1)
        sparsity_report(model)


def test_activations_unlike_the_calibrations_are_warned_of(model):
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight *= 0.6
        model.model.layers[2].mlp.gate_proj.weight *= 0.3
    with track_sparsity(model):
        run(model, tokens(300))
    report = sparsity_report(model)
    assert [layer.name for layer in report.drifted(0.07)] == ["model.layers.2.mlp", "model.layers.1.mlp"]
    message = r"more than 7.0% from its target in 2 of 3 layers, furthest in model\.layers\.2\.mlp: up [6-9]"
    with pytest.warns(SparsityDriftWarning, match=message):
        sparsity_report(model, tolerance=0.07)


def test_tolerance_is_a_share(model):
    with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\], got 5"):
        sparsity_report(model, tolerance=5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counts_in_a_captured_graph(model):
    model = model.cuda()
    mlp, x = model.model.layers[0].mlp, torch.randn(1, HIDDEN, device="cuda")
    with track_sparsity(model), torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                mlp(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mlp(x)
    expected = sparsity_report_of_first(mlp, x)
    reset_sparsity(model)
    for replay in range(1, 4):
        graph.replay()
        torch.cuda.synchronize()
        assert mlp.counts.tolist() == [replay * n for n in expected]


def sparsity_report_of_first(mlp, x):
    v = torch.nn.functional.silu(mlp.gate_proj(x)).abs()
    kept = int((v >= mlp.threshold).sum())
    return [INTERMEDIATE, kept, kept]


def tracking(model):
    return [layer.mlp.forward_settings.tracking for layer in model.model.layers]


@pytest.mark.parametrize("before", [False, True])
def test_interrupted_tracking_is_as_it_was(model, before):
    track_sparsity(model, before)
    for line in itertools.count():
        try:
            with InterruptAt(line, [track_sparsity, CatsMLP.track], KeyboardInterrupt):
                track_sparsity(model, not before)
            break
        except KeyboardInterrupt:
            assert tracking(model) == [before] * LAYERS
    assert line > 3 * LAYERS and tracking(model) == [not before] * LAYERS


def test_tracking_interrupted_on_the_way_out_is_off(model):
    for line in itertools.count():
        try:
            with track_sparsity(model):
                interrupt = InterruptAt(line, [CatsMLP.track], KeyboardInterrupt)
                interrupt.__enter__()
            interrupt.__exit__()
            break
        except KeyboardInterrupt:
            assert tracking(model) == [False] * LAYERS, line
    assert line >= LAYERS and tracking(model) == [False] * LAYERS
