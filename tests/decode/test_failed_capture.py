"""Engines whose graphs are captured at the same time, or cannot be."""

from __future__ import annotations

import threading
import time
from unittest.mock import DEFAULT, patch

import pytest
import torch
from support.models import tiny_model, tokens

from cats_ext.decode import session, state
from cats_ext.decode.engine import DecodeEngine
from cats_ext.decode.sampling import Selection
from cats_ext.decode.session import Session


def test_engines_of_two_models_prepare_one_after_the_other(monkeypatch):
    inside, overlaps = [], []

    def look(_):
        overlaps.append(len(set(inside) - {threading.get_ident()}))

    monkeypatch.setattr(state, "_wait_for", look)

    def prepare(turns: state.Turns) -> None:
        for _ in range(5):
            with turns.running(), turns.preparing(torch.device("cpu")):
                inside.append(threading.get_ident())
                time.sleep(0.002)
                inside.remove(threading.get_ident())

    threads = [threading.Thread(target=prepare, args=(state.Turns.of(tiny_model()),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(overlaps) == 20 and not any(overlaps)


def test_the_error_of_a_capture_is_not_replaced_by_that_of_its_end(monkeypatch):
    def fail(*_) -> None:
        raise RuntimeError("CUDA error: out of memory")

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_leave_capture_mode", fail)
    monkeypatch.setattr(Session, "_advance", interrupt)
    engine_session = Session(tiny_model(), 1, 32, False, (), False, False)
    on_cuda = ("get_rng_state", "set_rng_state", "Stream", "stream", "current_stream")
    with patch.multiple(torch.cuda, **dict.fromkeys(on_cuda, DEFAULT)), pytest.raises(KeyboardInterrupt):
        engine_session.capture(Selection([], False))


@pytest.mark.gpu
def test_a_failed_capture_leaves_torch_as_it_was():
    model, ids = tiny_model().cuda(), tokens(20)[None].cuda()
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    torch.manual_seed(0)
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the decode step cannot be captured"):
        found = DecodeEngine(model).generate(ids, max_new_tokens=8)
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    handle.remove()
    engine = DecodeEngine(model)
    assert torch.equal(engine.generate(ids, max_new_tokens=8), found)
    assert engine._session._graphs and torch.equal(found, model.generate(ids, max_new_tokens=8))
