"""vLLM's engine and its workers in the process of the tests, on the CPU."""

from __future__ import annotations

import os
from functools import partial

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

CHECKPOINTS = {
    "llama": ("llama", "two_threshold"),
    "llama-plain": ("llama", "plain"),
    "llama-bias": ("llama-bias", "two_threshold"),
    "qwen2": ("qwen2", "plain"),
    "qwen3": ("qwen3", "two_threshold"),
    "gemma2": ("gemma2", "two_threshold"),
    "phi3": ("phi3", "plain"),
}
PACKED = {
    "int4": ("llama-bias", "two_threshold", ("int4",), {}),
    "int8-formats": ("llama", "plain", ("int8", 64), {"down": "int4"}),
    "fp8-merged": ("phi3", "plain", ("fp8",), {}),
    "int4-all": ("qwen2", "two_threshold", ("int4",), {"scope": "all"}),
    "int4-rows": ("qwen3", None, ("int4",), {}),  # without thresholds
}
ADAPTED, PROJECTIONS = ["llama", "int8-formats"], ["gate_proj", "up_proj", "down_proj"]
TEXTS = ["The capital of France is", "Once upon a time, there was", "def fibonacci(n):", "1, 2, 3, 4,"]
TEXTS += ["Water boils at", "The cat sat on", "In the beginning", "Dear Sir or Madam,"]


@pytest.fixture(scope="session", autouse=True)
def checkpoints(tmp_path_factory):
    """Directories, and what transformers generates from them, by name; made before vLLM runs."""
    from support.served import expected, save_checkpoint

    import cats_ext

    directories = {
        name: save_checkpoint(tmp_path_factory.mktemp(name), family, rule)
        for name, (family, rule) in CHECKPOINTS.items()
    }
    for name, (family, rule, arguments, options) in PACKED.items():
        change = partial(_quantized, arguments, options)
        directories[name] = save_checkpoint(tmp_path_factory.mktemp(name), family, rule, change)
    relu = {"hidden_act": "relu"}
    directories["exact"] = save_checkpoint(
        tmp_path_factory.mktemp("exact"), "llama", None, cats_ext.apply_exact, **relu
    )
    directory = tmp_path_factory.mktemp("relufied")
    directories["relufied"] = save_checkpoint(directory, "llama", "two_threshold", hidden_act="relu")
    found = {name: (directory, expected(directory)) for name, directory in directories.items()}
    assert all(tokens["sparse"] != tokens["dense"] for name, (_, tokens) in found.items() if name in CHECKPOINTS)
    return found


def _quantized(arguments, options, model):
    import cats_ext

    cats_ext.quantize(model, *arguments, **options, progress=False)


@pytest.fixture(scope="session")
def llama(checkpoints):
    return checkpoints["llama"]


@pytest.fixture(scope="session", autouse=True)
def adapters(checkpoints, tmp_path_factory):
    """LoRA adapters, and what PEFT generates with them, by the checkpoint's name; made before vLLM runs."""
    return {name: _adapter(checkpoints[name][0], tmp_path_factory.mktemp("adapter")) for name in ADAPTED}


def _adapter(checkpoint, directory):
    import torch
    from peft import LoraConfig, get_peft_model
    from support.served import generate
    from transformers import AutoModelForCausalLM

    import cats_ext
    from cats_ext.patching.apply import current_config
    from cats_ext.quantization.run import quantized_linears

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if packed := quantized_linears(model):  # which PEFT does not take
        config = current_config(model)
        cats_ext.remove_cats(model)
        for name, linear in packed.items():
            dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
            dense.load_state_dict({"weight": linear.unpacked(torch.float32)})
            model.set_submodule(name, dense)
        cats_ext.apply_cats(model, config, check_weights=False)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(directory)
    return directory, generate(tuned.eval())


@pytest.fixture(scope="session", autouse=True)
def real(tmp_path_factory):
    """Of the model that CATS_TEST_MODEL names, if it does: directories by rule, prompts, and what transformers
    generates with each of them, and densely.
    """
    if "CATS_TEST_MODEL" not in os.environ:
        return {}
    import torch
    from support.served import scored

    import cats_ext
    from cats_ext.cli.models import load_model
    from cats_ext.cli.text import CALIBRATION_MODULES, docstrings

    model, tokenizer = load_model(os.environ["CATS_TEST_MODEL"], device="cpu", dtype=torch.float32)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    directories, expected, text = {}, {"dense": scored(model, prompts)}, docstrings(CALIBRATION_MODULES)
    options = {"sparsity": 0.5, "importance": "norm", "max_tokens": 1024, "progress": False}
    for rule in ("plain", "two_threshold"):
        directories[rule] = tmp_path_factory.mktemp(rule)
        config = cats_ext.calibrate(model, text, tokenizer=tokenizer, rule=rule, **options)
        cats_ext.apply_cats(model, config).save_pretrained(directories[rule])
        tokenizer.save_pretrained(directories[rule])
        expected[rule] = scored(model, prompts)
        cats_ext.remove_cats(model)
    return directories, prompts, expected
