"""Models that transformers has spread over ranks by a tensor-parallel plan."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for, few_and_many
from support.ranks import load_parallel, on_ranks, takes_tensor_parallelism
from torch import Tensor

from cats_ext import (
    CatsConfig,
    apply_cats,
    apply_relufication,
    masking_disabled,
    remove_cats,
    reset_sparsity,
    set_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.ops import definitions
from cats_ext.parallel.sharding import group_of, local
from cats_ext.patching.apply import sparse_mlps

pytestmark = takes_tensor_parallelism
FAMILIES = ["llama", "llama-bias", "qwen3", "gemma2"]
MERGED_PLAN = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}


def patch_and_run(directory, config, options) -> tuple:
    model = load_parallel(directory, **options)
    dense = few_and_many(model)
    layouts = [local(p).stride() for p in model.parameters()]
    apply_cats(model, config)
    kinds = {module.forward_settings.projections for module in sparse_mlps(model).values()}
    sizes = {tuple(module.threshold.shape) for module in sparse_mlps(model).values()}
    with patch.object(definitions, "sparse_mlp", side_effect=definitions.sparse_mlp) as kernel:
        sparse = few_and_many(model)
    assert kernel.call_count == len(sparse_mlps(model))  # of one token, and not of 24
    remove_cats(model)
    assert [local(p).stride() for p in model.parameters()] == layouts
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


def generate(model) -> Tensor:
    return model.generate(tokens(9)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)


def load_and_generate(directory, options) -> tuple:
    model = load_parallel(directory, **options)
    return len(sparse_mlps(model)), generate(model)


@pytest.mark.parametrize("door", ["checkpoint", "quantization_config"])
def test_checkpoints_are_loaded_and_generate_the_same_text(door, cats_directory, dense_directory, config):
    expected = generate(apply_cats(tiny_model(), config))
    arguments = (cats_directory, {}) if door == "checkpoint" else (dense_directory, {"quantization_config": config})
    for patched, text in on_ranks(load_and_generate, *arguments):
        assert patched == len(config.layers)
        assert torch.equal(text, expected)


def test_merged_projections_with_a_packed_plan(tmp_path):
    model = tiny_model("phi3")
    config = config_for(model)
    model.save_pretrained(tmp_path)
    expected = few_and_many(apply_cats(model, config))
    for kinds, _, _, sparse, _ in on_ranks(patch_and_run, tmp_path, config, {"tp_plan": MERGED_PLAN}):
        assert kinds == {"sharded_merged"}
        torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)


def test_merged_projections_with_the_plan_of_transformers_are_refused(tmp_path):
    model = tiny_model("phi3")
    config = config_for(model)
    model.save_pretrained(tmp_path)
    for error in on_ranks(patch_and_run, tmp_path, config, {}, fail=True):
        assert "its tensor-parallel plan must have 'packed_colwise' for gate_up_proj and nothing else on it" in str(
            error
        )


def densely_prompted(directory, config) -> list[Tensor]:
    return few_and_many(apply_cats(load_parallel(directory), config, sparse_prefill=False))


def test_prompts_are_dense_where_the_config_says_so(dense_directory, config):
    model = tiny_model()
    (_, dense), (sparse, _) = few_and_many(model), few_and_many(apply_cats(model, config))
    for one, many in on_ranks(densely_prompted, dense_directory, config):
        torch.testing.assert_close(one, sparse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many, dense, rtol=1e-4, atol=1e-4)


def change_and_count(directory) -> tuple:
    model = load_parallel(directory)
    track_sparsity(model)
    set_sparsity(model, 0.8)
    sparse = few_and_many(model)
    report = sparsity_report(model)
    reset_sparsity(model)
    with masking_disabled(model):
        dense = few_and_many(model)
    return sparse, report.to_dict(), dense


def test_sparsity_is_changed_and_counted_over_all_ranks(cats_directory, config):
    model = apply_cats(tiny_model(), config)
    track_sparsity(model)
    set_sparsity(model, 0.8)
    expected = few_and_many(model)
    counted = sparsity_report(model)
    for sparse, report, dense in on_ranks(change_and_count, cats_directory):
        torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense, few_and_many(remove_cats(model) if sparse_mlps(model) else model))
        assert report["tokens"] == counted.tokens
        assert report["up_sparsity"] == pytest.approx(counted.up_sparsity, abs=1e-3)
        assert report["bytes_read"] == pytest.approx(counted.bytes_read, rel=1e-3)


def save(directory, target, main_only: bool) -> None:
    model = load_parallel(directory)
    set_sparsity(model, 0.7)
    options = {"is_main_process": torch.distributed.get_rank() == 0} if main_only else {}
    model.save_pretrained(target, **options)
    CatsConfig.from_pretrained(target)  # the files are there on every rank


@pytest.mark.parametrize("main_only", [False, True])
def test_saved_checkpoints_are_those_of_one_process(main_only, cats_directory, config, tmp_path):
    on_ranks(save, cats_directory, tmp_path, main_only)
    one = set_sparsity(apply_cats(tiny_model(), config), 0.7)
    one.save_pretrained(tmp_path / "one")
    for name in ("cats_thresholds.cats", "model.safetensors", "cats_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def save_given(directory, target, state_dict) -> None:
    first = torch.distributed.get_rank() == 0
    load_parallel(directory).save_pretrained(target, is_main_process=first, state_dict=state_dict if first else {})


def test_a_state_dict_that_only_the_first_rank_has(cats_directory, tmp_path):
    one = tiny_model()
    state_dict = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    on_ranks(save_given, cats_directory, tmp_path, state_dict)
    for name in ("cats_thresholds.cats", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (cats_directory / name).read_bytes()


def relufied(directory) -> list[Tensor]:
    return few_and_many(apply_relufication(load_parallel(directory)))


def test_relufication(dense_directory):
    expected = few_and_many(apply_relufication(tiny_model()))
    for found in on_ranks(relufied, dense_directory):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def gradients(model) -> list[Tensor]:
    """Of the projections of all MLPs, from a loss on 24 tokens."""
    model(tokens(24)[None]).logits.float().square().mean().backward()
    found = [p.grad for name, p in model.named_parameters() if ".mlp." in name]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


def trained(directory) -> list[Tensor]:
    return gradients(load_parallel(directory))


def test_gradients_are_those_of_one_process(cats_directory, config):
    expected = gradients(apply_cats(tiny_model(), config))
    for found in on_ranks(trained, cats_directory):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def compiled(directory) -> list[Tensor]:
    model = load_parallel(directory)
    eager = few_and_many(model)
    torch._dynamo.config.suppress_errors = False
    fast = torch.compile(model, backend="eager", fullgraph=True)
    return [*eager, *few_and_many(fast)]


def test_compiled(cats_directory):
    for one, many, fast_one, fast_many in on_ranks(compiled, cats_directory):
        torch.testing.assert_close(fast_one, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast_many, many, rtol=1e-5, atol=1e-5)


def ranks_of_norms_first(directory) -> int:
    attention = load_parallel(directory).model.layers[0].self_attn
    attention._modules = dict(reversed(attention._modules.items()))
    return group_of(attention).size()


def test_norms_before_projections(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert on_ranks(ranks_of_norms_first, tmp_path) == [2, 2]
