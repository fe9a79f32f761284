"""``cats bench``: its numbers agree with each other, and it refuses to time a wrong result."""

from __future__ import annotations

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.saved_model import save_tiny_model

from cats_ext.cli import model_benchmark
from cats_ext.cli import op_benchmark as benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_working_set(monkeypatch):
    monkeypatch.setattr(benchmark, "_WORKING_SET", {"cpu": 1 << 22, "cuda": 1 << 22})


def test_bench_json(small_working_set):
    document = json_of(
        "bench", "--shape", "64x96", "--sparsity", "0,0.5", "--tokens", 2, "--passes", 3, "--device", "cpu"
    )
    assert (document["hidden_size"], document["intermediate_size"], document["tokens"]) == (64, 96, 2)
    assert document["layers"] * 3 * 64 * 96 * 4 >= 1 << 22 and document["read_limit_gb_per_s"] > 0
    dense, all_kept, half = document["rows"]
    assert dense["variant"] == "dense" and dense["speedup"] == 1 and dense["bytes_read"] == 3 * 64 * 96 * 4
    assert all_kept["sparsity"] == 0 and all_kept["bytes_read"] == dense["bytes_read"]
    assert half["sparsity"] == pytest.approx(0.5, abs=0.01)
    # two tokens together keep more than half of the neurons, and fewer than all
    assert 2 / 3 < half["bytes_read"] / dense["bytes_read"] < 1
    for row in document["rows"]:
        seconds = row["microseconds"] / 1e6
        assert row["gb_per_s"] == pytest.approx(row["bytes_read"] / seconds / 1e9)
        assert row["share_of_read_limit"] == pytest.approx(row["gb_per_s"] / document["read_limit_gb_per_s"])


def test_bench_table(small_working_set):
    result = cats(
        "bench", "--shape", "64x96", "--sparsity", "0.7", "--passes", 2, "--dtype", "bfloat16", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert "bfloat16" in result.stdout and "69.8%" in result.stdout and "of limit" in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bench_on_a_gpu(small_working_set):
    document = json_of("bench", "--shape", "256x704", "--sparsity", "0,0.9", "--passes", 3, "--device", "cuda")
    assert document["dtype"] == "bfloat16" and document["device"] == torch.cuda.get_device_name()
    assert document["compiled"] and document["threads"] is None
    assert all(row["microseconds"] > 0 for row in document["rows"])


def test_bench_refuses_to_time_a_wrong_result(small_working_set, monkeypatch):
    monkeypatch.setattr(benchmark.ops, "sparse_mlp", lambda x, *_: x)
    arguments = ("--shape", "64x96", "--passes", 1, "--device", "cpu")
    assert "differs from the dense MLP" in error_of("bench", *arguments)


def test_bench_of_a_model(tmp_path):
    save_tiny_model(tmp_path / "model")
    arguments = ("bench", "--model", tmp_path / "model", "--sparsity", "0,0.5,0.7", "--tokens", 4, "--passes", 2)
    document = json_of(*arguments, "--device", "cpu")
    rates = document["tokens_per_second"]
    assert rates.keys() == {model_benchmark.ENGINE, model_benchmark.PLAIN}
    assert all(mode.keys() == {"0.0", "0.5", "0.7"} and min(mode.values()) > 0 for mode in rates.values())
    assert document["advice"].startswith("Use ") and "for timing only" in document["thresholds"]
    shown = cats(*arguments, "--device", "cpu")
    assert shown.exit_code == 0 and "70% skipped" in shown.stdout and "Use " in shown.stdout


def mode_of(name: str, *rates: float) -> model_benchmark.Mode:
    return model_benchmark.Mode(name, None, rates=dict(zip((0.0, 0.5, 0.7), rates, strict=True)))


def test_advice_is_the_fastest_mode_against_the_fastest_dense_one():
    found = [mode_of("one", 10.0, 13.0, 15.0), mode_of("other", 12.0, 12.0, 12.0)]
    assert model_benchmark.advice(found, lambda s: 1 - 2 / 3 * s) == (
        "Use one. Compared with the fastest dense mode, other, it is 1.08 times as fast at 50% (67% read), "
        "1.25 times as fast at 70% (53% read)."
    )
    found = [mode_of("one", 10.0, 10.1, 10.1), mode_of("other", 12.0, 11.0, 12.1)]
    assert model_benchmark.advice(found, lambda s: 1).startswith("Use other without CATS: at 12.0 tokens/s")


def test_a_mode_that_fails_is_left_out(monkeypatch, tmp_path):
    save_tiny_model(tmp_path / "model")

    def fail(*_, **__):
        raise ValueError("not this model")

    monkeypatch.setattr(model_benchmark.DecodeEngine, "generate", fail)
    arguments = ("bench", "--model", tmp_path / "model", "--sparsity", "0.5", "--tokens", 3, "--passes", 1)
    assert json_of(*arguments, "--device", "cpu")["tokens_per_second"].keys() == {model_benchmark.PLAIN}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "64x96", "--model", "m"), "give --shape or --model, not both, got 64x96 and m"),
        (("--cats", "thresholds"), "--cats is for --model, got 'thresholds' without it"),
        (("--model", "m", "--sparsity", "0"), "--sparsity must have a number above 0 with --model, got '0'"),
        (("--model", "m", "--sparsity", "1"), "--sparsity must be in [0, 1), got 1.0"),
        (("--shape", "big"), "one of mistral-7b"),
        (("--shape", "0x96"), "got '0x96'"),
        (("--sparsity", "half"), "--sparsity must be numbers separated by commas, got 'half'"),
        (("--sparsity", "0.5,1"), "--sparsity must be in [0, 1), got 1.0"),
        (("--shape", "9" * 5000 + "x1"), "--shape must be HxI, as in 4096x14336, or one of"),
        (("--shape", "999999999x99"), "--shape must fit into memory: 999999999x99 with 1 tokens in float32 takes"),
        (("--shape", "64x96", "--tokens", 2**31 - 1), "--shape must fit into memory: 64x96 with 2147483647 tokens"),
    ],
)
def test_bench_errors(arguments, message):
    assert message in error_of("bench", *arguments)
