"""A config belongs to the weights it was made for: in any dtype and layout, and to no others."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.models import tiny_model
from support.patched import assert_unchanged, config_for, layers_of, snapshot
from torch import nn

from cats_ext import CatsConfig, apply_cats, remove_cats, set_sparsity
from cats_ext.thresholds.fit import SAMPLES, check_weights, difference, sample_weights, weight_of

OTHER = (
    r"config is for other weights than the model's: {} of model.layers.{}.mlp differs in \d+ of 128 sampled elements"
)


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())


@pytest.mark.parametrize("calibrated", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_may_change(calibrated, used, stored):
    model = tiny_model().to(stored)
    config = config_for(model.to(calibrated), rule="plain")
    apply_cats(tiny_model().to(stored).to(used), config)


def test_through_bfloat16_and_back(config):
    apply_cats(tiny_model().bfloat16().float(), config)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_changed_weights_are_refused(config, projection):
    model = tiny_model()
    weight = getattr(layers_of(model)[1], projection).weight
    with torch.no_grad():
        weight.mul_(1 + 1e-3 * torch.randn_like(weight))  # a little training
    before = snapshot(model)
    with pytest.raises(ValueError, match=OTHER.format(projection, 1) + ".*check_weights=False"):
        apply_cats(model, config)
    assert_unchanged(model, before)
    assert apply_cats(model, config, check_weights=False) is model
    set_sparsity(model, 0.6)
    apply_cats(remove_cats(model), replace(config, weights={}))


def test_another_model_of_the_same_shape_is_refused(config):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=OTHER.format("gate_proj", 0)):
        apply_cats(type(model := tiny_model())(model.config), config)


def test_permuted_layers_are_refused(config):
    model = tiny_model()
    layers = model.model.layers
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp
    with pytest.raises(ValueError, match=OTHER.format("gate_proj", 1)):
        apply_cats(model, config)
    names = [*config.layers]
    swapped = dict(zip(names, (names[0], names[2], names[1]), strict=True))
    parts = ("thresholds", "down_thresholds", "statistics", "weights")
    permuted = replace(config, **{part: {n: getattr(config, part)[swapped[n]] for n in names} for part in parts})
    apply_cats(model, permuted)


@pytest.mark.parametrize("family", ["phi3", "mixtral", "llama-bias"])
def test_other_layouts(family):
    model = tiny_model(family)
    config = config_for(model, rule="plain")
    apply_cats(tiny_model(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name and parameter.dim() > 1:
                parameter.add_(1)
    with pytest.raises(ValueError, match=r"down_proj of model.layers.0.mlp\S* differs in 128 of 128"):
        apply_cats(model, config)


def test_the_sample_does_not_depend_on_how_weights_are_stored():
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    separate = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    merged = {"gate_up_proj": torch.cat([gate, up]), "down_proj": down.mT.contiguous().mT}
    sample = sample_weights(separate.get)
    assert torch.equal(sample, sample_weights(merged.get)) and sample.shape == (3, SAMPLES)
    assert {*sample[1].tolist()} == {*up.flatten().tolist()}  # every element of a small one


def test_a_shard_is_compared_with_its_part_of_the_sample():
    """Under tensor parallelism a rank has the weights of some neurons."""
    whole = Projections(72, 40)
    sample = sample_weights(partial(weight_of, whole))
    shards = [whole.shard(first, 24) for first in (0, 24, 48)]
    places = [sample_weights(partial(weight_of, shard), 24 * rank, 72).shape[1] for rank, shard in enumerate(shards)]
    assert sum(places) == SAMPLES and all(places)
    for rank, shard in enumerate(shards):
        check_weights("mlp", sample, partial(weight_of, shard), 24 * rank, 72)
        for projection in ("gate_proj", "up_proj", "down_proj"):
            changed = copy.deepcopy(shard)
            getattr(changed, projection).weight.data *= 1.5
            with pytest.raises(
                ValueError, match=rf"{projection} of mlp differs in \d+ of {places[rank]} sampled elements"
            ):
                check_weights("mlp", sample, partial(weight_of, changed), 24 * rank, 72)
        with pytest.raises(ValueError, match="for other weights"):
            check_weights("mlp", sample, partial(weight_of, shard), 24 * ((rank + 1) % 3), 72)


class Projections(nn.Module):
    def __init__(self, neurons: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden_size, neurons, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(neurons, hidden_size, bias=False)

    def shard(self, first: int, count: int) -> Projections:
        own = slice(first, first + count)
        part = copy.deepcopy(self)
        for name in ("gate_proj", "up_proj"):
            getattr(part, name).weight.data = getattr(self, name).weight.data[own]
        part.down_proj.weight.data = self.down_proj.weight.data[:, own]
        return part


def test_it_costs_nothing_with_large_layers():
    module = nn.Module()
    for name, shape in (("gate_proj", (28672, 8192)), ("up_proj", (28672, 8192)), ("down_proj", (8192, 28672))):
        module.register_parameter(name, nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(shape)))
    sample_weights(partial(weight_of, module))
    start = time.thread_time()
    sample_weights(partial(weight_of, module))
    assert time.thread_time() - start < 0.1  # of a layer with 1.4 GB


def test_with_and_without_a_head(config):
    model = tiny_model()
    apply_cats(model.model, config)
    remove_cats(model.model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    with pytest.raises(ValueError, match=r"up_proj of layers.0.mlp differs in 128"):
        apply_cats(model.model, config)


def test_thresholds_saved_by_themselves_are_checked(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = CatsConfig.from_pretrained(tmp_path)
    assert apply_cats(tiny_model(), loaded)
    model = tiny_model()
    with torch.no_grad():
        layers_of(model)[2].gate_proj.weight.neg_()
    with pytest.raises(ValueError, match=OTHER.format("gate_proj", 2)):
        apply_cats(model, loaded)


def test_check_weights_is_checked(config):
    with pytest.raises(TypeError, match="check_weights must be True or False, got 'no'"):
        apply_cats(tiny_model(), config, check_weights="no")


def test_differing_names_are_found_in_linear_time():
    left, right = ([f"{side}.{i}" for i in range(50_000)] for side in "ab")
    start = time.thread_time()
    assert difference(left, right, "left", "right").startswith("only in left: a.0, a.1, a.2 and 49997 more; only in")
    assert time.thread_time() - start < 2
