"""A GPU whose memory runs out in ``apply_cats``, in the engine's cache or in a capture: the model is as it was.

Once there is memory again, the same call works.
"""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import assert_unchanged, config_for, logits, snapshot

from cats_ext import apply_cats, remove_cats
from cats_ext.decode import session as decode
from cats_ext.decode.engine import DecodeEngine

MIB = 1 << 20
IDS = tokens(20)[None]
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 1}

pytestmark = pytest.mark.gpu


@contextmanager
def memory_left(size: int):
    """Inside, this process can take ``size`` bytes of the GPU beside what it holds."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def large_model() -> torch.nn.Module:
    """Its down projections take 32 MiB each, three of them."""
    return tiny_model(hidden_size=1024, intermediate_size=8192)


@pytest.mark.parametrize("left", [16 * MIB, 80 * MIB], ids=["first layer", "third layer"])
def test_apply_cats(left):
    model = large_model()
    config = config_for(model, importance="norm")
    model.cuda()
    before, expected = snapshot(model), logits(model, IDS.cuda())
    # Held, so that the memory that a layer frees does not serve the next one.
    held = [layer.mlp.down_proj.weight.data for layer in model.model.layers]
    with memory_left(left):
        try:
            apply_cats(model, config)
        except torch.OutOfMemoryError:
            pass
        else:
            assert left > 32 * MIB, "nothing ran out"  # the memory of a layer may be laid out where it is
            remove_cats(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, IDS.cuda()), expected)
    del held
    sparse = logits(apply_cats(model, config), IDS.cuda())
    assert not torch.equal(sparse, expected)
    assert torch.equal(logits(remove_cats(model), IDS.cuda()), expected)


def patched_on_gpu() -> torch.nn.Module:
    model = tiny_model(intermediate_size=2304)
    return apply_cats(model, config_for(model)).cuda()


def generated(model) -> torch.Tensor:
    ids = IDS.cuda()
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **OPTIONS)


def test_cache():
    model = patched_on_gpu()
    expected, before = generated(model), snapshot(model)
    engine = DecodeEngine(model, max_length=1 << 22)  # 3 layers of 512 MiB each
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the fused step could not be made
        with memory_left(600 * MIB), pytest.raises(torch.OutOfMemoryError):
            engine.generate(IDS.cuda(), **OPTIONS)
    assert_unchanged(model, before)
    engine.max_length = 0
    assert torch.equal(engine.generate(IDS.cuda(), **OPTIONS), expected)
    assert torch.equal(generated(model), expected)


@pytest.mark.parametrize("where", ["warm-up", "capture"])
def test_capture(where, monkeypatch):
    """The tokens are right with a graph and without one; an engine made when there is memory again captures."""
    model = patched_on_gpu()
    expected, before = generated(model), snapshot(model)
    engine = DecodeEngine(model)
    ran_out = []

    class Cramped(torch.cuda.graph):
        """A capture without memory for it."""

        def __enter__(self):
            super().__enter__()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

        def __exit__(self, kind, *rest):
            ran_out.append(kind)
            torch.cuda.set_per_process_memory_fraction(1.0)
            super().__exit__(kind, *rest)

    def capture(session, selection, real=decode.Session.capture):
        with memory_left(0):
            real(session, selection)
        ran_out.append(session.graph is None)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the step runs without a graph
        if where == "capture":
            patch.setattr(torch.cuda, "graph", Cramped)
        else:
            patch.setattr(decode.Session, "capture", capture)
        try:
            assert torch.equal(engine.generate(IDS.cuda(), **OPTIONS), expected)
        except torch.OutOfMemoryError:
            pass
    assert ran_out and ran_out[0], "nothing ran out"
    assert_unchanged(model, before)
    assert torch.equal(engine.generate(IDS.cuda(), **OPTIONS), expected)
    again = DecodeEngine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.generate(IDS.cuda(), **OPTIONS), expected)
    assert again._session._graphs and torch.equal(generated(model), expected)
