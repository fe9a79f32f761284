from __future__ import annotations

import pytest

from cats_ext.decode import session as decode


class _Replay:
    """Stands in for a CUDA graph on a machine without one: runs the step that would have been captured."""

    def __init__(self, session: decode.Session, selection: object) -> None:
        self.replay = lambda: session._advance(selection, selection.graph_key is not None)


class _Event:
    def synchronize(self) -> None:
        pass


@pytest.fixture
def static_steps(monkeypatch) -> None:
    """The steps that are captured on CUDA, with their static cache and buffers, run one by one on the CPU."""
    monkeypatch.setattr(decode.Session, "_graph", lambda self, selection: _Replay(self, selection))
    monkeypatch.setattr(decode.Session, "_send", lambda self: (self.token.clone(), _Event()))
