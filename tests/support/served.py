"""Tiny CATS checkpoints, what transformers generates from them, and vLLM's engine on the CPU in this process."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_model
from support.patched import config_for
from support.saved_model import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import cats_ext
from cats_ext.patching.apply import sparse_mlps

NEW = 24
# vLLM's attention on the CPU wants heads of 32 or more; the neurons are divided among two ranks.
SIZES = {"hidden_size": 128, "intermediate_size": 176}
HEAD_DIM = {"qwen3", "gemma", "gemma2", "gemma3"}  # families whose heads have a size of their own

_generator = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 128, (n,), generator=_generator).tolist() for n in (3, 5, 7, 11, 17, 30, 40, 64)]


def save_checkpoint(
    directory: Path,
    family: str,
    rule: str | None,
    change: Callable[[torch.nn.Module], object] = lambda model: None,
    **sizes: Any,
) -> Path:
    """A tiny CATS checkpoint with a tokenizer in ``directory``; of rule None as ``change`` leaves it."""
    save_tiny_model(directory)
    model = tiny_model(family, **SIZES, **({"head_dim": 32} if family in HEAD_DIM else {}), **sizes)
    change(model)
    if rule is not None:
        cats_ext.apply_cats(model, config_for(model, rule=rule))
    model.save_pretrained(directory)
    return directory


def generate(model: torch.nn.Module, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Greedy tokens of each prompt by itself, in transformers."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    batches = [torch.tensor([prompt]) for prompt in prompts]
    outputs = [model.generate(input_ids=ids, **options, eos_token_id=None)[0, ids.shape[1] :] for ids in batches]
    return [output.tolist() for output in outputs]


def scored(model: torch.nn.Module, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Greedy tokens of each prompt by itself, in transformers, and the log-probabilities ``[NEW, vocabulary]``."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for prompt in prompts:
        output = model.generate(input_ids=torch.tensor([prompt]), **options)
        found.append((output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).log_softmax(-1)))
    return found


def expected(directory: Path) -> dict[str, list[list[int]]]:
    """What transformers generates, as saved and without thresholds. Before vLLM runs, which changes transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sparse = generate(model)
    return {"sparse": sparse, "dense": generate(cats_ext.remove_cats(model)) if sparse_mlps(model) else sparse}


@contextlib.contextmanager
def engine(directory: Path | str, **arguments: Any) -> Iterator[Any]:
    """A ``vllm.LLM``; it and its processes are gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
    options |= {"kv_cache_memory_bytes": 64 << 20, "disable_log_stats": True}
    if "tensor_parallel_size" not in arguments and "pipeline_parallel_size" not in arguments:
        options["distributed_executor_backend"] = "uni"
    llm = None
    try:
        llm = LLM(str(directory), **options | arguments)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm: Any, prompts: list[list[int]] = PROMPTS, **arguments: Any) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **arguments)
    return [list(output.outputs[0].token_ids) for output in outputs]


def served_alone(llm: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [served(llm, [prompt])[0] for prompt in prompts]


def score_differences(llm: Any, prompts: list[list[int]], expected: list[tuple[list[int], Tensor]]) -> Tensor:
    """Of each token that vLLM generates, the largest difference between the log-probabilities of its 20 best and
    those of transformers (:func:`scored`), up to the first token with which a text goes another way.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=20)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    differences = []
    for output, (tokens, scores) in zip(outputs, expected, strict=True):
        served = output.outputs[0]
        for token, other, best, row in zip(served.token_ids, tokens, served.logprobs, scores, strict=True):
            differences.append(max(abs(float(row[i]) - score.logprob) for i, score in best.items()))
            if token != other:
                break
    return torch.tensor(differences)


def edit_config(directory: Path, name: str = "config.json", **entries: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def skip_without_vllm() -> None:
    """Skip a module of tests where vLLM is not installed, or the plugin is not."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: .ci/vllm installs its CPU build", allow_module_level=True)
    if "cats" not in entry_points(group="vllm.general_plugins").names:
        pytest.skip("cats_ext is not installed, so that vLLM does not find its plugin", allow_module_level=True)
