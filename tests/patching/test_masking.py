"""What is done to a model inside masking_disabled: it works, or is refused by name and leaves the model as it was."""

from __future__ import annotations

import copy
import io
import itertools
from contextlib import nullcontext

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import InterruptAt, assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

from cats_ext import (
    CatsMLP,
    apply_cats,
    apply_relufication,
    calibrate,
    masking_disabled,
    remove_cats,
    reset_sparsity,
    set_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.patching.surgery import set_class

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    model = tiny_model()
    return apply_cats(model, config_for(model))


REFUSED = {
    "calibrate with a search": lambda model: calibrate(model, tokens(300), allocation="search", sequence_length=150),
    "calibrate": lambda model: config_for(model),
    "apply_cats": lambda model: apply_cats(model, config_for(tiny_model())),
    "apply_relufication": apply_relufication,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(model, name):
    before, expected = snapshot(model), logits(model, few())
    with masking_disabled(model):
        dense = logits(model, few())
        with pytest.raises(ValueError, match=r"^model of class LlamaForCausalLM is patched already: call"):
            REFUSED[name](model)
        assert torch.equal(logits(model, few()), dense)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, few()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting(model, dtype):
    twin = copy.deepcopy(model).to(dtype)
    thresholds = [mlp.threshold.clone() for mlp in layers_of(model)]
    with masking_disabled(model):
        model.to(dtype)
        assert all(torch.equal(m.threshold, t) for m, t in zip(layers_of(model), thresholds, strict=True))
    for ids in (few(), many()):
        assert torch.equal(logits(model, ids), logits(twin, ids))


def test_saving_and_another_sparsity(model, tmp_path):
    with masking_disabled(model):
        set_sparsity(model, 0.7)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, few()), logits(model, few()))


def test_removal(model):
    dense = tiny_model()
    before = snapshot(dense)
    with masking_disabled(model):
        remove_cats(model)
        assert torch.equal(logits(model, few()), logits(dense, few()))
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    after = snapshot(model)
    assert {name: stride for name, (_, stride) in after["state"].items()} == {
        name: stride for name, (_, stride) in before["state"].items()
    }


def test_nested(model):
    with masking_disabled(model):
        dense = logits(model, few())
        with masking_disabled(model):
            assert torch.equal(logits(model, few()), dense)
        assert torch.equal(logits(model, few()), dense)
    assert all(isinstance(mlp, CatsMLP) for mlp in layers_of(model))


def test_tracking_counts_nothing_inside(model):
    with track_sparsity(model):
        logits(model, few())
        counted = sparsity_report(model).tokens
        with masking_disabled(model):
            logits(model, few())
            assert sparsity_report(model).tokens == counted
            reset_sparsity(model)
        logits(model, few())
        assert sparsity_report(model).tokens == counted


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_dense_too(model, duplicate):
    with masking_disabled(model):
        dense = logits(model, few())
        twin = duplicate(model.model)
        mlp = twin.layers[0].mlp
        assert isinstance(mlp, type(layers_of(tiny_model())[0])) and not isinstance(mlp, CatsMLP)
        model.model = twin
        torch.testing.assert_close(logits(model, few()), dense)
    remove_cats(twin)
    torch.testing.assert_close(logits(model, few()), dense)


@pytest.mark.parametrize("where", ["masking disabled", "dense prefill", "patched"])
def test_methods_of_the_original_class_are_there(where):
    class Helped(type(layers_of(tiny_model())[0])):
        def forward(self, x):
            return self.helper(super().forward(x))

        def helper(self, x):
            return x

    model = tiny_model()
    for mlp in layers_of(model):
        mlp.__class__ = Helped
    dense = logits(model, many())
    apply_cats(model, config_for(model), sparse_prefill=where == "patched")
    with masking_disabled(model) if where == "masking disabled" else nullcontext():
        assert torch.allclose(logits(model, many()), dense, rtol=1e-5, atol=1e-5) == (where != "patched")
        assert all(isinstance(mlp, Helped) for mlp in layers_of(model))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, few()), logits(model, few()))
    assert all(type(mlp) is Helped for mlp in layers_of(remove_cats(twin)))


def test_interrupted_anywhere_it_is_over(model):
    """At each line of the context, of leaving it, and of the body's end: what was patched is patched again."""
    before = [type(mlp) for mlp in layers_of(model)]
    for line in itertools.count():
        try:
            with InterruptAt(line, [masking_disabled.__wrapped__, set_class], KeyboardInterrupt):
                with masking_disabled(model):
                    pass
            break
        except KeyboardInterrupt:
            assert [type(mlp) for mlp in layers_of(model)] == before, line
    assert line > 20
