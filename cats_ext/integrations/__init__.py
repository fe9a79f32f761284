"""How cats_ext fits into other libraries: checkpoints of transformers, and its ``generate``."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The integration needs the first; whoever has a model of transformers has imported the second.
_MODULES = ("transformers.quantizers.auto", "transformers.modeling_utils")


class _AfterImport(MetaPathFinder):
    """Registers the quantizer once, right after the first of ``_MODULES`` has been imported.

    Of one whose import is in progress already, at the next import of any module after it.
    """

    searching = False  # for the spec of one of them, by the other finders

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _any_is_imported():
            self.finish()
            return None
        if fullname not in _MODULES or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)  # if it fails, a second attempt to import it is seen as well
                self.finish()

            spec.loader.exec_module = exec_module
        return spec

    def finish(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _register_quantizer()


def _any_is_imported() -> bool:
    modules = [module for name in _MODULES if (module := sys.modules.get(name)) is not None]
    return any(not getattr(module.__spec__, "_initializing", False) for module in modules)


def _register_quantizer() -> None:
    import cats_ext.integrations.transformers  # noqa: F401  registers itself


def register_with_transformers() -> None:
    """Let transformers' ``from_pretrained`` and ``save_pretrained`` know CATS: now, or as soon as it is imported.

    transformers is not imported for it, which takes two seconds that ``import cats_ext`` does not need.
    """
    if _any_is_imported():
        _register_quantizer()
    else:
        sys.meta_path.insert(0, _AfterImport())
