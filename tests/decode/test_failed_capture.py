"""Engines whose graphs are captured at the same time, or cannot be."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from unittest.mock import DEFAULT, patch

import pytest
import torch
from support.models import tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(enabled, monkeypatch):
    seen = []

    def advance(*_) -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "_leave_capture_mode", lambda device: seen.append(gc.isenabled()))
    monkeypatch.setattr(Session, "_advance", advance)
    engine_session = Session(tiny_model(), 1, 32, False, (), False, False)
    on_cuda = ("get_rng_state", "set_rng_state", "Stream", "stream", "current_stream")
    if not enabled:
        gc.disable()
    try:
        with patch.multiple(torch.cuda, **dict.fromkeys(on_cuda, DEFAULT)), pytest.warns(UserWarning, match="captured"):
            engine_session.capture(Selection([], False))
        assert gc.isenabled() == enabled and seen and not any(seen)
    finally:
        gc.enable()


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot read from the device")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_step_that_asks_for_the_length_is_captured_with_a_mask(family, sequences, static_steps, monkeypatch):
    """OPT makes a mask of as many ones as there are tokens. On the CPU a capture that sees what a graph refuses."""
    replay, attempts = Session._graph, []

    def graph(self, selection):
        attempts.append(self._helps)
        self.position.fill_(self.length - session.SPARE)
        with self._help(), _NoHostReads():
            self._advance(selection, False)
        return replay(self, selection)

    monkeypatch.setattr(Session, "_graph", graph)
    model, ids = tiny_model(family), tokens(10 * sequences).view(sequences, 10)
    want = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    engine = DecodeEngine(model, fused=False)
    engine.capture = True  # see static_steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.generate(ids, max_new_tokens=8, eos_token_id=-1), want)
    assert attempts == ([False] if family == "llama" else [False, True])


def test_numbers_of_the_host_become_constants():
    """Of a step that is helped: nothing is copied to the device. "meta" stands for it."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.overloadpacket._qualified_op_name)
            return op(*args, **(kwargs or {}))

    device = torch.device("meta")
    with session.HostNumbers(device), Seen():
        small = torch.tensor(1e-5).to(device)
        half = torch.tensor(0.25).to(device=device, dtype=torch.float16)
        given = torch.tensor(3, device="meta")
        on_host = torch.tensor([1.0, 2.0]).to(torch.float16)
    assert (small.device, half.dtype, given.dtype) == (device, torch.float16, torch.int64)
    assert (small.dtype, on_host.device.type, on_host.dtype) == (torch.float32, "cpu", torch.float16)
    assert seen.count("aten::full") == 3 and seen.count("aten::_to_copy") == 1
    with session.HostNumbers(torch.device("cpu")):
        assert torch.tensor(0.5, dtype=torch.float64).to(torch.float32).item() == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["opt", "gemma3n"])
def test_models_that_need_help_are_captured(family):
    model, ids = tiny_model(family).cuda(), tokens(10)[None].cuda()
    want = model.generate(ids, max_new_tokens=16, do_sample=False)
    engine = DecodeEngine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.generate(ids, max_new_tokens=16), want)
    assert engine._session._graphs


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


@pytest.mark.gpu
def test_garbage_of_other_captures_does_not_end_the_process():
    """Collected wherever Python allocates, in a capture that runs out of memory."""
    model, ids = tiny_model().cuda(), tokens(20)[None].cuda()
    expected = DecodeEngine(model).generate(ids, max_new_tokens=8)

    def litter() -> None:
        engine = DecodeEngine(model)
        engine.generate(ids, max_new_tokens=8)
        cycle = [engine, torch.zeros(1 << 20, pin_memory=True), torch.cuda.Event()]
        cycle.append(cycle)

    def run_out(module, args) -> None:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            torch.empty(1 << 60, device="cuda")

    before = gc.get_threshold()
    gc.disable()
    for _ in range(3):
        litter()
    handle = model.model.layers[0].register_forward_pre_hook(run_out)
    gc.enable()
    try:
        with pytest.warns(UserWarning, match="the decode step cannot be captured"):
            found = DecodeEngine(model).generate(ids, max_new_tokens=8)
    finally:
        gc.set_threshold(*before)
        handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(DecodeEngine(model).generate(ids, max_new_tokens=8), expected)
