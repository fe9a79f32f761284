"""Which compiled libraries CATS_REQUIRE_EXT=1 insists on."""

from __future__ import annotations

import pytest
import torch

from cats_ext.native import library
from cats_ext.native.library import LibraryStatus

LOADED, BROKEN, ABSENT = ("there", True), ("there", False), (None, False)


@pytest.mark.parametrize(
    ("cpu", "cuda", "version", "gpu", "missing"),
    [
        (LOADED, LOADED, "13.0", True, None),
        (LOADED, ABSENT, None, False, None),
        (LOADED, BROKEN, None, False, None),  # of a torch without CUDA
        (LOADED, ABSENT, "13.0", False, None),  # built without nvcc; nothing runs on CUDA
        (LOADED, ABSENT, "13.0", True, "_C_cuda"),
        (LOADED, BROKEN, "13.0", False, "_C_cuda"),
        (ABSENT, LOADED, "13.0", True, "_C"),
    ],
)
def test_what_has_to_load(cpu, cuda, version, gpu, missing, monkeypatch):
    found = {"_C": cpu, "_C_cuda": cuda}
    monkeypatch.setattr(library, "_load", lambda name, **_: LibraryStatus(name, *found[name], reason="no reason"))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("CATS_REQUIRE_EXT", "1")
    if missing is None:
        library.load_libraries()
    else:
        with pytest.raises(ImportError, match=rf"did not load: {missing} \(no reason\)\."):
            library.load_libraries()
    monkeypatch.setenv("CATS_REQUIRE_EXT", "0")
    library.load_libraries()
