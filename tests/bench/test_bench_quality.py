"""The quality benchmark's variants, and how its parts are joined."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_model, tokens
from torch import nn

from bench.lib.results import read_rows
from bench.quality import calibration_time, compare_columns, compare_rules, merge, package, quantized_tasks
from bench.quality.compare_columns import Columns, rule_of, shares
from bench.quality.compare_peers import Peer, PeerData, linears
from bench.quality.compare_rules import Layer
from bench.quality.sweep_variants import GATE_WEIGHTS, Sample, Variant


@pytest.fixture
def sample():
    v, u, rows = torch.randn(3, 2, 100, 24, generator=torch.Generator().manual_seed(0)).unbind()
    return Sample(v * torch.linspace(0.1, 3, 24), u, rows, torch.randn(8, 24))


@pytest.mark.parametrize("down_weight", ["none", "norm", "fisher"])
def test_every_gate_weight_reaches_both_targets(sample, down_weight):
    for name in GATE_WEIGHTS:
        variant = Variant(name, 0.3, 0.6, gate_weight=name, gate_power=0.5, down_weight=down_weight)
        threshold, down_threshold = sample.thresholds(variant, 0.3, 0.6, sample.v, sample.u)
        passed = sample.v.abs() >= threshold
        kept = passed & ((sample.v * sample.u).abs() >= down_threshold)
        assert 1 - passed.float().mean() == pytest.approx(0.3, abs=0.001), name
        assert 1 - kept.float().mean() == pytest.approx(0.6, abs=0.001), name


def test_the_last_layer_has_a_power_and_sparsities_of_its_own():
    last = Variant("a", 0.4, 0.6, last=(0.0, 0.1)).of_layer(2, 3)
    assert (last.up, last.down) == (0.0, 0.1)

    variant = Variant("a", gate_power=0.5, last_power=0.0)
    assert [variant.of_layer(i, 3).gate_power for i in range(3)] == [0.5, 0.5, 0.0]
    assert Variant("a", gate_power=0.5).of_layer(2, 3).gate_power == 0.5


@pytest.mark.parametrize("allocation", ["error", "relative", "fisher"])
def test_dropping_more_loses_more(sample, allocation):
    variant = Variant("a", 0.4, 0.6, gate_weight="rms", allocation=allocation, within=0.15)
    options = sorted(variant.options())
    assert (0.4, 0.6) in options and all(0.25 <= up <= 0.55 for up, _ in options)
    losses = dict(zip(options, sample.losses(variant, options), strict=True))
    assert losses[0.3, 0.5] < losses[0.3, 0.65] and losses[0.4, 0.5] < losses[0.4, 0.7]


def test_parts_are_joined_in_order_and_once(tmp_path, monkeypatch):
    (tmp_path / "variants.json").write_text('[{"name": "dense"}, {"name": "a 50%"}, {"name": "b 50%"}]')
    parts = {"one": [("b 50%", "wikitext", "2")], "two": [("b 50%", "wikitext", "3"), ("a 50%", "wikitext", "1")]}
    for part, rows in parts.items():
        (tmp_path / part).mkdir()
        lines = ["name,text,ppl,commit", *(",".join([*row, "abc"]) for row in rows)]
        (tmp_path / part / "text.csv").write_text("\n".join(lines) + "\n")
    arguments = f"--variants {tmp_path}/variants.json --output {tmp_path}/all {tmp_path}/one {tmp_path}/two"
    monkeypatch.setattr(sys, "argv", ["merge.py", *arguments.split()])
    merge.main()
    rows = read_rows(tmp_path / "all" / "text.csv")
    assert [(row["name"], row["ppl"]) for row in rows] == [("a 50%", "1"), ("b 50%", "2")]


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    mlp = nn.Module()
    for name, (rows, columns) in {"gate_proj": (40, 16), "up_proj": (40, 16), "down_proj": (16, 40)}.items():
        setattr(mlp, name, nn.Linear(columns, rows, bias=False).requires_grad_(False))
        getattr(mlp, name).weight.copy_(torch.randn(rows, columns, generator=generator) / columns**0.5)
    return Layer(mlp, *torch.randn(2, 2000, 16, generator=generator), last=False)


COMPENSATIONS = ("none", "mean", "means", "all", "bias", "map", "both", "shift")


@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_a_compensated_rule_reads_what_it_was_given_and_is_exact_where_nothing_is_skipped(layer, compensation):
    variant = compare_rules.Variant("a", compensation=compensation)
    rule = layer.fit(variant, (0.4, 0.6))
    rule(layer.mlp, layer.x)
    seen, passed, kept = map(float, rule.seen)
    assert 1 - passed / seen == pytest.approx(0.4, abs=0.01) and 1 - kept / seen == pytest.approx(0.6, abs=0.01)

    v, u = layer.activations(layer.x)
    whole = layer.mlp.down_proj(v * u)
    torch.testing.assert_close(layer.fit(variant, (0.0, 0.0))(layer.mlp, layer.x), whole, atol=1e-4, rtol=1e-4)


def test_compensation_brings_the_output_closer_to_the_dense_one(layer):
    v, u = layer.activations(layer.x)
    whole = layer.mlp.down_proj(v * u)

    def error(compensation: str) -> float:
        rule = layer.fit(compare_rules.Variant("a", compensation=compensation), (0.4, 0.6))
        return float((rule(layer.mlp, layer.x) - whole).square().mean())

    found = {compensation: error(compensation) for compensation in COMPENSATIONS}
    assert found["both"] < found["means"] < found["none"] and found["mean"] < found["none"], found


def test_bytes_of_a_map_are_taken_from_the_rows():
    plain, mapped = compare_rules.Variant("a"), compare_rules.Variant("b", compensation="map", rank=4)
    assert plain.split(64, 100) == pytest.approx((0.375, 0.625))
    assert mapped.extra(64, 100) == pytest.approx((2 * 4 * 64 + 164) / (3 * 64 * 100))
    assert sum(mapped.split(64, 100)) == pytest.approx(1 + 3 * mapped.extra(64, 100))


def test_the_wanted_share_of_inputs_is_skipped(layer):
    found = linears([layer_of(layer.mlp)], "mlp")
    data = PeerData(found)
    for name, module in found.items():
        data.keep(name, torch.randn(500, module.in_features), torch.randn(500, module.out_features))
    for criterion in ("teal", "wina", "larosa"):
        rules = data.rules(Peer("a", criterion, scope="mlp"), 0.3)
        for name, rule in rules.items():
            rule(data.x[name][0])
            assert 1 - float(rule.seen[1]) / rule.seen[0] == pytest.approx(0.3, abs=0.01), (criterion, name)


COLUMNS = (
    Columns("default", 1.0, 0.6, 0.4),
    Columns("H", 0.7, 0.8, 0.5),
    Columns("H", 0.7, 0.8, 0.5, score="gradient"),
    Columns("T", 0.7, 0.8, 0.5, up_by="columns", score="gradient"),
)


@pytest.mark.parametrize("variant", COLUMNS, ids=lambda variant: f"{variant.name} {variant.score}")
def test_skipped_columns_are_not_read_and_shares_count_what_is(layer, variant):
    rule, mlp, x = rule_of(layer, variant), layer.mlp, layer.x[0]
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))

    def kept(test: compare_columns.Threshold, values: torch.Tensor) -> torch.Tensor:
        return (values.abs() * test.weight >= test.value).nonzero()[:, 0]

    columns, up_columns = kept(rule.gate, x), kept(rule.up, x)
    v = F.silu(gate[:, columns] @ x[columns])
    rows = kept(rule.rows, v)
    h = v[rows] * (up[rows][:, up_columns] @ x[up_columns])
    h = torch.zeros(40).index_copy(0, rows, h)
    contributions = [i for i in kept(rule.down, h).tolist() if i in rows.tolist()]
    torch.testing.assert_close(rule(mlp, layer.x[:1])[0], down[:, contributions] @ h[contributions])
    read = (len(columns) / 16, len(rows) * len(up_columns) / 640, len(contributions) / 40)
    assert shares([rule]) == pytest.approx(
        {"gate": read[0], "up": read[1], "down": read[2], "mlp_share": sum(read) / 3}
    )

    rule = rule_of(layer, variant)
    for part in layer.x.split(500):
        rule(mlp, part.view(5, 100, 16))
    wanted = (variant.gate, variant.up, variant.down)
    assert list(shares([rule]).values()) == pytest.approx([*wanted, sum(wanted) / 3], abs=0.002)


def test_the_default_beside_columns_is_that_of_the_comparison(layer):
    rule, same = rule_of(layer, Columns("default", 1.0, 0.625, 0.375)), compare_rules.Variant("default")
    other = layer.fit(same, same.split(16, 40))
    torch.testing.assert_close(rule(layer.mlp, layer.x), other(layer.mlp, layer.x))


def test_columns_are_compared_at_the_budgets_of_their_names():
    for fields in json.loads(Path(compare_columns.__file__).with_suffix(".json").read_text()):
        variant = Columns(**fields)
        assert (variant.gate + variant.up + variant.down) / 3 == pytest.approx(
            float(variant.name.split()[-1]), abs=0.001
        )


def layer_of(mlp: nn.Module) -> nn.Module:
    block = nn.Module()
    block.mlp = mlp
    return block


def test_a_calibration_is_timed_cold_and_warm(tmp_path, monkeypatch):
    arguments = f"--model tiny --windows 2 --window 64 --commit abc --output {tmp_path}/calibration.csv"
    monkeypatch.setattr(sys, "argv", ["calibration_time.py", *arguments.split()])
    calibration_time.main()
    rows = read_rows(tmp_path / "calibration.csv")
    assert [(row["run"], row["allocation"]) for row in rows] == [
        ("first", "uniform"), ("again", "uniform"), ("again", "search"),
    ]  # fmt: skip
    assert all(float(row["seconds"]) > 0 and row["tokens"] == "128" and row["commit"] == "abc" for row in rows)
    assert float(rows[0]["weights_gb"]) == pytest.approx(158016 * 4 / 1e9, rel=1e-3)


def test_an_item_counts_by_the_share_of_draws_that_answer_it():
    dense = {"piqa": [True, False] * 4, "lambada": [True] * 8}
    draws = [{"piqa": [True, False] * 4, "lambada": [True] * 8}, {"piqa": [False, True] * 4, "lambada": [True] * 8}]
    rows = {(row["half"], row["task"]): row for row in package.mean_of_draws(dense, draws)}
    assert rows["reported", "piqa"]["sparse"] == 0.5 and rows["reported", "piqa"]["difference"] == -0.5
    assert rows["dev", "piqa"]["difference"] == 0.5 and rows["reported", "lambada"]["difference"] == 0
    assert rows["reported", "mean"] == rows["reported", "piqa"] | {"half": "reported", "task": "mean"}

    draws = [{"piqa": [i < n for i in range(8)], "lambada": [True] * 8} for n in (2, 6)]
    row = package.mean_of_draws(dense, draws)[-2]  # reported, of items 0, 2, 4 and 6
    assert row["difference"] == pytest.approx(-0.5)
    assert row["difference_se"] == pytest.approx(torch.tensor([0, -0.5, -0.5, -1]).std().item() / 2)


def test_the_packages_rules_are_measured_on_every_draw(tmp_path, monkeypatch):
    ids = tokens(400).tolist()
    exact = [{"requests": [[ids[i : i + 5], ids[i + 5 : i + 6]]], "answer": None} for i in range(8)]
    windows = tokens(8 * 64).view(4, 2, 64).tolist()
    texts = dict(zip(("calibration", "calibration_1", "c4", "dev"), windows, strict=True))
    inputs = tmp_path / "inputs.json.gz"
    inputs.write_bytes(gzip.compress(json.dumps({"texts": texts, "tasks": {"piqa": exact, "lambada": exact}}).encode()))
    monkeypatch.setattr(package.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model())
    arguments = f"--model tiny --name tiny --inputs {inputs} --commit abc --output {tmp_path} --budgets 0.6"
    monkeypatch.setattr(sys, "argv", ["package.py", *arguments.split(), "--draws", "2"])
    package.main()

    text = read_rows(tmp_path / "package_tiny_text.csv")
    assert [(row["rule"], row["draw"]) for row in text[1:]] == [
        (rule, str(draw)) for rule in ("two_threshold", "three_threshold") for draw in range(2)
    ]
    assert all(float(row["c4_kl"]) > 0 and float(row["mlp_share"]) < 0.9 for row in text[1:])
    assert len({row["c4_kl"] for row in text}) == 5  # the draws differ, too
    rows = read_rows(tmp_path / "package_tiny_tasks.csv")
    for name in ("two_threshold 0.6", "three_threshold 0.6"):
        for task in ("mean", "piqa", "lambada"):
            found = {r["draw"]: r for r in rows if (r["variant"], r["half"], r["task"]) == (name, "reported", task)}
            each = [float(found[draw]["sparse"]) for draw in "01"]
            assert float(found["mean"]["sparse"]) == pytest.approx(sum(each) / 2)

    monkeypatch.setattr(sys, "argv", ["package.py", *arguments.split(), "--draws", "6"])
    with pytest.raises(SystemExit):
        package.main()


def test_tasks_of_packed_models_are_compared_with_the_model_as_it_is(tmp_path, monkeypatch):
    ids = tokens(400).tolist()
    choices = [{"requests": [[ids[i : i + 9], [2]], [ids[i : i + 9], [3, 4]]], "answer": i % 2} for i in range(12)]
    exact = [{"requests": [[ids[i : i + 5], ids[i + 5 : i + 6]]], "answer": None} for i in range(8)]
    inputs = tmp_path / "inputs.json.gz"
    inputs.write_bytes(gzip.compress(json.dumps({"tasks": {"piqa": choices, "lambada": exact}}).encode()))
    monkeypatch.setattr(quantized_tasks, "load_model", lambda *_, **__: (tiny_model(), None))
    monkeypatch.setattr(quantized_tasks, "load_texts", lambda _: {})
    monkeypatch.setattr(quantized_tasks, "calibration_windows", lambda *_: tokens(256).view(4, 64))
    arguments = (
        f"--model tiny.gguf --data {tmp_path} --inputs {inputs} --items 5 --window 64 --variants int8 --commit abc"
    )
    monkeypatch.setattr(
        sys, "argv", ["quantized_tasks.py", *arguments.split(), "--output", str(tmp_path / "tasks.csv")]
    )
    quantized_tasks.main()
    rows = read_rows(tmp_path / "tasks.csv")
    cases = [(name, sparsity) for name in ("as it is", "int8") for sparsity in ("0", "0.5")]
    assert [(row["name"], row["sparsity"]) for row in rows[::3]] == cases
    assert [row["task"] for row in rows] == ["mean", "piqa", "lambada"] * len(cases)
    assert {row["items"] for row in rows if row["task"] != "mean"} == {"4", "5"}  # every second one, at most five
    assert {row["model"] for row in rows} == {"tiny"}
    assert all(float(row["difference"]) == 0 for row in rows[:3])
    assert {row["formats"] for row in rows} == {"", "int8_g64"}
