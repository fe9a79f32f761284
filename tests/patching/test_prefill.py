"""sparse_prefill=False: prompts as the dense model computes them, generated tokens as the sparse one."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model, tokens
from transformers import DynamicCache

from cats_ext import CatsConfig, apply_cats, calibrate, masking_disabled
from cats_ext.decode.cache import cache_argument


@torch.no_grad()
def step(model, ids, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(input_ids=ids[None], use_cache=True, **{cache_argument(model): cache}).logits[0], cache


@pytest.fixture(scope="module")
def config():
    return calibrate(tiny_model(), tokens(300), sparsity=0.7, progress=False)


@pytest.mark.parametrize("prompt", [2, 30])
def test_prompt_is_dense_and_the_next_token_sparse(config, prompt):
    ids, following = tokens(prompt), tokens(1, seed=3)
    dense, _ = step(tiny_model(), ids)
    model = apply_cats(tiny_model(), config, sparse_prefill=False)
    got, cache = step(model, ids)
    torch.testing.assert_close(got, dense)
    after, _ = step(model, following, cache)

    expected = apply_cats(tiny_model(), config)  # masks everything: its prompt is computed with masking off
    with masking_disabled(expected):
        _, cache = step(expected, ids)
    want, _ = step(expected, following, cache)
    torch.testing.assert_close(after, want)
    sparse_prompt, _ = step(expected, ids)
    assert (sparse_prompt - dense).abs().max() > 0.05


def test_batches_of_single_tokens_are_sparse(config):
    model = apply_cats(tiny_model(), config, sparse_prefill=False)
    sparse = apply_cats(tiny_model(), config)
    ids = tokens(5)[:, None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, sparse(input_ids=ids).logits)


def test_the_config_remembers_it(config, tmp_path):
    assert config.sparse_prefill
    model = apply_cats(tiny_model(), config, sparse_prefill=False)
    assert config.sparse_prefill  # not the caller's object
    kept = model.model.layers[0].mlp.cats.config
    kept.save_pretrained(tmp_path)
    assert CatsConfig.from_pretrained(tmp_path).sparse_prefill is False
    torch.testing.assert_close(
        step(apply_cats(tiny_model(), CatsConfig.from_pretrained(tmp_path)), tokens(9))[0],
        step(tiny_model(), tokens(9))[0],
    )
