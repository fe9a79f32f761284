"""vLLM serves packed rows, and models that are sparse by themselves, as transformers computes them."""

from __future__ import annotations

import pytest
from support.served import engine, served, served_alone, skip_without_vllm

from cats_ext.integrations.vllm import reset_sparsity, set_sparsity, sparsity_report
from cats_ext.ops import dispatch

skip_without_vllm()


@pytest.mark.parametrize("name", ["int4", "int8-formats", "fp8-merged", "int4-all", "int4-rows"])
def test_packed_rows(checkpoints, name, monkeypatch):
    directory, expected = checkpoints[name]
    with engine(directory, additional_config={"cats": {"count": True}}) as llm:
        assert served(llm) == served_alone(llm) == expected["sparse"]
        assert sparsity_report(llm).layers[0].weight_bytes < 3 * 128 * 176 * 2
        monkeypatch.setitem(dispatch.MAX_PACKED_TOKENS, "cpu", 0)  # unpacked for the products
        assert served(llm) == expected["sparse"]


def test_packed_rows_compiled(checkpoints):
    directory, expected = checkpoints["int4"]
    with engine(directory, enforce_eager=False) as llm:
        assert served(llm) == expected["sparse"]
        set_sparsity(llm, 0.0)
        assert served(llm) == expected["dense"]


def test_packed_rows_in_the_transformers_backend(checkpoints):
    directory, expected = checkpoints["int8-formats"]
    with engine(directory, model_impl="transformers") as llm:
        assert served(llm) == served_alone(llm) == expected["sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int4-all"])
def test_packed_rows_under_tensor_parallelism(checkpoints, name):
    directory, expected = checkpoints[name]
    with engine(directory, tensor_parallel_size=2) as llm:
        assert served(llm) == expected["sparse"]


def test_sparse_by_itself(checkpoints):
    """vLLM's own Llama has no ReLU."""
    directory, expected = checkpoints["exact"]
    with engine(directory, model_impl="transformers", additional_config={"cats": {"count": True}}) as llm:
        reset_sparsity(llm)
        assert served(llm) == served_alone(llm) == expected["sparse"]
        assert 0.3 < sparsity_report(llm).up_sparsity < 0.7
        with pytest.raises(Exception, match="of a model that is sparse by itself cannot be set"):
            set_sparsity(llm, 0.7)


def test_thresholds_of_a_relufied_model(checkpoints):
    directory, expected = checkpoints["relufied"]
    with engine(directory, model_impl="transformers") as llm:
        assert served(llm) == expected["sparse"]
        set_sparsity(llm, 0.0)
        assert served(llm) == expected["dense"]


def test_lora_beside_packed_rows(checkpoints, adapters):
    from vllm.lora.request import LoRARequest

    directory, expected = checkpoints["int8-formats"]
    path, adapted = adapters["int8-formats"]
    with engine(directory, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        assert served(llm) == expected["sparse"]
        assert served(llm, lora_request=LoRARequest("tuned", 1, str(path))) == adapted
