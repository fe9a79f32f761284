"""Loads the two compiled libraries and remembers what happened, so that ``cats env`` can say why one is missing.

``_C`` holds the CPU kernels, ``_C_cuda`` the CUDA kernels. Both are built against the LibTorch stable ABI, so one build
serves every torch from 2.10 on; ``_C_cuda`` needs a CUDA build of torch to resolve its symbols.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]  # cats_ext/, where setup.py puts the libraries


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: where it is, whether it loaded, and the reason if it did not."""

    name: str
    path: str | None
    loaded: bool
    reason: str | None = None
    build_info: str | None = None


def _build_info(path: Path) -> str:
    info = ctypes.CDLL(str(path)).cats_build_info
    info.restype = ctypes.c_char_p
    return info().decode()


def _load(name: str, skip_reason: str | None = None) -> LibraryStatus:
    found = sorted(PACKAGE.glob(f"{name}.*so"))
    if not found:
        return LibraryStatus(name, None, False, "not built: this copy of cats_ext has no such file")
    path = found[0]
    if skip_reason is not None:
        return LibraryStatus(name, str(path), False, skip_reason)
    try:
        torch.ops.load_library(path)
        return LibraryStatus(name, str(path), True, build_info=_build_info(path))
    except (OSError, RuntimeError) as error:
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"  # the loader's message, from torch 2.11 on
        return LibraryStatus(name, str(path), False, f"{type(error).__name__}: {error}{cause}")


def load_libraries() -> dict[str, LibraryStatus]:
    """Load what can be loaded. With ``CATS_REQUIRE_EXT=1`` a library that should load and does not is an error.

    ``_C_cuda`` should with a CUDA build of torch; one that is not built is missed only where there is a GPU.
    """
    no_cuda = None if torch.version.cuda else f"torch {torch.__version__} is not a CUDA build"
    status = {"_C": _load("_C"), "_C_cuda": _load("_C_cuda", skip_reason=no_cuda)}
    if os.environ.get("CATS_REQUIRE_EXT", "0") == "1":
        cuda = torch.version.cuda and (status["_C_cuda"].path is not None or torch.cuda.is_available())
        required = ["_C", "_C_cuda"] if cuda else ["_C"]
        missing = [f"{name} ({status[name].reason})" for name in required if not status[name].loaded]
        if missing:
            raise ImportError(
                f"CATS_REQUIRE_EXT=1, and compiled libraries of cats_ext in {PACKAGE} did not load: "
                f"{'; '.join(missing)}. Install the package (pip install .) and do not run from the source tree, or "
                "build in place (python setup.py build_ext --inplace)."
            )
    return status


LIBRARIES = load_libraries()
