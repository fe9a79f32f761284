"""Every command of ``cats`` on a tiny model: what it prints, what it writes, its JSON, and its errors."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.models import CharacterTokenizer
from support.saved_model import save_tiny_model
from typer.testing import CliRunner

import cats_ext
from cats_ext.cli import app
from cats_ext.cli import op_benchmark as benchmark
from cats_ext.cli.text import CALIBRATION_MODULES, HELD_OUT_MODULES, docstrings, read_texts, window_bos

COMMANDS = ("demo", "calibrate", "generate", "chat", "eval", "finetune", "report", "bench", "env")
LAYERS = 3
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("CATS_DEBUG", "0")


# --- help and usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = cats(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout and f" $ cats {command}" in result.stdout


def test_top_level_help_lists_every_command():
    result = cats("--help")
    assert result.exit_code == 0 and all(f" {command} " in result.stdout for command in COMMANDS)


def test_version():
    assert cats("--version").stdout == f"cats_ext {cats_ext.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("calibrate",),
        ("calibrate", "model", "-o", "out"),  # no text
        ("calibrate", "model", "--text", "a.txt", "-o", "out", "--rule", "best"),
        ("generate", "model"),  # no prompt
        ("generate", "model", "--prompt", "a", "--dtype", "int8"),
        ("bench", "--tokens", "many"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = cats(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage" in result.stderr


# --- calibrate ------------------------------------------------------------------------------------------------------


def test_calibrate_writes_what_the_api_would(model_dir, text_file, thresholds):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = text_file.read_text()
    expected = cats_ext.calibrate(model, text, tokenizer=tokenizer, rule="plain", sequence_length=128, progress=False)
    written = cats_ext.CatsConfig.from_pretrained(thresholds)
    assert written.thresholds.keys() == expected.thresholds.keys() and len(written.thresholds) == LAYERS
    for name, threshold in expected.thresholds.items():
        assert torch.equal(threshold, written.thresholds[name])


def test_calibrate_json_and_options(model_dir, text_file, tmp_path):
    more = tmp_path / "more.jsonl.gz"
    with gzip.open(more, "wt") as file:
        file.writelines(json.dumps({"text": "another cat " * 20, "id": i}) + "\n" for i in range(3))
    document = json_of(
        *("calibrate", model_dir, "--text", text_file, "--text", more, "-o", tmp_path / "out" / "deep"),
        *("--rule", "two_threshold", "--sparsity", 0.6, "--down-sparsity", 0.75, "--seed", 3),
        *("--max-tokens", 512, "--sequence-length", 64, "--batch-size", 2, "--gate-power", 1),
    )
    assert document["directory"] == str(tmp_path / "out" / "deep")
    assert document["rule"] == "two_threshold" and document["gate_power"] == 1
    assert document["calibration"]["tokens"] == 512 and document["calibration"]["seed"] == 3
    config = cats_ext.CatsConfig.from_pretrained(document["directory"])
    (layer, *_) = config.layers.values()
    assert layer.up_sparsity == pytest.approx(0.45) and layer.down_sparsity == 0.75
    assert config.bytes_share == pytest.approx(document["bytes_share"])


def test_calibrate_says_what_to_do_next(model_dir, text_file, tmp_path):
    result = cats("calibrate", model_dir, "--text", text_file, "-o", tmp_path / "out")
    assert result.exit_code == 0 and f"{LAYERS} layers calibrated" in result.stdout
    assert f"cats generate {model_dir} --cats {tmp_path / 'out'}" in result.stdout


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, "nan"])
def test_calibrate_refuses_sparsity_out_of_range_before_loading(sparsity):
    message = error_of("calibrate", "./missing", "--text", "missing.txt", "-o", "out", "--sparsity", sparsity)
    assert "sparsity must be in [0, 1)" in message


def test_calibrate_spreads_a_budget(model_dir, text_file, tmp_path):
    arguments = ("--rule", "two_threshold", "--importance", "gradient", "--gate-power", 0.5, "--sequence-length", 128)
    result = cats("calibrate", model_dir, "--text", text_file, "-o", tmp_path, "--budget", 0.6, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "with the budget searched" in " ".join(result.stdout.split())
    config = cats_ext.CatsConfig.from_pretrained(tmp_path)
    assert config.bytes_share <= 0.6 + 1e-6 and config.losses is not None and config.importance == "gradient"
    assert config.sparse_prefill
    uniform = ("--allocation", "uniform", "--dense-prefill", "--checkpoint", tmp_path / "checkpoint")
    json_of("calibrate", model_dir, "--text", text_file, "-o", tmp_path, "--budget", 0.6, *arguments, *uniform)
    config = cats_ext.CatsConfig.from_pretrained(tmp_path)
    assert config.losses is None and config.bytes_share == pytest.approx(0.6) and not config.sparse_prefill
    assert not (tmp_path / "checkpoint").exists()
    both = ("--budget", 0.6, "--sparsity", 0.5)
    assert "give sparsity or budget" in error_of("calibrate", model_dir, "--text", text_file, "-o", tmp_path, *both)


def test_calibrate_refuses_bad_text(model_dir, tmp_path):
    out = tmp_path / "out"

    def message(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return error_of("calibrate", model_dir, "--text", tmp_path / name, "-o", out)

    assert "does not exist" in error_of("calibrate", model_dir, "--text", tmp_path / "missing.txt", "-o", out)
    assert "no text in" in message("empty.txt", b" \n")
    assert "got 5" in message("short.txt", b"a cat")
    assert "not UTF-8" in message("latin.txt", "café".encode("latin-1") * 99)
    assert "not a whole gzip file" in message("cut.txt.gz", gzip.compress(b"a cat " * 999)[:-9])
    assert "not a whole gzip file" in message("no.txt.gz", b"a cat " * 99)
    assert "line 2 of" in message("bad.jsonl", b'{"text": "a cat"}\n{"txt": "a cat"}\n')
    assert "must be a string, got int" in message("number.jsonl", b'{"text": 1}\n')
    assert not out.exists()


def test_calibrate_refuses_a_file_as_output(model_dir, text_file):
    assert "is not a directory" in error_of("calibrate", model_dir, "--text", text_file, "-o", text_file)


# --- generate -------------------------------------------------------------------------------------------------------


def test_generate_writes_the_models_own_continuation(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("a cat", return_tensors="pt").input_ids
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
    )
    arguments = ("generate", model_dir, "--prompt", "a cat", "--max-new-tokens", 12)
    result = cats(*arguments, "--no-stream")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert cats(*arguments).stdout.rstrip("\n") == expected.rstrip("\n")  # streamed
    assert "12 tokens, " in result.stderr and "tokens/s" in result.stderr
    document = json_of(*arguments)
    assert document["text"] == expected and document["new_tokens"] == 12 and document["prompt_tokens"] == 5
    assert document["tokens_per_second"] > 0 and document["sparsity"] is None


def test_generate_reports_the_sparsity_reached(model_dir, thresholds):
    arguments = ("generate", model_dir, "--cats", thresholds, "--prompt", "the cat sat on", "--max-new-tokens", 24)
    document = json_of(*arguments)
    sparsity = document["sparsity"]
    assert sparsity["tokens"] == 14 + document["new_tokens"] - 1  # the last token is written, never read
    assert sparsity["target"] == 0.5 and 0.2 < sparsity["up_sparsity"] < 0.8
    assert sparsity["bytes_share"] == pytest.approx(1 - 2 / 3 * sparsity["up_sparsity"])
    assert "neurons skipped: " in cats(*arguments).stderr


def test_generate_at_sparsity_0_is_dense(model_dir, text_file, tmp_path):
    json_of("calibrate", model_dir, "--text", text_file, "-o", tmp_path, "--sparsity", 0)
    arguments = ("generate", model_dir, "--prompt", "a cat", "--max-new-tokens", 8)
    assert json_of(*arguments, "--cats", tmp_path)["text"] == json_of(*arguments)["text"]


def test_generate_samples_from_a_seed(model_dir):
    arguments = ("generate", model_dir, "--prompt", "a", "--max-new-tokens", 16, "--temperature", 2.0, "--seed")
    first, again, other = (json_of(*arguments, seed)["text"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", " "), "--prompt must not be empty"),
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, got 0"),
        (("--prompt", "a", "--max-new-tokens", 512), "exceeds the model's 512 positions"),
        (("--prompt", "a", "--temperature", -1), "--temperature must be at least 0, got -1.0"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature must be at least 0, got nan"),
        (("--prompt", "a", "--chat"), "chat template"),
        (("--prompt", "a", "--cats", "missing"), "missing is not a directory with a CATS config"),
        (("--prompt", "a", "--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (("--prompt", "a", "--device", "meta"), "--device must be cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_generate_errors(model_dir, arguments, message):
    assert message in error_of("generate", model_dir, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(model_dir):
    assert "finds no CUDA device" in error_of("generate", model_dir, "--prompt", "a", "--device", "cuda")


def test_thresholds_of_another_model_are_refused(thresholds, tmp_path):
    save_tiny_model(tmp_path, "qwen2")
    assert "'llama'" in error_of("generate", tmp_path, "--cats", thresholds, "--prompt", "a")


# --- bench ----------------------------------------------------------------------------------------------------------


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
        (("--sparsity", "0.5,1"), "sparsity must be in [0, 1), got 1.0"),
        (("--tokens", 0), "tokens must be at least 1, got 0"),
        (("--passes", 0), "passes must be at least 1, got 0"),
    ],
)
def test_bench_errors(arguments, message):
    assert message in error_of("bench", *arguments)


# --- env ------------------------------------------------------------------------------------------------------------


def test_env_text_and_json():
    assert json_of("env")["cats_ext"]["version"] == cats_ext.__version__
    assert "_C_cuda" in cats("env").stdout


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo_on_a_directory(model_dir, tmp_path):
    arguments = ("demo", "--model", model_dir, "--output", tmp_path / "figures", "--calibration-tokens", 2048)
    arguments += ("--eval-tokens", 600, "--max-new-tokens", 6, "--device", "cpu", "--prompt", "a cat")
    document = json_of(*arguments)
    assert document["layers"] == LAYERS and len(document["thresholds"]) == LAYERS
    assert document["calibration"]["tokens"] == 2048
    dense, plain, two = document["variants"]
    assert dense["reached"] is None
    assert all(variant["perplexity"] > 1 for variant in (dense, plain, two))
    for variant, up, down in ((plain, 0.5, 0.5), (two, 0.375, 0.625)):
        assert variant["reached"]["up_target"] == pytest.approx(up)
        assert variant["reached"]["up_sparsity"] == pytest.approx(up, abs=0.1)
        assert variant["reached"]["down_sparsity"] == pytest.approx(down, abs=0.1)
        assert variant["reached"]["bytes_share"] == pytest.approx(2 / 3, abs=0.1)
    for name in ("dense", "CATS, one threshold", "CATS, two thresholds"):
        assert document["continuations"][name]["new_tokens"] <= 6
    speed = document["tokens_per_second"]
    assert speed["speedup"] == pytest.approx(speed["sparse"] / speed["dense"])
    assert [len(times) for times in speed["rounds"].values()] == [3, 3]
    assert speed["worth"] == pytest.approx(1 / (1 - document["mlp_share"] * (1 - two["reached"]["bytes_share"])))
    assert Path(document["figure"]) == tmp_path / "figures" / "cats_demo.png"
    assert Path(document["figure"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_demo_on_a_gpu(model_dir, text_file, tmp_path):
    document = json_of("demo", "--model", model_dir, "--text", text_file, "-o", tmp_path, "--device", "cuda:0")
    assert document["dtype"] == "bfloat16" and document["compiled"]
    assert document["variants"][1]["reached"]["up_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_demo_on_text_of_the_user(model_dir, text_file, tmp_path):
    figure = tmp_path / "mine.png"
    arguments = ("demo", "--model", model_dir, "--text", text_file, "-o", figure, "--sparsity", 0.7)
    result = cats(*arguments, "--max-new-tokens", 3, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for heading in ("Thresholds", "Quality", "Text", "Speed", "Figure"):
        assert f"\n{heading} " in result.stdout
    assert "first four fifths of text.txt" in result.stdout and str(figure) in result.stdout.replace("\n", "")
    assert figure.exists()


def test_demo_at_sparsity_0_changes_nothing(model_dir, text_file, tmp_path):
    arguments = ("demo", "--model", model_dir, "--text", text_file, "-o", tmp_path, "--sparsity", 0)
    document = json_of(*arguments, "--max-new-tokens", 4, "--device", "cpu")
    dense, plain, two = (variant["perplexity"] for variant in document["variants"])
    assert plain == pytest.approx(dense, rel=1e-5) and two == pytest.approx(dense, rel=1e-5)
    assert document["tokens_per_second"]["worth"] == 1


def test_demo_says_so_if_it_is_slower(capsys):
    from rich.console import Console

    from cats_ext.cli import demo, generation

    rates = iter([0, 9.0, 0, 6.0] * 3)  # warm-up, dense, warm-up, sparse
    report = type("Report", (), {"bytes_share": 2 / 3})
    variants = {demo.DENSE: demo.Variant(demo.DENSE, None), demo.TWO: demo.Variant(demo.TWO, None, report=report)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "encode_prompt", lambda *_, **__: None)
        patch.setattr(generation, "decoder", lambda *_, **__: None)
        patch.setattr(generation, "continue_prompt", lambda *_, **__: type("C", (), {"tokens_per_second": next(rates)}))
        result = demo.show_speed(Console(width=200), None, None, variants, 8, 0.6, 3.25)
    assert result["speedup"] == pytest.approx(6 / 9) and result["worth"] == pytest.approx(1.25)
    shown = capsys.readouterr().out
    assert (
        "6.0 tokens/s  (0.67x)" in shown and "Not faster here." in shown and "load average at the start: 3.2" in shown
    )


def test_demo_refuses_before_the_work(model_dir, text_file, monkeypatch):
    monkeypatch.setattr(cats_ext, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    assert "--prompt must not be empty" in error_of("demo", "--model", model_dir, "--text", text_file, "--prompt", "")
    assert cats("demo", "--max-new-tokens", 1).exit_code == 2
    assert "sparsity must be in [0, 1)" in error_of("demo", "--model", model_dir, "--sparsity", 1)
    assert "exist" in error_of("demo", "--model", model_dir, "--output", text_file / "figure.png").lower()
    assert "does not exist" in error_of("demo", "--model", "./missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_demo_refuses_a_directory_that_cannot_be_written(model_dir, tmp_path):
    tmp_path.chmod(0o500)
    assert "figures" in error_of("demo", "--model", model_dir, "--output", tmp_path / "figures")


# --- text -----------------------------------------------------------------------------------------------------------


def test_docstrings_are_long_prose_and_do_not_overlap():
    calibration, held_out = docstrings(CALIBRATION_MODULES), docstrings(HELD_OUT_MODULES)
    assert len(calibration) > 150_000 and len(held_out) > 60_000
    assert not set(CALIBRATION_MODULES) & set(HELD_OUT_MODULES)
    assert calibration == docstrings(CALIBRATION_MODULES)
    shared = set(calibration.split("\n\n")) & set(held_out.split("\n\n"))
    assert sum(map(len, shared)) < 0.01 * len(held_out)
    assert "license" not in calibration.lower()[:2000]


def test_python_without_library_sources_asks_for_text(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--text FILE"):
        docstrings(CALIBRATION_MODULES)


def test_read_texts_keeps_order_and_drops_blanks(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": " "}\n')
    assert read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"]) == ["first", "second"]


def test_window_bos_only_where_the_tokenizer_adds_one():
    class Tokenizer(CharacterTokenizer):
        def __call__(self, text: str, **named: object):
            return type("Encoding", (), super().__call__(text, **named))

    assert window_bos(Tokenizer(bos=True)) == 1
    assert window_bos(Tokenizer(bos=False)) is None


# --- debugging ------------------------------------------------------------------------------------------------------


def test_debug_lets_the_exception_through(monkeypatch):
    with pytest.raises(ValueError, match="shape must be"):
        CliRunner().invoke(app, ["--debug", "bench", "--shape", "big"], catch_exceptions=False)
    monkeypatch.setenv("CATS_DEBUG", "1")
    with pytest.raises(ValueError, match="shape must be"):
        CliRunner().invoke(app, ["bench", "--shape", "big"], catch_exceptions=False)


def test_a_defect_is_named_as_one(monkeypatch):
    monkeypatch.setattr(benchmark, "parse_shape", lambda name: [][0])
    assert "IndexError: list index out of range. This is a defect; CATS_DEBUG=1" in error_of("bench")
