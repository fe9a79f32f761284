"""``cats bench``: its numbers agree with each other, and it refuses to time a wrong result."""

from __future__ import annotations

import pytest
import torch
from support.cli_runner import cats, error_of, json_of

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
