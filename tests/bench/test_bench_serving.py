"""The arithmetic of the serving benchmarks: times, balance and partial sums of ranks, what more ranks should give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.models import tiny_model
from support.patched import config_for
from support.ranks import run_torchrun, takes_tensor_parallelism

from bench.kernels import packed_tokens
from bench.lib.results import read_rows
from bench.serving import engine, partial_sums, scaling
from bench.serving.balance import balanced_order, busiest_to_mean, parts
from bench.serving.scaling import Layer, predictions
from cats_ext.patching.apply import find_dense_mlps


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_balanced_order_gives_every_rank_the_same_sum(ranks):
    frequencies = torch.rand(64, generator=torch.Generator().manual_seed(0)).sort().values
    order = balanced_order(frequencies, ranks)
    assert sorted(order.tolist()) == list(range(64))
    contiguous, balanced = (frequencies[o].view(ranks, -1).sum(1) for o in (torch.arange(64), order))
    assert balanced.max() / balanced.mean() < 1.02 < contiguous.max() / contiguous.mean()


def test_kept_rows_are_counted_by_rank():
    kept = torch.tensor([[2.0, 1, 0, 0], [0, 0, 0, 0]])
    rows = parts(kept, torch.arange(4), 2)
    assert rows.tolist() == [[3, 0], [0, 0]]
    assert busiest_to_mean(rows).tolist() == [2, 1]
    assert parts(kept, torch.tensor([0, 3, 1, 2]), 2).tolist() == [[2, 1], [0, 0]]


@takes_tensor_parallelism
def test_tensor_parallelism_on_two_cpu_ranks(tmp_path):
    command = ["bench", "serving.tensor_parallel", "--shape", "tiny", "--layers", 2, "--rounds", 1]
    result = run_torchrun(*command, "--output", tmp_path / "rows.csv", cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    dense, *sparse = rows = read_rows(tmp_path / "rows.csv")
    assert [(row["ranks"], row["sparsity"]) for row in rows] == [("2", "0"), ("2", "0.5"), ("2", "0.7")]
    assert float(dense["speedup"]) == float(dense["busiest_to_mean"]) == 1
    for row in sparse:
        assert float(row["speedup"]) == pytest.approx(float(dense["step_us"]) / float(row["step_us"]), rel=1e-3)
        assert 1 < float(row["busiest_to_mean"]) < 2  # ranks have other masks


@torch.no_grad()
def test_partial_sums_of_all_ranks_are_the_output_of_the_mlp():
    model = tiny_model()
    config, mlp = config_for(model), find_dense_mlps(model)[1]
    x = torch.randn(5, mlp.hidden_size, generator=torch.Generator().manual_seed(0))
    exact = partial_sums.exact(config, mlp, x.double())
    one, four = (partial_sums.in_float32(config, ranks, mlp, x) for ranks in (1, 4))
    assert partial_sums.relative(one, exact) < 1e-5 and partial_sums.relative(four, exact) < 1e-5
    assert partial_sums.relative(partial_sums.dense(4, mlp, x), mlp.module(x).double()) < 1e-5
    errors = [partial_sums.relative(partial_sums.rounded(config, ranks, mlp, x.bfloat16()), exact) for ranks in (1, 8)]
    assert 1e-4 < errors[0] < errors[1] < 0.1


def measured_rows() -> list[dict[str, str]]:
    facts = {"hidden_size": 8192, "intermediate_size": 28672, "kv_size": 1024, "element_bytes": 2, "layers": 4}
    layer = Layer(2 * 8192 * 9216 * 2, 8192 * 28672 * 2, 4e6, rest_us=7.0)
    rows = []
    for sparsity, imbalance in ((0.0, 1.0), (0.5, 1.02)):
        micros = layer.micros(2, 10.0, sparsity, sparsity, imbalance)
        rows.append(
            facts
            | {"ranks": 2, "sparsity": sparsity, "step_us": 4 * micros, "all_reduce_us": 10.0}
            | {"read_gb_s": 4e3, "busiest_to_mean": imbalance}
        )
    return [{key: str(value) for key, value in row.items()} for row in rows]


def test_predictions_meet_what_was_measured_and_fall_with_the_all_reduce():
    rows = measured_rows()
    found = {(row["ranks"], row["sparsity"]): row for row in predictions(rows, {8: 10.0, 16: 40.0})}
    assert found[2, 0.5]["layer_us"] == pytest.approx(float(rows[1]["step_us"]) / 4)
    assert found[2, 0.0]["speedup"] == 1
    speedups = [found[ranks, 0.5]["speedup"] for ranks in (2, 8, 16)]
    assert speedups == sorted(speedups, reverse=True) and speedups[-1] > 1


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling", "--measured", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match=r"--measured .*none.csv is not there"):
        scaling.main()


def test_the_median_counts_and_the_first_call_does_not(monkeypatch):
    asked = []

    def make(name: str, times: list[float]) -> engine.Engine:
        made = object.__new__(engine.Engine)  # without a process
        answers = iter([0.1, *times])  # the first call warms up

        def ask(*order: object) -> float:
            asked.append((name, *order))
            return next(answers)

        made.ask, made.warm = ask, set()
        return made

    engines = {"dense": make("dense", [9, 2, 3]), "sparse": make("sparse", [4, 5, 6])}
    times, speedups = engine.timed_in_turns(engines, "decode", 4, 3)
    assert times == {"dense": 3, "sparse": 5} and speedups == {"dense": 1, "sparse": 0.5}
    turns = [(name, "decode", 4) for name in ("dense", "sparse")]
    assert asked == [turns[0], *turns[:1], turns[1], *turns[1:], *turns[::-1], *turns]


def test_a_steps_time_is_that_of_most_windows():
    ends, now = [], 0.0
    for step in range(80):
        # The prompts' step, then 10 ms each; one comes 200 ms late, and the next 20 have waited for it.
        now += {0: 0.5, 30: 0.21}.get(step, 0.0 if 30 < step <= 50 else 0.01)
        ends.append(now)
    assert engine.window_median(ends) == pytest.approx(0.01, rel=0.02)


def test_the_awq_checkpoint_is_the_dense_one_in_int4(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    made = engine.describe_awq(tmp_path, tmp_path / "awq")
    config = json.loads((made / "config.json").read_text())
    assert config["hidden_size"] == 64 and config["quantization_config"]["quant_method"] == "awq"
    assert not list(made.glob("*.safetensors"))  # so vLLM makes the weights


def test_packed_rows_are_timed_beside_unpacked_and_dense(tmp_path, monkeypatch):
    sizes = "--shape 64 96 --format int4_g32 int8_g64 --tokens 1 5 --kernel-tokens 4 --layers 1 --repetitions 1"
    output = tmp_path / "packed.csv"
    monkeypatch.setattr(sys, "argv", ["packed_tokens", *sizes.split(), "--commit", "abc", "--output", str(output)])
    monkeypatch.setattr(packed_tokens.machine, "default_device", lambda: torch.device("cpu"))
    packed_tokens.main()
    paths = {(row["format"], row["tokens"], row["path"]): float(row["us"]) for row in read_rows(output)}
    kernel = {("int4_g32", "1", "kernel"), ("int8_g64", "1", "kernel")}
    rest = {(f, n, path) for f in ("int4_g32", "int8_g64") for n in "15" for path in ("dense", "unpacked")}
    assert set(paths) == kernel | rest and min(paths.values()) > 0
