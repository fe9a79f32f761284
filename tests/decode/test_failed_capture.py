"""Engines whose graphs are captured at the same time, or cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
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
    left = []

    def fail(*_) -> None:
        left.append(True)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(session, "_leave_capture_mode", fail)
    monkeypatch.setattr(Session, "_advance", lambda *_: None)
    engine_session = Session(tiny_model(), 1, 32, False, (), False, False)
    on_cuda = ("get_rng_state", "set_rng_state", "Stream", "stream", "current_stream")
    interrupted = patch.object(torch.cuda, "CUDAGraph", side_effect=KeyboardInterrupt)  # where the capture begins
    with patch.multiple(torch.cuda, **dict.fromkeys(on_cuda, DEFAULT)), interrupted, pytest.raises(KeyboardInterrupt):
        engine_session.capture(Selection([], False))
    assert left


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
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    handle.remove()
    engine = DecodeEngine(model)
    assert torch.equal(engine.generate(ids, max_new_tokens=8), found)
    assert engine._session._graphs and torch.equal(found, model.generate(ids, max_new_tokens=8))


_FIRST_GRAPH = """
import warnings
import torch
from support.models import tiny_model, tokens
from cats_ext.decode.engine import DecodeEngine
from cats_ext.decode.session import Session

model, ids = tiny_model().cuda(), tokens(20)[None].cuda()
options = {"max_new_tokens": 8, "eos_token_id": 1}
advance, capture = Session._advance, Session.capture
held, calls = [], []

def fill(self, *arguments):
    advance(self, *arguments)
    calls.append(0)
    if len(calls) == 2:  # the last step before the capture
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            while True:
                held.append(torch.empty(512, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass

def release(self, selection):
    capture(self, selection)
    assert held and self.graph is None
    held.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)

Session._advance, Session.capture = fill, release
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    found = DecodeEngine(model, fused=False).generate(ids, **options)
assert any("cannot be captured" in str(one.message) for one in seen), seen
Session._advance, Session.capture = advance, capture
engine = DecodeEngine(model, fused=False)
assert torch.equal(engine.generate(ids, **options), found) and engine._session._graphs
"""


@pytest.mark.gpu
def test_a_first_capture_without_memory_does_not_end_the_process():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", _FIRST_GRAPH], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
