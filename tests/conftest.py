"""Shared by all tests: which compiled libraries they run on, skips where there is no GPU, hypothesis settings."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from cats_ext.native.library import LIBRARIES

# The tests import bench/ from the source tree. The root comes last, so that an installed cats_ext wins over ./cats_ext.
sys.path.append(str(Path(__file__).parents[1]))

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


@pytest.fixture(scope="module")
def one_thread():
    """At these sizes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense_directory(tmp_path_factory):
    """A checkpoint of the tiny model."""
    from support.models import tiny_model

    directory = tmp_path_factory.mktemp("dense")
    tiny_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cats_directory(tmp_path_factory):
    """The same model's, patched with ``config_for``."""
    from support.models import tiny_model
    from support.patched import config_for

    from cats_ext import apply_cats

    directory, model = tmp_path_factory.mktemp("cats"), tiny_model()
    apply_cats(model, config_for(model)).save_pretrained(directory)
    return directory


@pytest.fixture
def called(monkeypatch):
    """The ops that patched MLPs call, in order: which implementation was chosen."""
    from cats_ext.decode import fused
    from cats_ext.ops import definitions as ops
    from cats_ext.ops import experts as expert_ops

    names = []

    def spy(module, name):
        real = getattr(module, name)
        op = name.removesuffix("_forward")
        monkeypatch.setattr(module, name, lambda *arguments: (names.append(op), real(*arguments))[1])

    sparse = ("sparse_mlp", "sparse_mlp_counted", "sparse_mlp_packed", "sparse_mlp_packed_counted")
    columns = ("sparse_mlp_columns", "sparse_mlp_columns_counted")
    for name in (*sparse, *columns, "gated_threshold", "gated_threshold_forward"):
        spy(ops, name)
    spy(fused, "sparse_mlp_columns_step")
    spy(expert_ops, "sparse_experts")
    return names


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, as from_pretrained loads it."""
    from support.saved_model import save_tiny_model

    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    words = "the cat sat on a mat and saw that its threshold was not yet reached by any of them".split()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=600)))
    return path


@pytest.fixture(scope="session")
def thresholds(model_dir, text_file, tmp_path_factory) -> Path:
    """Of ``model_dir``, by the plain rule at 50 %."""
    from support.cli_runner import cats

    directory = tmp_path_factory.mktemp("thresholds")
    arguments = ("--rule", "plain", "--sequence-length", 128)
    result = cats("calibrate", model_dir, "--text", text_file, "-o", directory, *arguments)
    assert result.exit_code == 0, result.stderr
    return directory
