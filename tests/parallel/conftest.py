"""Checkpoints of a tiny model, dense and patched, for the ranks to load."""

from __future__ import annotations

import pytest
from support.models import tiny_model
from support.patched import config_for

from cats_ext import apply_cats


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())


@pytest.fixture(scope="module")
def dense_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    tiny_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cats_directory(tmp_path_factory, config):
    directory = tmp_path_factory.mktemp("cats")
    apply_cats(tiny_model(), config).save_pretrained(directory)
    return directory
