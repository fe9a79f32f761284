"""Patched models in transformers' ``generate``: every cache, beams, padding, drafts, continuous batching."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.models import tiny_model, tokens
from support.patched import config_for

from cats_ext import apply_cats, remove_cats, set_sparsity

GREEDY = {"max_new_tokens": 20, "do_sample": False}  # with the prompt, past the sliding window of 32
PROMPT = tokens(17)[None]


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def model(request):
    model = tiny_model(request.param)
    return apply_cats(model, config_for(model))


def generate(model, prompt=PROMPT, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(prompt, **GREEDY, **arguments)


@pytest.fixture(scope="module")
def expected(model):
    """Without any cache: every step runs the whole text, on the dense path."""
    return generate(model, use_cache=False)


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def skip_unless_possible(family, **arguments):
    """Old versions of transformers lack some combinations for any model."""
    try:
        generate(tiny_model(family), **arguments)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"transformers itself: {error}")


@pytest.mark.parametrize("cache", CACHES)
def test_the_same_text_with_every_cache(cache, model, expected):
    skip_unless_possible(model.config.model_type, **CACHES[cache])
    assert torch.equal(generate(model, **CACHES[cache]), expected)


def similar_to(model):
    """A dense draft model whose proposals are accepted in part."""
    draft = tiny_model(model.config.model_type)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += (
                0.1 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    return draft


def test_with_a_draft_model(model, expected, called):
    other = similar_to(model)
    skip_unless_possible(model.config.model_type, assistant_model=other)
    assert torch.equal(generate(model, assistant_model=other), expected)
    draft = set_sparsity(copy.deepcopy(model), 0.9)
    called.clear()
    assert torch.equal(generate(model, assistant_model=draft), expected)
    assert "sparse_mlp" in called


QUANTISED = {
    "fp8": {"backend": "fp8"},
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 8},
}


@pytest.mark.parametrize("backend", QUANTISED)
def test_with_a_quantised_cache(backend):
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    arguments = {"cache_implementation": "quantized", "cache_config": QUANTISED[backend]}
    skip_unless_possible("llama", **arguments)
    model = tiny_model()
    dense = generate(model, **arguments)
    apply_cats(model, config_for(model))
    assert not torch.equal(generate(model, **arguments), dense)
    assert torch.equal(generate(set_sparsity(model, 0.0), **arguments), dense)


MODES: dict[str, dict[str, Any]] = {
    "padded": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "beams with sampling": {"num_beams": 2, "do_sample": True},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_batches_with_padding(mode, called):
    model = tiny_model()
    prompts = torch.stack([tokens(10), tokens(10, seed=1)])
    mask = torch.ones_like(prompts)
    prompts[0, :4], mask[0, :4] = 0, 0

    def run():
        torch.manual_seed(0)
        return model.generate(prompts, attention_mask=mask, **(GREEDY | MODES[mode]))

    dense = run()
    apply_cats(model, config_for(model))
    called.clear()
    assert not torch.equal(run(), dense)
    assert "sparse_mlp" in called
    set_sparsity(model, 0.0)
    assert torch.equal(run(), dense)


def test_padding_changes_nothing():
    model = tiny_model()
    apply_cats(model, config_for(model))
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], dim=1)
    mask = (ids > 0).long()
    assert torch.equal(generate(model, ids, attention_mask=mask)[:, 4:], generate(model))


def test_continuous_batching():
    pytest.importorskip("transformers", minversion="5.10")
    model = tiny_model()
    apply_cats(model, config_for(model))
    prompts = [tokens(17).tolist(), tokens(9, 1).tolist(), tokens(30, 2).tolist()]
    generation = transformers.GenerationConfig(**GREEDY, eos_token_id=127)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=generation)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=small)
    assert [outputs[name].generated_tokens for name in sorted(outputs)] == expected


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_with_compiled_steps():
    model = tiny_model().cuda()
    apply_cats(model, config_for(model))
    prompt = PROMPT.cuda()
    expected = generate(model, prompt)
    torch._dynamo.reset()
    for _ in range(2):  # transformers compiles the step by itself where the cache is static
        assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)
    set_sparsity(model, 0.0)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), generate(remove_cats(model), prompt))


@pytest.mark.gpu
def test_offloaded_cache_while_the_device_lags_behind(monkeypatch):
    """Before 5.20 transformers' prefetch does not wait for the copies to the CPU; here it does with any version."""
    if Version(transformers.__version__) < Version("5.20"):
        update = transformers.Cache.update

        def update_after_copies(self, key_states, *arguments, **named):
            if self.offloading:
                self.prefetch_stream.wait_stream(torch.cuda.default_stream(key_states.device))
            return update(self, key_states, *arguments, **named)

        monkeypatch.setattr(transformers.Cache, "update", update_after_copies)
    model = tiny_model().cuda()
    apply_cats(model, config_for(model))
    prompt = PROMPT.cuda()
    expected = generate(model, prompt)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10_000_000))  # cycles: about 6 ms
    assert torch.equal(generate(model, prompt, cache_implementation="offloaded"), expected)
