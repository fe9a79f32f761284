"""What one rank refuses, or ends with, is an error on all ranks; none of them waits for another."""

from __future__ import annotations

import errno
import os
from unittest.mock import patch

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for, few_and_many
from support.ranks import RankError, load_parallel, on_ranks, takes_tensor_parallelism

from cats_ext import apply_cats, apply_exact, calibrate, quantize, remove_cats, set_sparsity, sparsity_report
from cats_ext.decode import DecodeEngine
from cats_ext.integrations import saving
from cats_ext.parallel.ranks import raised_together
from cats_ext.parallel.sharding import group_of, local
from cats_ext.patching import listeners
from cats_ext.patching.apply import sparse_mlps

pytestmark = takes_tensor_parallelism


def load_packed(directory) -> None:
    load_parallel(directory)


def test_packed_rows_are_refused(tmp_path):
    quantize(tiny_model(), progress=False).save_pretrained(tmp_path)
    for error in on_ranks(load_packed, tmp_path, fail=True):
        assert "is tensor-parallel, which a checkpoint with packed rows does not support" in str(error)


def with_columns_of_the_gate(directory, config) -> None:
    model = load_parallel(directory)
    for refused in (
        lambda: calibrate(model, tokens(200), rule=config.rule, progress=False),
        lambda: apply_cats(model, config),
    ):
        with pytest.raises(ValueError, match=r"got a part of its neurons on this rank .* in model\.layers\.0\.mlp"):
            refused()
    assert not sparse_mlps(model)


def test_a_part_of_a_gate_is_not_read_by_columns(dense_directory):
    on_ranks(with_columns_of_the_gate, dense_directory, config_for(tiny_model(), rule="three_threshold"))


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
    first, second = on_ranks(die, cats_directory, fail=True)
    assert "the process has ended" in str(second)
    assert isinstance(first, RankError)
    assert "RuntimeError" in str(first) or "DistBackendError" in str(first)
    assert "imed out" not in str(first)


# --- errors between communications ----------------------------------------------------------------------------------


def calibrate_with_nan(directory, projection, arguments) -> None:
    model = load_parallel(directory)
    if torch.distributed.get_rank() == 1:
        local(getattr(model.model.layers[0].mlp, projection).weight).data[3, 5] = torch.nan
    try:
        calibrate(model, tokens(300), sparsity=0.5, sequence_length=150, **arguments)
    finally:
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("projection", "arguments"),
    [
        ("gate_proj", {"rule": "plain"}),
        ("gate_proj", {"rule": "plain", "progress": False}),
        ("up_proj", {"progress": False}),
        ("up_proj", {"importance": "norm", "progress": False}),
    ],
    ids=str,
)
def test_activations_that_are_not_finite_on_one_rank(projection, arguments, dense_directory):
    first, second = on_ranks(calibrate_with_nan, dense_directory, projection, arguments, fail=True)
    assert "ValueError: activations of model.layers.0.mlp: " in str(second)
    assert str(second) in (str(first).replace("ValueError: rank 1 has stopped with ", ""), str(first))


def full_disk(*arguments, **named) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_where_it_fails(directory, target, place, main_only) -> None:
    model, first = load_parallel(directory), torch.distributed.get_rank() == 0
    options = {"is_main_process": first} if main_only else {}
    if place == "thresholds" and first:
        next(iter(sparse_mlps(model).values())).cats.config.calibration["not JSON"] = object()
    patches = {
        "config.json": patch.object(type(model.config), "save_pretrained", full_disk),
        "weights": patch("transformers.modeling_utils.safe_save_file", full_disk),
        "publish": patch.object(saving, "publish", full_disk),
    }
    if place in patches and first:
        patches[place].start()
    model.save_pretrained(target / "new" if place != "directory" else target / "file" / "new", **options)


@pytest.mark.parametrize("main_only", [False, True])
@pytest.mark.parametrize("place", ["directory", "config.json", "weights", "publish", "thresholds"])
def test_a_checkpoint_that_cannot_be_written(place, main_only, cats_directory, tmp_path):
    (tmp_path / "file").touch()
    first, second = on_ranks(save_where_it_fails, cats_directory, tmp_path, place, main_only, fail=True)
    expected = {"directory": "NotADirectoryError", "thresholds": "TypeError"}.get(place, "OSError: [Errno 28]")
    assert str(first).startswith(expected)
    assert str(second) == f"ValueError: rank 0 has stopped with {first}"
    assert os.listdir(tmp_path) == ["file"]


def save_with_state_dict_of_one_rank(directory, target) -> None:
    first = torch.distributed.get_rank() == 0
    load_parallel(directory).save_pretrained(target, state_dict={} if first else None)


def test_a_state_dict_that_one_rank_leaves_out(cats_directory, tmp_path):
    for error in on_ranks(save_with_state_dict_of_one_rank, cats_directory, tmp_path, fail=True):
        assert "whether state_dict is given must be the same on all ranks, but rank 1 has" in str(error)


def patched_on_one_rank(directory, config, function) -> None:
    model = load_parallel(directory)
    apply_cats(model, config)
    if torch.distributed.get_rank() == 1:
        remove_cats(model)
    function(model) if function is sparsity_report else function(model, 0.5)


@pytest.mark.parametrize("function", [set_sparsity, sparsity_report])
def test_a_model_that_is_patched_on_one_rank(function, dense_directory, config):
    first, second = on_ranks(patched_on_one_rank, dense_directory, config, function, fail=True)
    assert "is not patched" in str(second)
    assert str(first) == f"ValueError: rank 1 has stopped with {second}"


def fail_while_patching(directory, config) -> None:
    model = load_parallel(directory)
    failing = torch.distributed.get_rank() == 1
    with patch.object(listeners, "patched", side_effect=MemoryError("no memory") if failing else None):
        try:
            apply_cats(model, config)
        finally:
            assert not sparse_mlps(model)


def test_an_error_while_a_model_is_patched(dense_directory, config):
    first, second = on_ranks(fail_while_patching, dense_directory, config, fail=True)
    assert str(second) == "MemoryError: no memory"
    assert str(first) == f"ValueError: rank 1 has stopped with {second}"


def fail_beside_a_rank_that_dies(directory) -> None:
    group = group_of(load_parallel(directory))
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    with raised_together(group):
        raise KeyError("own") from ValueError("cause")


def test_an_error_is_not_lost_where_the_others_cannot_be_told(dense_directory):
    first, _ = on_ranks(fail_beside_a_rank_that_dies, dense_directory, fail=True)
    assert str(first) == "KeyError: 'own'"
