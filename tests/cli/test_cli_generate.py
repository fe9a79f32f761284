"""``cats generate``: the model's own continuation, the sparsity it reports, and every error."""

from __future__ import annotations

import pytest
import torch
from support.cli_runner import cats, error_of, json_of
from support.saved_model import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_one_token_has_no_rate(model_dir):
    result = cats("generate", model_dir, "--prompt", "a cat", "--max-new-tokens", 1)
    assert "1 token; first token after " in result.stderr and "tokens/s" not in result.stderr


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


def test_generate_with_thresholds_for_other_weights(model_dir, thresholds, tmp_path):
    save_tiny_model(tmp_path, seed=1)
    arguments = ("generate", tmp_path, "--cats", thresholds, "--prompt", "a cat", "--max-new-tokens", 4)
    assert "config is for other weights" in (message := error_of(*arguments)) and "--no-check-weights" in message
    assert "apply_cats" not in message
    assert json_of(*arguments, "--no-check-weights")["sparsity"]["target"] == 0.5


def test_generate_samples_from_a_seed(model_dir):
    arguments = ("generate", model_dir, "--prompt", "a", "--max-new-tokens", 16, "--temperature", 2.0, "--seed")
    first, again, other = (json_of(*arguments, seed)["text"] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", " "), "--prompt must not be empty"),
        (("--prompt", "a", "--max-new-tokens", 512), "exceeds the model's 512 positions"),
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
