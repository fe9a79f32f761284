"""Models that transformers has spread over ranks by a tensor-parallel plan."""

from __future__ import annotations

import os
import time
from unittest.mock import patch

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for
from support.ranks import GROUP_SECONDS, RankError, load_parallel, on_ranks, takes_tensor_parallelism
from torch import Tensor

from cats_ext import (
    CatsConfig,
    apply_cats,
    apply_exact,
    apply_relufication,
    calibrate,
    masking_disabled,
    quantize,
    remove_cats,
    reset_sparsity,
    set_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.decode import DecodeEngine
from cats_ext.ops import definitions
from cats_ext.parallel.sharding import group_of, local
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


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())


@pytest.fixture(scope="module")
def dense_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    tiny_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cats_directory(tmp_path_factory, config):
    directory = tmp_path_factory.mktemp("cats")
    apply_cats(tiny_model(), config).save_pretrained(directory)
    return directory


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


# --- calibration ----------------------------------------------------------------------------------------------------


def calibrated(directory, arguments) -> CatsConfig:
    return config_for(load_parallel(directory), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "plain"},
        {"rule": "weighted"},
        {"importance": "norm"},
        {"importance": "gradient"},
        {"sparsity": None, "budget": 0.6},
    ],
    ids=str,
)
def test_calibration_gives_the_thresholds_of_one_process(arguments, dense_directory):
    one = config_for(tiny_model(), **arguments)
    first, second = on_ranks(calibrated, dense_directory, arguments)
    assert first.to_dict() == second.to_dict()
    for found in (first, second):
        assert found.layers.keys() == one.layers.keys()
        for name, layer in one.layers.items():
            assert found.layers[name].up_sparsity == pytest.approx(layer.up_sparsity, abs=0.02)
            torch.testing.assert_close(found.thresholds[name], first.thresholds[name], rtol=0, atol=0)
            torch.testing.assert_close(found.thresholds[name], one.thresholds[name], rtol=0.02, atol=1e-4)
            torch.testing.assert_close(found.weights[name], one.weights[name], rtol=0, atol=0)
            assert found.statistics[name].gate.total == one.statistics[name].gate.total
        for name, threshold in one.down_thresholds.items():
            torch.testing.assert_close(found.down_thresholds[name], threshold, rtol=0.02, atol=1e-4)
    apply_cats(tiny_model(), first)


def calibrate_on_other_text(directory) -> None:
    rank = torch.distributed.get_rank()
    calibrate(load_parallel(directory), tokens(300, seed=rank), sparsity=0.5, progress=False)


def test_data_that_differs_between_ranks(dense_directory):
    for error in on_ranks(calibrate_on_other_text, dense_directory, fail=True):
        assert "data must be the same on all ranks" in str(error)


def calibrate_to_another_sparsity(directory) -> None:
    sparsity = 0.5 + 0.1 * torch.distributed.get_rank()
    calibrate(load_parallel(directory), tokens(300), sparsity=sparsity, progress=False)


def test_arguments_that_differ_between_ranks(dense_directory):
    for error in on_ranks(calibrate_to_another_sparsity, dense_directory, fail=True):
        assert "the arguments of calibrate must be the same on all ranks" in str(error)


def calibrate_with_a_checkpoint(directory, path) -> None:
    config_for(load_parallel(directory), checkpoint=path)


def test_a_checkpoint_of_a_calibration_is_refused(dense_directory, tmp_path):
    for error in on_ranks(calibrate_with_a_checkpoint, dense_directory, tmp_path / "checkpoint", fail=True):
        assert "checkpoint must be None for a tensor-parallel model, got" in str(error)


def load_packed(directory) -> None:
    load_parallel(directory)


def test_packed_rows_are_refused(tmp_path):
    quantize(tiny_model(), progress=False).save_pretrained(tmp_path)
    for error in on_ranks(load_packed, tmp_path, fail=True):
        assert "is tensor-parallel, which a checkpoint with packed rows does not support" in str(error)


