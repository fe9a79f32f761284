"""``cats eval``: its numbers against the API's, its tables, tasks through the harness, and every error."""

from __future__ import annotations

import gzip
import io
import json

import pytest
import torch
from rich.console import Console
from support.cli_runner import cats, error_of, json_of

import cats_ext
from cats_ext.cli.commands.evaluate import show_tasks, show_text
from cats_ext.evaluation.significance import paired_accuracy
from cats_ext.evaluation.tasks import LOCAL_TASKS, answers, local_task

LAYERS = 3


@pytest.fixture(scope="module")
def loaded(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)


def test_numbers_are_the_apis(model_dir, text_file, thresholds, loaded, tmp_path):
    out = tmp_path / "new" / "eval.json"
    arguments = ("--text", text_file, "--window", 256, "--device", "cpu", "--curve", "0.2", "--relufication")
    document = json_of("eval", model_dir, "--cats", thresholds, *arguments, "--output", out)
    assert json.loads(out.read_text()) == document
    model, tokenizer = loaded
    ids = tokenizer(text_file.read_text(), return_tensors="pt").input_ids
    dense = cats_ext.evaluation.perplexity(model, ids, window=256, progress=False)
    assert document["text"]["dense"]["tokens"] == dense.tokens
    assert document["text"]["dense"]["ppl"] == pytest.approx(dense.ppl, rel=1e-5)
    config = cats_ext.CatsConfig.from_pretrained(thresholds)
    rows = document["text"]["variants"]
    assert [row["name"] for row in rows] == ["plain 50%", "plain 20%", "ReLUfication"]
    for row, each in zip(rows, (config, config.at_sparsity(0.2), None), strict=True):
        cats_ext.apply_relufication(model) if each is None else cats_ext.apply_cats(model, each)
        try:
            want = cats_ext.evaluation.compare(model, ids, window=256, progress=False)
        finally:
            cats_ext.remove_cats(model)
        assert row["sparse"]["ppl"] == pytest.approx(want.sparse.ppl, rel=1e-5)
        assert row["kl"] == pytest.approx(want.kl, rel=1e-4) and row["top1"] == pytest.approx(want.top1)
        assert row["nll_increase_se"] == pytest.approx(want.nll_increase_se, rel=1e-3)
        assert len(row["reached"]["layers"]) == LAYERS
    assert rows[0]["reached"]["up_sparsity"] == pytest.approx(0.5, abs=0.02)  # the text it was calibrated on
    assert rows[1]["reached"]["up_sparsity"] == pytest.approx(0.2, abs=0.02)


def test_table_and_dense_alone(model_dir, text_file, thresholds):
    result = cats("eval", model_dir, "--cats", thresholds, "--text", text_file, "--max-windows", 1)
    assert result.exit_code == 0, result.stderr
    for word in ("dense", "plain 50%", "KL, nats", "same top"):
        assert word in result.stdout
    document = json_of("eval", model_dir, "--text", text_file)
    assert document["text"]["variants"] == [] and document["config"] is None


def test_tables_fit_into_80_columns():
    reached = {"up_sparsity": 0.402, "down_sparsity": 0.608, "bytes_share": 0.663}
    errors = {"nll_increase_se": 0.0123, "kl_se": 0.0123, "top1_se": 0.0123}
    row = {"name": "two_threshold 50%", "sparse": {"ppl": 1234.5}, "kl": 1.2345, "top1": 0.789, "reached": reached}
    task = paired_accuracy("arc_challenge", [True, False] * 600, [False, True, True, False] * 300).to_dict()
    page = io.StringIO()
    console = Console(file=page, width=80)
    show_text(console, {"dense": {"ppl": 123.45, "tokens": 1016}, "window": 128, "variants": [row | errors]})
    show_tasks(console, {"variants": [{"name": "two_threshold 50%", "tasks": [task]}]})
    words = page.getvalue().split()
    assert {"two_threshold", "1234.50", "+900.0%", "1.2345", "±0.0123", "78.9%", "66.3%", "arc_challenge"} < set(words)
    assert not any("…" in word for word in words)


def test_text_unlike_the_calibrations_is_remarked_on(model_dir, thresholds, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("日本語のテキスト。" * 60, encoding="utf-8")
    result = cats("eval", model_dir, "--cats", thresholds, "--text", text)
    assert result.exit_code == 0 and "Is this text like the calibration's?" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give something to measure on: --text FILE, --set NAME or --tasks NAMES"),
        (("--text", "missing.txt"), "--text 'missing.txt' does not exist"),
        (("--set", "novels"), "--set must be one of wikitext2, c4, docstrings, got 'novels'"),
        (("--set", "c4", "--text", "a.txt"), "give --text or --set, not both, got 'a.txt' and 'c4'"),
        (("--set", "docstrings", "--curve", "0.3"), "--curve needs thresholds: --cats DIRECTORY"),
        (("--set", "docstrings", "--curve", "0.3,x", "--cats", "d"), "--curve must be numbers separated by commas"),
        (("--set", "docstrings", "--curve", "1.5", "--cats", "d"), "--curve must be in [0, 1), got 1.5"),
        (("--tasks", "piqa", "--task-data", "missing"), "task file 'missing/piqa.jsonl' (or .gz) does not exist"),
        (("--tasks", "gsm8k", "--task-data", "."), "local tasks are arc_easy, "),
        (("--set", "docstrings", "--output", "."), "--output '.' is a directory"),
    ],
)
def test_errors(model_dir, arguments, message):
    assert message in error_of("eval", model_dir, *arguments)


