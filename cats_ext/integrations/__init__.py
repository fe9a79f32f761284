"""How cats_ext fits into other libraries: checkpoints of transformers, and its ``generate``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The integration needs the first; whoever has a model of transformers has imported the second.
_QUANTIZERS, _MODELS = "transformers.quantizers.auto", "transformers.modeling_utils"


class _AfterImport(MetaPathFinder):
    """Calls ``action`` once, right after the first of the modules ``names`` has been imported.

    Of one whose import is in progress already, at the next import of any module after it.
    """

    def __init__(self, names: tuple[str, ...], action: Callable[[], None]) -> None:
        self.names, self.action = names, action
        self.searching = False  # for the spec of one of them, by the other finders

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if any(_is_imported(name) for name in self.names):
            self.finish()
            return None
        if fullname not in self.names or self.searching:
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
            self.action()


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register_quantizer() -> None:
    import cats_ext.integrations.transformers  # noqa: F401  registers itself


def register_with_transformers() -> None:
    """Let transformers' ``from_pretrained`` and ``save_pretrained`` know CATS: now, or as soon as it is imported.

    transformers is not imported for it, which takes two seconds that ``import cats_ext`` does not need.
    """
    if _is_imported(_QUANTIZERS) or _is_imported(_MODELS):
        _register_quantizer()
    else:
        sys.meta_path.insert(0, _AfterImport((_QUANTIZERS, _MODELS), _register_quantizer))
