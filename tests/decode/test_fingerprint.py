"""The fingerprint of a model shows each change that a captured step or a filled cache would miss, and costs little."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for
from torch import nn

import cats_ext
from cats_ext.decode.engine import DecodeEngine
from cats_ext.decode.fingerprint import Fingerprint
from cats_ext.decode.session import Session

SQUARE = {"num_key_value_heads": 4}  # k_proj's weight is square


pytestmark = pytest.mark.usefixtures("one_thread")


def patched() -> nn.Module:
    model = tiny_model(**SQUARE)
    return cats_ext.apply_cats(model, config_for(model))


def in_layer(path: str, change):
    return lambda model: change(model.model.layers[1].get_submodule(path))


def replace_child(attention: nn.Module) -> None:
    attention.k_proj = copy.deepcopy(attention.k_proj)


def rename_attribute(mlp: nn.Module) -> None:
    vars(mlp)["renamed"] = vars(mlp).pop("intermediate_size") + 1


def transpose_in_place(linear: nn.Module) -> None:
    place = linear.weight.data_ptr()
    linear.weight.data = linear.weight.data.t()
    assert linear.weight.data_ptr() == place


def narrow(linear: nn.Module) -> None:
    linear.weight.data = linear.weight.data[:-1]


def reinterpret(linear: nn.Module) -> None:
    linear.weight.requires_grad_(False).data = linear.weight.data.view(torch.int32)


def move_parameter(layer: nn.Module) -> None:
    layer.second.scale, layer.first.scale = layer.first.scale, None


STATE_CHANGES = {
    "another child": in_layer("self_attn", replace_child),
    "another class": in_layer("self_attn.o_proj", lambda m: setattr(m, "__class__", type("Other", (nn.Linear,), {}))),
    "a child more": in_layer("mlp", lambda m: m.add_module("more", nn.Identity())),
    "a child less": in_layer("mlp", lambda m: m.__delattr__("act_fn")),
    "a factor": in_layer("self_attn", lambda m: setattr(m, "scaling", 0.7)),
    "an attribute more": in_layer("mlp", lambda m: setattr(m, "flag", None)),
    "an attribute with another name": in_layer("mlp", rename_attribute),
    "an entry of a list": in_layer("mlp", lambda m: m.notes.append(1)),
    "an entry of a nested dictionary": in_layer("mlp", lambda m: m.factors["a"].update(b=2.0)),
    "a tensor outside the buffers": in_layer("mlp", lambda m: setattr(m, "table", m.table.clone())),
    "another forward": in_layer("mlp", lambda m: setattr(m, "forward", lambda x: x)),
    "a hook": in_layer("mlp.up_proj", lambda m: m.register_forward_hook(lambda *_: None)),
    "a hook before": in_layer("mlp.up_proj", lambda m: m.register_forward_pre_hook(lambda *_: None)),
    "a weight in another place": in_layer("mlp.up_proj", lambda m: setattr(m.weight, "data", m.weight.data.clone())),
    "a weight with other strides": in_layer("self_attn.k_proj", transpose_in_place),
    "a weight with another shape": in_layer("mlp.up_proj", narrow),
    "a weight with another dtype": in_layer("mlp.up_proj", reinterpret),
    "a bias": in_layer("mlp.up_proj", lambda m: setattr(m, "bias", nn.Parameter(torch.zeros(m.out_features)))),
    "a parameter of another module": lambda m: move_parameter(m.model.layers[1]),
    "a buffer in another place": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq.clone()),
    "the config": lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
    "tracking": lambda m: m.model.layers[0].mlp.track(True),
}


@pytest.fixture
def model() -> nn.Module:
    model = patched()
    mlp = model.model.layers[1].mlp
    mlp.notes, mlp.factors, mlp.table = [], {"a": {"b": 1.0}}, torch.zeros(3)
    layer = model.model.layers[1]
    layer.first, layer.second = nn.Module(), nn.Module()
    layer.first.scale = nn.Parameter(torch.ones(3))
    layer.second.register_parameter("scale", None)
    return model


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_state_changes_with_the_model(model, change):
    fingerprint = Fingerprint(model)
    before, _ = fingerprint.read()
    assert fingerprint.read()[0] == before
    keep = list(model.parameters())  # else another weight could get the place of a freed one
    with torch.no_grad():
        STATE_CHANGES[change](model)
    after, _ = fingerprint.read()
    assert after != before and fingerprint.read()[0] == after
    del keep


def test_state_changes_with_the_modes(model):
    fingerprint = Fingerprint(model)
    before, _ = fingerprint.read()
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint.read()[0] != before
    torch.use_deterministic_algorithms(True)
    try:
        assert fingerprint.read()[0] != before
    finally:
        torch.use_deterministic_algorithms(False)
    for kind in ("forward", "forward_pre"):
        with getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None):
            assert fingerprint.read()[0] != before
    assert fingerprint.read()[0] == before


def test_equal_values_are_the_same_state(model):
    fingerprint = Fingerprint(model)
    before = fingerprint.read()
    mlp = model.model.layers[1].mlp
    mlp.factors = {"a": {"b": float("1.0")}}
    mlp.table = mlp.table.view(3)
    assert fingerprint.read() == before


@pytest.mark.parametrize("inference", [False, True])
def test_versions_count_writes_to_weights_and_thresholds(inference):
    with torch.inference_mode(inference):
        model = patched()
    fingerprint, mlp = Fingerprint(model), model.model.layers[1].mlp
    versions = [fingerprint.read()[1]]
    mlp.counts.data.add_(1)
    assert fingerprint.read()[1] == versions[0]
    if not inference:  # tensors made in inference mode have no count
        for tensor in (mlp.up_proj.weight, mlp.threshold, model.lm_head.weight):
            with torch.no_grad():
                tensor.mul_(2)
            versions.append(fingerprint.read()[1])
            assert versions[-1] != versions[-2]


def test_a_replaced_weight_is_freed(model):
    fingerprint = Fingerprint(model)
    fingerprint.read()
    attention = model.model.layers[1].self_attn
    module, weight = weakref.ref(attention.k_proj), weakref.ref(attention.k_proj.weight)
    replace_child(attention)
    gc.collect()
    assert module() is None and weight() is None


def python_calls(function) -> int:
    """How many Python functions a call runs."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_call_does_not_run_python_code_for_each_module(monkeypatch):
    """Beside the forwards: 27 layers more, of 13 modules each, add no call of a Python function."""
    monkeypatch.setattr(Session, "tokens", lambda *_: iter(()))
    ids, counts = tokens(8)[None], []
    options = {"max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    for layers in (3, 30):
        engine = DecodeEngine(tiny_model(num_hidden_layers=layers))
        engine.generate(ids, **options)
        counts.append(python_calls(lambda engine=engine: engine.generate(ids, **options)))
    assert counts[0] == counts[1]
