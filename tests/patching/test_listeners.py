"""Who is told of patching: before, after, and before removal; a listener that fails leaves the model as it was."""

from __future__ import annotations

import pytest
from support.models import tiny_model
from support.patched import assert_unchanged, config_for, layers_of, snapshot
from torch import nn

from cats_ext import CatsMLP, apply_cats, apply_relufication, remove_cats
from cats_ext.patching import listeners


@pytest.fixture
def told(monkeypatch):
    """What a listener was told: the event, and whether the model was patched at that time."""
    events = []

    def note(event):
        return lambda model, *_: events.append((event, isinstance(layers_of(model)[0], CatsMLP)))

    listener = listeners.PatchListener(*map(note, ("check", "patched", "quantized", "removing")))
    monkeypatch.setattr(listeners, "_listeners", [*listeners._listeners, listener])
    return events


@pytest.mark.parametrize("patch", ["cats", "relufication"])
def test_order(patch, told):
    model = tiny_model()
    config = config_for(model)
    told.clear()
    wrapped = nn.DataParallel(model)
    apply_cats(wrapped, config) if patch == "cats" else apply_relufication(wrapped)
    assert told == [("check", False), ("patched", True)]
    remove_cats(wrapped)
    assert told[2:] == [("removing", True)]


def test_a_listener_refuses(told, monkeypatch):
    def refuse(model, *_):
        raise ValueError("not this one")

    model = tiny_model()
    config, before = config_for(model), snapshot(model)
    for event in ("check", "patched"):
        functions = {name: lambda *_: None for name in ("check", "patched", "quantized", "removing")} | {event: refuse}
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="not this one"):
            patch.setattr(listeners, "_listeners", [*listeners._listeners, listeners.PatchListener(**functions)])
            apply_cats(model, config)
        assert_unchanged(model, before)
    assert told[-1] == ("removing", True)  # what was told of patching is told of its end
