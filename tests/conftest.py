"""Shared by all tests: which compiled libraries they run on, skips where there is no GPU, hypothesis settings."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from cats_ext._library import LIBRARIES

hypothesis.settings.register_profile("cats", deadline=None, print_blob=True)
hypothesis.settings.load_profile("cats")


def pytest_report_header() -> list[str]:
    lines = [f"cats_ext: torch {torch.__version__}, {torch.get_num_threads()} threads"]
    for library in LIBRARIES.values():
        state = f"loaded, {library.build_info}" if library.loaded else f"not loaded: {library.reason}"
        lines.append(f"cats_ext: {library.name} {state}")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def called(monkeypatch):
    """Which of the two ways the patched MLPs took."""
    from cats_ext import ops

    ways = []

    def spy(name):
        real = getattr(ops, name)
        return lambda *arguments: (ways.append(name), real(*arguments))[1]

    for name in ("sparse_mlp", "sparse_mlp_counted", "gated_threshold"):
        monkeypatch.setattr(ops, name, spy(name))
    return ways
