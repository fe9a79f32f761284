"""Thresholds of the tiny model, for the ranks."""

from __future__ import annotations

import pytest
from support.models import tiny_model
from support.patched import config_for


@pytest.fixture(scope="module")
def config():
    return config_for(tiny_model())
