"""Weights whose memory others have too: never detached in silence, and those made in inference mode stay usable."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, tiny_model
from support.patched import assert_unchanged, config_for, few, layers_of, logits, many, snapshot

from cats_ext import apply_cats, remove_cats

pytestmark = pytest.mark.usefixtures("one_thread")


def flatten(model) -> torch.Tensor:
    """All parameters become views of one buffer, as FSDP and DeepSpeed have them."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return flat


SHARED = {
    "shared memory": (lambda model: model.share_memory(), "is in memory shared between processes"),
    "flat buffer": (flatten, r"is a view of a buffer of \d+ bytes that other tensors use too"),
}


@pytest.mark.parametrize("name", SHARED)
def test_applying_is_refused_by_name(name):
    change, message = SHARED[name]
    model = tiny_model()
    config, expected = config_for(model), logits(tiny_model(), few())
    held = change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^model.layers.0.mlp.down_proj {message}, .*detach.*clone"):
        apply_cats(model, config)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, few()), expected)

    places = [p.data_ptr() for p in model.parameters()]
    apply_cats(model, config, neuron_rows=False)  # which changes no memory
    remove_cats(model)
    assert [p.data_ptr() for p in model.parameters()] == places and held is not None
    assert_unchanged(model, before)

    for mlp in layers_of(model):  # what the message says
        mlp.down_proj.weight.data = mlp.down_proj.weight.data.clone()
    apply_cats(model, config)
    remove_cats(model)
    assert torch.equal(logits(model, few()), expected)


def test_a_model_that_was_shared_after_patching_is_not_taken_out():
    model = tiny_model()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    model.share_memory()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.down_proj is in memory shared between processes"):
        remove_cats(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, few()), expected)
    for mlp in layers_of(model):
        mlp.down_proj.weight.data = mlp.down_proj.weight.data.clone()
    remove_cats(model)
    assert torch.equal(logits(model, few()), logits(tiny_model(), few()))


@pytest.mark.parametrize("kind", ["state dict", "numpy", "view"])
def test_memory_that_others_hold_keeps_its_values(kind):
    """What a layer leaves is the next one's only if nobody has it."""
    model = tiny_model()
    config = config_for(model)
    weights = [mlp.down_proj.weight for mlp in layers_of(model)]
    if kind == "numpy":
        held = [weight.detach().numpy().copy() for weight in weights]
        for weight, array in zip(weights, held, strict=True):
            weight.data = torch.from_numpy(array)
    else:
        held = [weight.data if kind == "state dict" else weight.detach().mT for weight in weights]
    copies = [torch.as_tensor(values).clone() for values in held]
    remove_cats(apply_cats(model, config))
    apply_cats(model, config)
    for values, copied in zip(held, copies, strict=True):
        assert torch.equal(torch.as_tensor(values), copied)
    assert torch.equal(logits(remove_cats(model), few()), logits(tiny_model(), few()))


def test_layers_of_several_sizes_and_layouts():
    """An interrupt at the last layer: each weight is laid out as before."""
    model = tiny_model()
    config = config_for(model)
    first, second, *_ = (mlp.down_proj.weight for mlp in layers_of(model))
    wide = torch.zeros(HIDDEN, INTERMEDIATE + 5)
    wide[:, :INTERMEDIATE] = first.detach()
    first.data = wide[:, :INTERMEDIATE]  # with a gap after each row
    del wide
    second.data = second.data.mT.contiguous().mT  # as it is to be
    expected, before = logits(model, few()), snapshot(model)

    def interrupted(model, config):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cats_ext.patching.listeners.patched", interrupted)
        apply_cats(model, config)
    assert_unchanged(model, before)
    apply_cats(model, config)
    assert all(mlp.down_proj.weight.mT.is_contiguous() for mlp in layers_of(model))
    remove_cats(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, few()), expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_an_activation_without_memory_is_no_other_activation(error):
    def runs_out(x):
        raise error("out of memory")

    model, config = tiny_model(), config_for(tiny_model())
    layers_of(model)[1].act_fn.forward = runs_out
    with pytest.raises(error, match="out of memory"):
        apply_cats(model, config)


OVERLAPPING = {
    "rows": lambda big: (big[:INTERMEDIATE], big[INTERMEDIATE // 2 : INTERMEDIATE // 2 + INTERMEDIATE]),
    "the last element": lambda big: (
        big.flatten()[: INTERMEDIATE * HIDDEN].view(INTERMEDIATE, HIDDEN),
        big.flatten()[INTERMEDIATE * HIDDEN - 1 :][: INTERMEDIATE * HIDDEN].view(INTERMEDIATE, HIDDEN),
    ),
}


@pytest.mark.parametrize("name", OVERLAPPING)
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
def test_overlapping_weights_are_refused(name, projection):
    model, config = tiny_model(), config_for(tiny_model())
    first, second = OVERLAPPING[name](torch.randn(2 * INTERMEDIATE, HIDDEN))
    getattr(layers_of(model)[0], projection).weight.data = first
    layers_of(model)[1].up_proj.weight.data = second
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layers.0.mlp .*: {projection}.weight shares memory with another weight"):
        apply_cats(model, config)
    assert_unchanged(model, before)


def test_neighbours_in_one_buffer_are_not_tied():
    model = tiny_model()
    mlp = layers_of(model)[0]
    both = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = both.chunk(2)
    expected = logits(apply_cats(tiny_model(), config_for(tiny_model())), few())
    assert torch.equal(logits(apply_cats(model, config_for(model)), few()), expected)


@pytest.mark.parametrize(("made", "patched", "removed"), list(itertools.product([False, True], repeat=3)))
def test_inference_mode_at_any_time(made, patched, removed):
    """The model runs afterwards wherever it ran before."""
    config = config_for(tiny_model())
    with torch.inference_mode(made):
        model = tiny_model()
    expected = logits(model, few())
    with torch.inference_mode(patched):
        apply_cats(model, config)
    run_everywhere(model, trains=not made)
    with torch.inference_mode(removed):
        remove_cats(model)
    run_everywhere(model, trains=not made)
    assert torch.equal(logits(model, few()), expected)


def run_everywhere(model, trains: bool) -> None:
    for ids in (few(), many()):
        logits(model, ids)  # under no_grad
        with torch.inference_mode():
            model(input_ids=ids)
        if trains:
            model(input_ids=ids).logits.sum().backward()