# --- what is refused, on every rank ---------------------------------------------------------------------------------


def differing(directory, config) -> None:
    own = config.at_sparsity(0.5 if torch.distributed.get_rank() == 0 else 0.6)
    apply_cats(load_parallel(directory), own)


def test_configs_that_differ_between_ranks(dense_directory, config):
    for error in on_ranks(differing, dense_directory, config, fail=True):
        assert "config must be the same on all ranks, but rank 1 has another one than rank 0" in str(error)


def differing_sparsity(directory) -> None:
    set_sparsity(load_parallel(directory), 0.5 if torch.distributed.get_rank() == 0 else 0.6)


def test_sparsities_that_differ_between_ranks(cats_directory):
    for error in on_ranks(differing_sparsity, cats_directory, fail=True):
        assert "sparsity must be the same on all ranks, but rank 1 has another one than rank 0" in str(error)


def wrong_on_one_rank(directory, config) -> None:
    model = load_parallel(directory)
    if torch.distributed.get_rank() == 1:
        local(model.model.layers[1].mlp.up_proj.weight).data.add_(1)
    before = [local(p).clone() for p in model.parameters()]
    try:
        apply_cats(model, config)
    finally:
        after = [local(p) for p in model.parameters()]
        assert all(map(torch.equal, before, after))
        assert not sparse_mlps(model)


def test_an_error_of_one_rank_is_raised_on_all(dense_directory, config):
    first, second = on_ranks(wrong_on_one_rank, dense_directory, config, fail=True)
    assert "config is for other weights than the model's: up_proj of model.layers.1.mlp differs" in str(second)
    assert "rank 1 has stopped with ValueError: config is for other weights" in str(first)


def uneven(directory, config) -> None:
    apply_cats(load_parallel(directory), config)


def test_neurons_that_cannot_be_shared_evenly(tmp_path):
    model = tiny_model(intermediate_size=177)
    config = config_for(model)
    model.save_pretrained(tmp_path)
    for error in on_ranks(uneven, tmp_path, config, fail=True):
        assert "the number of ranks must divide its 177 neurons, got 2" in str(error)


def test_experts_are_refused(tmp_path):
    model = tiny_model("mixtral")
    config = config_for(model)
    model.save_pretrained(tmp_path)
    for error in on_ranks(uneven, tmp_path, config, fail=True):
        assert "MixtralExperts) cannot run sparsely: its forward has been replaced on the instance (tensor par" in (
            str(error)
        )


def ranks_of_norms_first(directory) -> int:
    attention = load_parallel(directory).model.layers[0].self_attn
    attention._modules = dict(reversed(attention._modules.items()))
    return group_of(attention).size()


def test_norms_before_projections(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert on_ranks(ranks_of_norms_first, tmp_path) == [2, 2]


def refusals(directory) -> list[str]:
    model, messages = load_parallel(directory), []
    for refused in (DecodeEngine, apply_exact, quantize):
        with pytest.raises(ValueError, match="tensor-parallel") as caught:
            refused(model)
        messages.append(str(caught.value))
    return messages


def test_what_is_not_supported(dense_directory):
    name = "LlamaForCausalLM"
    for messages in on_ranks(refusals, dense_directory):
        assert messages == [
            f"{name} is tensor-parallel, which the decode engine does not support: use model.generate",
            f"model of class {name} is tensor-parallel, which apply_exact does not support",
            f"model of class {name} is tensor-parallel, which quantize does not support",
        ]


def die(directory) -> None:
    model = load_parallel(directory)
    few_and_many(model)
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    few_and_many(model)


def test_a_rank_that_dies_ends_the_others(cats_directory):
    started = time.monotonic()
    first, second = on_ranks(die, cats_directory, fail=True)
    assert "the process has ended" in str(second)
    assert isinstance(first, RankError)
    assert "RuntimeError" in str(first) or "DistBackendError" in str(first)
    assert time.monotonic() - started < GROUP_SECONDS + 30
