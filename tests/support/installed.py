"""Whether libraries that work together here accept each other's installed versions."""

from __future__ import annotations

import importlib.metadata

import pytest


def skip_unless_transformers_takes_peft() -> None:
    """Skip a test that adds an adapter with transformers' own methods where transformers refuses the installed peft."""
    from transformers.integrations import peft

    try:
        peft.check_peft_version(min_version=peft.MIN_PEFT_VERSION)
    except (ImportError, ValueError) as error:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft")]
        pytest.skip(f"{versions[0]} refuses {versions[1]}: {error}")
