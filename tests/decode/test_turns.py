"""The turns of the engines of one model, under an interrupt at every line: none may leave another one waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import nn

from cats_ext.decode.state import Turns

CPU = torch.device("cpu")
SECONDS = 10.0


def in_a_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def prepare(model: nn.Module) -> None:
    turns = Turns.of(model)
    with turns.running(), turns.preparing(CPU):
        pass


def nested(model: nn.Module) -> None:
    """A streamer that calls another engine of the same model, and goes on after an interrupt."""
    turns = Turns.of(model)
    with turns.running():
        try:
            prepare(model)
        except KeyboardInterrupt:
            assert waits(model), "the outer call is no longer counted"
        with turns.preparing(CPU):
            pass


def beside_a_call(model: nn.Module) -> None:
    """Wait for a call in another thread before preparing."""
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with Turns.of(model).running():
            entered.set()
            leave.wait(SECONDS)

    other = in_a_thread(call)
    entered.wait(SECONDS)
    threading.Timer(0.01, leave.set).start()
    try:
        prepare(model)
    finally:
        leave.set()
        other.join(SECONDS)


def waits(model: nn.Module) -> bool:
    """Whether another thread that wants to prepare has to wait."""
    done = threading.Event()
    in_a_thread(lambda: (prepare(model), done.set()))
    return not done.wait(0.05)


def interrupted_at(line: int, function: Callable[[nn.Module], None], model: nn.Module) -> bool:
    """Whether ``function`` has that many lines of state.py; KeyboardInterrupt is raised before the one numbered so."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith("decode/state.py"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    with suppress(KeyboardInterrupt):
        sys.settrace(trace)
        function(model)
    sys.settrace(None)
    return left < 0


@pytest.mark.parametrize("function", [prepare, nested, beside_a_call])
def test_an_interrupt_leaves_no_other_engine_waiting(function):
    line = 0
    while interrupted_at(line, function, model := nn.Identity()):
        for same in (model, nn.Identity()):
            other = in_a_thread(lambda model=same: prepare(model))
            other.join(SECONDS)
            assert not other.is_alive(), f"line {line} of {function.__name__}"
        line += 1
    assert line > 20


def test_two_threads_that_want_to_prepare_let_each_other():
    turns, both = Turns.of(nn.Identity()), threading.Barrier(2)

    def call() -> None:
        with turns.running():
            both.wait(SECONDS)
            with turns.preparing(CPU):
                pass

    threads = [in_a_thread(call) for _ in range(2)]
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def test_who_prepares_is_alone():
    model, order = nn.Identity(), []
    turns = Turns.of(model)

    def call() -> None:
        with turns.running():
            order.append("runs")

    with turns.running(), turns.preparing(CPU):
        other = in_a_thread(call)
        assert waits(model)
        order.append("prepares")
    other.join(SECONDS)
    assert order == ["prepares", "runs"]
