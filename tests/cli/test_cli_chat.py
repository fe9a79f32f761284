"""``cats chat`` on a tiny model: the conversation that the model sees, its commands and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.saved_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import cats_ext
from cats_ext.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(plain_dir, tmp_path_factory) -> Path:
    directory = shutil.copytree(plain_dir, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(plain_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def chat(directory: Path, lines: list[str], *arguments: object):
    text = "".join(f"{line}\n" for line in lines)
    command = ["chat", str(directory), *map(str, arguments)]
    return CliRunner().invoke(app, command, input=text, env={"COLUMNS": "200", "CATS_DEBUG": "0"})


def answers(directory: Path, lines: list[str], new: int, thresholds: Path | None = None, start: str = "") -> list[str]:
    """What the model itself says to ``lines``, each with the conversation before it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    if thresholds is not None:
        cats_ext.apply_cats(model, cats_ext.CatsConfig.from_pretrained(thresholds))
    said, history = [], start
    for line in lines:
        history += f"u:{line};"
        ids = tokenizer(history + "a:", add_special_tokens=False, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        history += f"a:{said[-1]};"
    return said


def test_each_answer_follows_from_the_conversation(model_dir):
    result = chat(model_dir, ["hello", "", "and?"], "--max-new-tokens", 12, "--system", "be brief")
    assert result.exit_code == 0, result.stderr
    expected = answers(model_dir, ["hello", "and?"], 12, start="s:be brief;")
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert result.stderr.count("tokens/s") == 2


def test_reset_forgets_and_exit_leaves(model_dir):
    result = chat(model_dir, ["hello", "/reset", "hello", "/exit", "hello"], "--max-new-tokens", 8)
    (answer,) = answers(model_dir, ["hello"], 8)
    assert result.exit_code == 0 and result.stdout == f"{answer}\n{answer}\n"


def test_sparse_conversation(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(0))
    cats_ext.calibrate(model, [ids], sparsity=0.7, progress=False).save_pretrained(tmp_path)
    result = chat(model_dir, ["hello", "more"], "--max-new-tokens", 12, "--cats", tmp_path)
    expected = answers(model_dir, ["hello", "more"], 12, tmp_path)
    assert (
        result.stdout
        == "".join(f"{text}\n" for text in expected)
        != "".join(f"{text}\n" for text in answers(model_dir, ["hello", "more"], 12))
    )


def test_a_full_context_forgets_the_oldest_exchange(model_dir):
    result = chat(model_dir, ["first " * 4, "second " * 4], "--max-new-tokens", 4, "--context", 44)
    (first,), (second,) = (answers(model_dir, [(text * 4).strip()], 4) for text in ("first ", "second "))
    assert "no longer fits" in result.stderr and result.stdout == f"{first}\n{second}\n"


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (["a" * 60], ("--context", 40, "--max-new-tokens", 4), "has 65 tokens, but the context leaves room for 36"),
        ([], ("--context", 40, "--max-new-tokens", 40), "--max-new-tokens must be less than --context 40, got 40"),
    ],
)
def test_errors(model_dir, lines, arguments, message):
    result = chat(model_dir, lines, *arguments)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_a_model_without_a_chat_template_is_refused(plain_dir):
    result = chat(plain_dir, ["a"])
    assert result.exit_code == 1 and "chat template" in result.stderr
