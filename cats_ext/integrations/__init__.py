"""How cats_ext fits into other libraries: accelerate's hooks, transformers' checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AfterImport(MetaPathFinder):
    """Calls ``action`` once, right after the module ``name`` has been imported."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = exec_module
        return spec


def _register_quantizer() -> None:
    import cats_ext.integrations.transformers  # noqa: F401  registers itself


def register_with_transformers() -> None:
    """Make transformers' ``from_pretrained`` know CATS: now, or as soon as its quantizers are imported.

    Not by importing them here, which takes two seconds that ``import cats_ext`` has no need of.
    """
    name = "transformers.quantizers.auto"
    if name in sys.modules:
        _register_quantizer()
    else:
        sys.meta_path.insert(0, _AfterImport(name, _register_quantizer))