def test_text_too_short(model_dir, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    assert "at least 2 are needed" in error_of("eval", model_dir, "--text", tmp_path / "one.txt")


# --- tasks through the harness --------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "What does a cat say", "choices": ["meow", "moo and more", "it"], "answer": 0},
    {"question": "Where did it sit", "choices": ["a mat", "nowhere at all", "on its threshold"], "answer": 0},
    {"question": "What is not reached", "choices": ["the threshold", "a cat", "them"], "answer": 1},
    {"question": "Who saw that", "choices": ["a cat", "any", "yet"], "answer": 1},
]


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="the evaluation harness is not installed: pip install 'cats_ext[eval]'")
    directory = tmp_path_factory.mktemp("tasks")
    rows = {"arc_easy": QUESTIONS, "boolq": [], "winogrande": [], "lambada": []}
    for i, item in enumerate(QUESTIONS):
        rows["boolq"].append({"passage": "A cat sat.", "question": f"did {i} cats sit", "answer": i % 2})
        sentence = "The cat saw the mat since _ was near it."
        rows["winogrande"].append({"sentence": sentence, "choices": ["the cat", "the mat"], "answer": i % 2})
        rows["lambada"].append({"text": f"the cat sat on {item['choices'][0]} and saw it"})
    for name, items in rows.items():
        content = "".join(json.dumps(item | {"id": i}) + "\n" for i, item in enumerate(items)).encode()
        path = directory / (f"{name}.jsonl.gz" if name == "boolq" else f"{name}.jsonl")
        path.write_bytes(gzip.compress(content) if name == "boolq" else content)
    return directory


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    whole, before = (tokenizer(text, return_tensors="pt").input_ids[0] for text in (context + continuation, context))
    log_p = model(input_ids=whole[None]).logits[0].log_softmax(-1)
    targets = whole[len(before) :]
    rows = log_p[len(before) - 1 : -1]
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_tasks_by_hand(loaded, task_data):
    model, tokenizer = loaded
    tasks = [local_task(name, task_data) for name in ("arc_easy", "winogrande", "lambada")]
    got = answers(model, tokenizer, tasks)
    expected = []
    for item in QUESTIONS:
        context = f"Question: {item['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, " " + choice)[0] for choice in item["choices"]]
        expected.append(scores.index(max(scores)) == item["answer"])
    assert got["arc_easy"] == expected and 0 < sum(expected) < 4
    starts = [f"The cat saw the mat since {name}" for name in ("the cat", "the mat")]
    scores = [log_likelihood(model, tokenizer, start, " was near it.")[0] for start in starts]
    assert got["winogrande"] == [scores.index(max(scores)) == i % 2 for i in range(4)]
    contexts = [f"the cat sat on {item['choices'][0]} and saw" for item in QUESTIONS]
    assert got["lambada"] == [log_likelihood(model, tokenizer, context, " it")[1] for context in contexts]


def test_tasks_dense_and_sparse(model_dir, thresholds, task_data, loaded):
    arguments = ("--tasks", "arc_easy,boolq", "--task-data", task_data, "--limit", 3, "--relufication")
    document = json_of("eval", model_dir, "--cats", thresholds, *arguments, "--device", "cpu")["tasks"]
    assert document["items"] == {"arc_easy": 3, "boolq": 3}
    assert [variant["name"] for variant in document["variants"]] == ["plain 50%", "ReLUfication"]
    model, tokenizer = loaded
    cats_ext.apply_cats(model, cats_ext.CatsConfig.from_pretrained(thresholds))
    try:
        sparse = answers(model, tokenizer, [local_task("arc_easy", task_data)], limit=3)["arc_easy"]
    finally:
        cats_ext.remove_cats(model)
    easy, boolq, mean = document["variants"][0]["tasks"]
    assert easy["sparse"] == pytest.approx(sum(sparse) / 3) and easy["dense"] == document["dense"]["arc_easy"]
    assert mean["task"] == "mean" and mean["dense"] == pytest.approx((easy["dense"] + boolq["dense"]) / 2)
    assert 0 <= easy["p_value"] <= 1
    table = cats("eval", model_dir, "--cats", thresholds, *arguments[:4], "--limit", 1, "--device", "cpu")
    assert table.exit_code == 0 and "difference" in table.stdout and "mean" in table.stdout


def test_every_local_task_has_its_prompt():
    assert {"arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "sciq", "winogrande"} < set(
        LOCAL_TASKS
    )
