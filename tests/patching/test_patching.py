"""apply_cats and remove_cats: in place, one copy of the weights, all of it or nothing."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, LAYERS, tiny_model
from support.patched import InterruptAt, assert_unchanged, config_for, few, layers_of, logits, many, snapshot
from torch import nn

from cats_ext import CatsMLP, apply_cats, masking_disabled, remove_cats
from cats_ext._inputs import evaluation_mode
from cats_ext.calibration.passes import _frozen
from cats_ext.integrations.transformers import attach, detach
from cats_ext.patching.apply import _patch
from cats_ext.patching.detection import _check_formula
from cats_ext.patching.surgery import make_dense, make_sparse, patch_module, set_class


def test_unusual_strides_come_back():
    model = tiny_model()
    down = layers_of(model)[0].down_proj
    down.weight.data = torch.zeros(HIDDEN, INTERMEDIATE + 24)[:, :INTERMEDIATE].copy_(down.weight.detach())
    before = snapshot(model)
    remove_cats(apply_cats(model, config_for(model)))
    assert down.weight.stride() == (INTERMEDIATE + 24, 1)
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_patching_keeps_modules_parameters_and_state_dict(family):
    model = tiny_model(family)
    before = snapshot(model)
    apply_cats(model, config_for(model))
    after = snapshot(model)
    assert after["parameters"] == before["parameters"]
    assert [(name, identity) for name, identity, _ in after["modules"]] == [
        (name, identity) for name, identity, _ in before["modules"]
    ]
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][n][0], before["state"][n][0]) for n in before["state"])
    for module in layers_of(model):
        assert isinstance(module, CatsMLP)
        assert module.down_proj.weight.shape == (HIDDEN, INTERMEDIATE)
        assert module.down_proj.weight.t().is_contiguous()
        assert type(module.down_proj) is nn.Linear
    assert "two thresholds, target sparsity up 0.375, down 0.625" in repr(model)


def test_weights_may_stay_where_they_are(called):
    """``fully_shard`` takes contiguous weights only."""
    model, usual = tiny_model(), tiny_model()
    apply_cats(model, config_for(model), neuron_rows=False)
    apply_cats(usual, config_for(usual))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    found = logits(model, few())
    assert set(called) == {"gated_threshold"}
    torch.testing.assert_close(found, logits(usual, few()), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in remove_cats(model).parameters())


def test_memory_at_rest():
    model = tiny_model()

    def size():
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    before = size()
    apply_cats(model, config_for(model, gate_power=1))
    per_layer = 2 * 4 * INTERMEDIATE + 3 * 8
    assert size() - before == LAYERS * per_layer


def test_weights_load_into_a_patched_model():
    model, other = tiny_model(), tiny_model(seed=1)
    apply_cats(model, config_for(model))
    model.load_state_dict(other.state_dict())
    assert layers_of(model)[0].down_proj.weight.t().is_contiguous()
    torch.testing.assert_close(logits(remove_cats(model), many()), logits(other, many()))


@pytest.mark.parametrize(
    ("error", "family"), [(KeyboardInterrupt, "llama"), (MemoryError, "llama"), (KeyboardInterrupt, "mixtral")]
)
def test_patching_interrupted_at_any_line_leaves_nothing(error, family):
    model = tiny_model(family)
    config, before = config_for(model), snapshot(model)
    functions = [apply_cats, _patch, make_sparse, patch_module, attach]
    if error is KeyboardInterrupt:  # other errors are taken for the probed module's own
        functions.append(inspect.unwrap(_check_formula))
    for line in itertools.count():
        try:
            with InterruptAt(line, functions, error):
                apply_cats(model, config)
            break
        except error:
            assert_unchanged(model, before)
    assert line > 8 * LAYERS
    assert len([m for m in model.modules() if isinstance(m, CatsMLP)]) == LAYERS


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_removal_interrupted_at_any_line_is_completed(error):
    model = tiny_model()
    config, before = config_for(model), snapshot(model)
    for line in itertools.count():
        apply_cats(model, config)
        try:
            with InterruptAt(line, [make_dense, detach], error):
                remove_cats(model)
            break
        except error:
            assert_unchanged(model, before)
    assert line > 8 * LAYERS
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", range(2 * LAYERS))
def test_masking_interrupted_comes_back_everywhere(call, monkeypatch):
    model, calls = tiny_model(), itertools.count()
    apply_cats(model, config_for(model))
    before = snapshot(model)

    def interrupted(module, kind):
        if next(calls) == call:
            raise KeyboardInterrupt
        set_class(module, kind)

    monkeypatch.setattr("cats_ext.patching.apply.set_class", interrupted)
    with pytest.raises(KeyboardInterrupt), masking_disabled(model):
        pass
    assert_unchanged(model, before)


def test_contexts_interrupted_at_any_line_put_everything_back():
    model = tiny_model().train()
    model.model.norm.eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    before = [module.training for module in model.modules()]
    for line in itertools.count():
        try:
            with InterruptAt(line, [evaluation_mode.__wrapped__, _frozen.__wrapped__], KeyboardInterrupt):
                with evaluation_mode(model), _frozen(model):
                    pass
            break
        except KeyboardInterrupt:
            assert [module.training for module in model.modules()] == before, line
            assert [name for name, p in model.named_parameters() if p.requires_grad] == trained, line
            assert torch.is_grad_enabled(), line
    assert line > 20


@pytest.mark.parametrize("mode", [False, True], ids=["going there", "coming back"])
def test_evaluation_mode_interrupted_leaves_every_module_its_own(mode):
    class Interrupted(nn.Linear):
        armed = False

        def __setattr__(self, name, value):
            if name == "training" and value is mode and self.armed:
                self.__dict__["armed"] = False
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(2, 2), Interrupted(2, 2), nn.Linear(2, 2))
    model[1].armed = True
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        pass
    assert all(module.training for module in model.modules())


def test_a_model_in_training_mode_stays_in_it():
    model, twin = tiny_model(), tiny_model()
    config = config_for(twin)
    expected = logits(apply_cats(twin, config), many())
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    apply_cats(model, config)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(logits(model, many()), expected)
    remove_cats(model)
    assert [module.training for module in model.modules()] == modes


def test_removal_from_the_part_with_all_mlps_frees_the_whole(tmp_path):
    model = tiny_model()
    config = config_for(model)
    apply_cats(model, config)
    remove_cats(model.model)
    model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "cats_config.json").exists()
    assert not {"hf_quantizer", "save_pretrained"} & vars(model).keys()
    loaded = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(loaded, few()), logits(model, few()))

    before = snapshot(model)
    apply_cats(model, config)  # once more, now with the whole asked to be restored
    remove_cats(model.model)
    with pytest.raises(ValueError, match="is not patched: there is nothing to remove"):
        remove_cats(model)
    assert_unchanged(model, before)


def test_removal_from_some_mlps_is_refused():
    model = tiny_model()
    apply_cats(model, config_for(model))
    before = snapshot(model)
    for part in (layers_of(model)[1], model.model.layers[:2]):
        with pytest.raises(
            ValueError, match=r"is a part of a patched model and has \d of its MLPs, but not model.layers"
        ):
            remove_cats(part)
        assert_unchanged(model, before)
    remove_cats(model)
