"""Two processes with half of the neurons or half of the layers each, and adapters."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file
from support.served import engine, served, served_alone, skip_without_vllm

from cats_ext import CatsConfig
from cats_ext.integrations.vllm import set_sparsity

skip_without_vllm()


@pytest.mark.slow
def test_tensor_parallel(checkpoints):
    directory, expected = checkpoints["llama-bias"]  # the bias of down_proj is to be added once
    with engine(directory, tensor_parallel_size=2) as llm:
        assert served(llm) == served_alone(llm) == expected["sparse"]
        set_sparsity(llm, 0.0)
        assert served(llm) == expected["dense"]


@pytest.mark.slow
def test_pipeline_parallel(llama):
    directory, expected = llama
    # Not enforce_eager: vLLM's CPU build then makes no buffers between the ranks, whatever the model.
    options = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with engine(directory, pipeline_parallel_size=2, **options) as llm:
        assert served(llm) == expected["sparse"]
        set_sparsity(llm, 0.0)
        assert served(llm) == expected["dense"]


@pytest.mark.slow
def test_weights_of_the_second_rank_are_compared(llama, tmp_path):
    directory = shutil.copytree(llama[0], tmp_path / "copy")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][100:] *= 1.5  # neurons of rank 1
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"initialization failed|for other weights"):
        with engine(directory, tensor_parallel_size=2):
            pass


# What vLLM says depends on whether it is waiting for the rank, has seen its end, or has ended the other one too.
ENDED = r"(?i)died|dead|cancelled|shut|executor failed|follower node"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_engine(llama):
    with engine(llama[0], tensor_parallel_size=2) as llm:
        (pid, *_) = _worker_pids(llm)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Exception, match=ENDED):
            served(llm)


def _worker_pids(llm) -> list[int]:
    return [worker.proc.pid for worker in llm.llm_engine.model_executor.workers]


def test_world_size_that_does_not_divide_the_neurons(llama):
    from cats_ext.integrations.vllm.quantization import check_divisible

    with pytest.raises(ValueError, match=r"tensor_parallel_size must divide the 176 neurons of model\.layers\.0\.mlp"):
        check_divisible(CatsConfig.from_pretrained(llama[0]).layers, 3)


def test_lora(llama, adapters):
    """Adapters on the projections of the MLPs: what they add comes before the mask, as with PEFT."""
    from vllm.lora.request import LoRARequest

    directory, expected = llama
    path, adapted = adapters["llama"]
    with engine(directory, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        assert served(llm) == expected["sparse"]
        assert served(llm, lora_request=LoRARequest("tuned", 1, str(path))) == adapted
