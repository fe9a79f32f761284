"""Absurd values of the options: each is refused by name before a model is loaded, with ``--json`` on both outputs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.cli_runner import cats, error_of, usage_error_of

from cats_ext.cli import models, op_benchmark
from cats_ext.evaluation import tasks as evaluation_tasks

HUGE = 10**20
NOT_UTF8 = "\udcff"  # how Python shows an argument's byte 0xff


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    def load(name, **_):
        raise AssertionError(f"{name} is loaded")

    monkeypatch.setattr(models, "load_model", load)


COMMANDS = {
    "calibrate": ("calibrate", "model", "--text", "missing.txt", "-o", "out"),
    "generate": ("generate", "model", "--prompt", "a"),
    "chat": ("chat", "model"),
    "eval": ("eval", "model", "--text", "missing.txt"),
    "finetune": ("finetune", "model", "--text", "missing.txt", "-o", "out"),
    "quantize": ("quantize", "model", "-o", "out"),
    "demo": ("demo",),
    "bench": ("bench",),
}
COUNTS = {
    "calibrate": ("--max-tokens", "--sequence-length", "--batch-size"),
    "generate": ("--max-new-tokens",),
    "chat": ("--max-new-tokens", "--context"),
    "eval": ("--limit", "--batch-size", "--window", "--max-windows"),
    "quantize": ("--max-tokens", "--sequence-length"),
    "finetune": ("--rows", "--steps", "--lora-rank", "--batch-size", "--sequence-length", "--save-every"),
    "demo": ("--max-new-tokens", "--calibration-tokens", "--eval-tokens"),
    "bench": ("--tokens", "--passes"),
}


@pytest.mark.parametrize(("command", "option"), [(command, name) for command in COUNTS for name in COUNTS[command]])
def test_counts(command, option):
    for value in (0, -1, HUGE):
        message = usage_error_of(*COMMANDS[command], option, value)
        assert f"Invalid value for '{option}': must be from " in message and f", got {value}" in message
    for value in ("1e3", "nan", "many", ""):
        message = usage_error_of(*COMMANDS[command], option, value)
        assert f"Invalid value for '{option}'" in message and value in message


@pytest.mark.parametrize("command", ["calibrate", "generate", "chat", "finetune", "quantize"])
def test_seeds(command):
    for value in (-1, 2**32, HUGE):
        message = usage_error_of(*COMMANDS[command], "--seed", value)
        assert f"Invalid value for '--seed': must be from 0 to 4294967295, got {value}" in message


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_sampling(command):
    for value in ("1e-40", "-1.0", "nan", "inf"):
        message = usage_error_of(*COMMANDS[command], "--temperature", value)
        assert f"Invalid value for '--temperature': must be 0 or at least 1e-6 and finite, got {value}" in message
    for value in ("1.0", "-0.5", "nan", "inf"):
        message = usage_error_of(*COMMANDS[command], "--sparsity", value)
        assert f"Invalid value for '--sparsity': a sparsity must be in [0, 1), got {value}" in message
    option = "--prompt" if command == "generate" else "--system"
    assert f"Invalid value for '{option}': must be UTF-8 text" in usage_error_of(*COMMANDS[command], option, NOT_UTF8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "model", "--prompt", " "), "--prompt must not be empty, got ' '"),
        (("generate", "model", "--prompt", "a", "--cats", "nowhere"), "--cats 'nowhere': nowhere is not a directory"),
        (("generate", "model", "--prompt", "a", "--cats", "x" * 300), "x': File name too long"),
        (("demo", "--prompt", ""), "--prompt must not be empty, got ''"),
        (("demo", "--output", "/proc/deep"), "--output '/proc/deep/cats_demo.png' cannot be written: "),
        (
            (*COMMANDS["chat"], "--context", 40, "--max-new-tokens", 40),
            "--max-new-tokens must be less than --context 40",
        ),
        ((*COMMANDS["eval"], "--output", "/proc/eval.json"), "--output '/proc/eval.json' cannot be written: "),
        ((*COMMANDS["eval"], "--output", "/dev/full"), "--output '/dev/full' exists and is not a file"),
        ((*COMMANDS["eval"], "--curve", ""), "--curve must be numbers separated by commas, got ''"),
        ((*COMMANDS["finetune"], "--output", "/dev/null"), "--output '/dev/null' exists and is not a directory"),
        ((*COMMANDS["finetune"], "--learning-rate", "inf"), "--learning-rate must be positive and finite, got inf"),
        ((*COMMANDS["finetune"], "--report-to", "nosuch"), "--report-to must be one of those installed, "),
        ((*COMMANDS["quantize"], "--output", "/dev/null"), "--output '/dev/null' exists and is not a directory"),
        ((*COMMANDS["quantize"], "--weights", "int3"), "--weights must be one of int4, int8, fp8, or a format such as"),
        ((*COMMANDS["quantize"], "--group-size", 0), "--group-size must be one of 32, 64, 128, or None, got 0"),
        (("report", "nowhere"), "nowhere is not a directory with a CATS config"),
        (("bench", "--device", f"cuda:{HUGE}"), f"--device must be cpu, cuda or cuda:N, got 'cuda:{HUGE}'"),
        (("bench", "--sparsity", "nan"), "--sparsity must be in [0, 1), got nan"),
    ],
)
def test_others(arguments, message):
    assert message in error_of(*arguments)


def test_unknown_tasks(monkeypatch):
    known = SimpleNamespace(all_tasks=["arc_easy", "piqa"])  # the harness takes ten seconds to find its own
    monkeypatch.setattr(evaluation_tasks, "_task_manager", lambda named: known)
    message = error_of("eval", "model", "--tasks", "piqa,arc_eazy")
    assert "--tasks must be names that lm-evaluation-harness knows, got 'arc_eazy'; did you mean arc_easy?" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "--text: there is no text in "),
        ("latin.txt", b"a" * 2**20 + b"caf\xe9 \n", " is not UTF-8 text: invalid continuation byte at byte 1048579"),
        ("cut.txt", "a ä".encode()[:-1], " is not UTF-8 text: unexpected end of data at byte 2"),
        ("deep.jsonl", b"[" * 10**5, "line 1 of --text '"),
        ("digits.jsonl", b'{"text": ' + b"9" * 5000 + b"}", " must be a JSON object with a field 'text'"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "line 2 of --text '"),
        ("half.jsonl", b'{"text": "a\\ud800"}', "has half of a surrogate pair, which is no character"),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "eval", "finetune"])
def test_texts(command, name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    arguments = [argument if argument != "missing.txt" else tmp_path / name for argument in COMMANDS[command]]
    assert message in error_of(*arguments)


def test_text_files():
    for path, reason in (
        ("missing.txt", "does not exist"),
        ("/", "is not a file"),
        ("/dev/zero", "is not a file"),
        ("x" * 300, "cannot be read: File name too long"),
        ("/proc/self/mem", "cannot be read: Input/output error"),
    ):
        assert f"--text '{path}' {reason}" in error_of("calibrate", "model", "--text", path, "-o", "out")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "chat"])
def test_json_has_the_error(command):
    refused = cats(*COMMANDS[command], "--device", "tpu", "--json")
    assert refused.exit_code == 1
    assert json.loads(refused.stdout) == {"error": "--device must be cpu, cuda or cuda:N, got 'tpu'"}
    assert "error: --device must be" in refused.stderr
    wrong = cats(*COMMANDS[command], "--device", "--json", "--nosuch")
    assert wrong.exit_code == 2 and list(json.loads(wrong.stdout)) == ["error"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate: you tried to allocate 96 bytes."),
    ],
)
def test_no_memory_is_one_sentence(error, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(op_benchmark, "run", run)
    assert error_of("bench").startswith("error: there is not enough memory")
