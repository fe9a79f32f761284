"""Models that transformers has spread over ranks by a tensor-parallel plan."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for
from support.ranks import load_parallel, on_ranks, takes_tensor_parallelism
from torch import Tensor

from cats_ext import CatsConfig, apply_cats, remove_cats
from cats_ext.patching.apply import sparse_mlps

pytestmark = takes_tensor_parallelism
FAMILIES = ["llama", "llama-bias", "qwen3", "gemma2"]
MERGED_PLAN = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}


def few_and_many(model: torch.nn.Module) -> list[Tensor]:
    """Logits of one token, which the sparse kernel computes, and of 24, which masked products do."""
    with torch.no_grad():
        return [model(tokens(count)[None]).logits for count in (1, 24)]


def patch_and_run(directory, config, options) -> tuple:
    model = load_parallel(directory, **options)
    dense = few_and_many(model)
    layouts = [p.to_local().stride() for p in model.parameters() if hasattr(p, "to_local")]
    apply_cats(model, config)
    kinds = {module.forward_settings.projections for module in sparse_mlps(model).values()}
    sizes = {tuple(module.threshold.shape) for module in sparse_mlps(model).values()}
    sparse = few_and_many(model)
    remove_cats(model)
    assert [p.to_local().stride() for p in model.parameters() if hasattr(p, "to_local")] == layouts
    assert not sparse_mlps(model)
    return kinds, sizes, dense, sparse, few_and_many(model)


@pytest.mark.parametrize("rule", ["plain", "two_threshold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_one_process(family, rule, tmp_path):
    model = tiny_model(family)
    config = config_for(model, rule=rule, gate_power=float(rule == "two_threshold"))
    model.save_pretrained(tmp_path)
    dense = few_and_many(model)
    sparse = few_and_many(apply_cats(model, config))
    results = on_ranks(patch_and_run, tmp_path, config, {})
    for kinds, sizes, rank_dense, rank_sparse, after in results:
        assert kinds == {"sharded"}
        assert sizes == {()} if rule == "plain" else {(88,)}
        torch.testing.assert_close(rank_dense, dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rank_sparse, sparse, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(rank_sparse[0], rank_dense[0], atol=1e-2)
        torch.testing.assert_close(after, rank_dense, rtol=0, atol=0)
    torch.testing.assert_close(results[0][2:], results[1][2:], rtol=0, atol=0)
