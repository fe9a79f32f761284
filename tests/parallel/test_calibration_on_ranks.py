"""Calibration of models that are spread over ranks."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for
from support.ranks import load_parallel, on_ranks, takes_tensor_parallelism

from cats_ext import CatsConfig, apply_cats, calibrate

pytestmark = takes_tensor_parallelism


def calibrated(directory, arguments) -> CatsConfig:
    return config_for(load_parallel(directory), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "plain"},
        {"rule": "weighted"},
        {"importance": "norm"},
        {"importance": "gradient"},
        {"sparsity": None, "budget": 0.6},
    ],
    ids=str,
)
def test_calibration_gives_the_thresholds_of_one_process(arguments, dense_directory):
    one = config_for(tiny_model(), **arguments)
    first, second = on_ranks(calibrated, dense_directory, arguments)
    assert first.to_dict() == second.to_dict()
    for found in (first, second):
        assert found.layers.keys() == one.layers.keys()
        for name, layer in one.layers.items():
            assert found.layers[name].up_sparsity == pytest.approx(layer.up_sparsity, abs=0.02)
            torch.testing.assert_close(found.thresholds[name], first.thresholds[name], rtol=0, atol=0)
            torch.testing.assert_close(found.thresholds[name], one.thresholds[name], rtol=0.02, atol=1e-4)
            torch.testing.assert_close(found.weights[name], one.weights[name], rtol=0, atol=0)
            assert found.statistics[name].gate.total == one.statistics[name].gate.total
        for name, threshold in one.down_thresholds.items():
            torch.testing.assert_close(found.down_thresholds[name], threshold, rtol=0.02, atol=1e-4)
    apply_cats(tiny_model(), first)


def calibrate_on_other_text(directory) -> None:
    rank = torch.distributed.get_rank()
    calibrate(load_parallel(directory), tokens(300, seed=rank), sparsity=0.5, progress=False)


def test_data_that_differs_between_ranks(dense_directory):
    for error in on_ranks(calibrate_on_other_text, dense_directory, fail=True):
        assert "data must be the same on all ranks" in str(error)


def calibrate_to_another_sparsity(directory) -> None:
    sparsity = 0.5 + 0.1 * torch.distributed.get_rank()
    calibrate(load_parallel(directory), tokens(300), sparsity=sparsity, progress=False)


def test_arguments_that_differ_between_ranks(dense_directory):
    for error in on_ranks(calibrate_to_another_sparsity, dense_directory, fail=True):
        assert "the arguments of calibrate must be the same on all ranks" in str(error)


def calibrate_with_a_checkpoint(directory, path) -> None:
    config_for(load_parallel(directory), checkpoint=path)


def test_a_checkpoint_of_a_calibration_is_refused(dense_directory, tmp_path):
    for error in on_ranks(calibrate_with_a_checkpoint, dense_directory, tmp_path / "checkpoint", fail=True):
        assert "checkpoint must be None for a tensor-parallel model, got" in str(error)
