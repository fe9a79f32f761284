"""The CPU kernels of every instruction set that this processor runs, and the variable that chooses one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cats_ext
from cats_ext.native.library import LIBRARIES

HERE = Path(__file__).parent
ALL = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"]
# "compiled for avx2, portable, of which this processor runs avx2, portable; uses avx2"
COMPILED, SUPPORTED, USED = re.search(
    r"compiled for (.*), of which this processor runs (.*); uses (\w+)", LIBRARIES["_C"].build_info
).groups()

CALL = """
import torch
from cats_ext.ops import definitions as ops
ops.gated_threshold(torch.ones(3), torch.ones(3), torch.tensor(0.0))
"""


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CATS_CPU_ISA": isa, "PYTHONPATH": str(Path(cats_ext.__file__).parent.parent)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True)


def test_the_processor_decides():
    assert set(COMPILED.split(", ")) <= set(ALL)
    assert "portable" in SUPPORTED.split(", ")
    if "CATS_CPU_ISA" not in os.environ:
        assert USED == SUPPORTED.split(", ")[0]


@pytest.mark.parametrize("isa", ALL)
def test_op_tests_pass_on(isa):
    """The op tests again, in a process that uses these kernels."""
    if isa == USED:
        pytest.skip(f"{isa} is what all tests of this process run on")
    if isa not in SUPPORTED.split(", "):
        pytest.skip(f"this processor runs {SUPPORTED} only")
    selected = ["-m", "not gpu and not slow", "-k", "not gradcheck and not python_threads"]
    files = ["test_sparse_mlp.py", "test_sparse_mlp_packed.py", "test_sparse_mlp_columns.py", "test_gated_threshold.py"]
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected, *files)
    assert done.returncode == 0, done.stdout[-4000:]


def test_unknown_name():
    done = run("sse9", "-c", CALL)
    assert f"RuntimeError: CATS_CPU_ISA must be one of {COMPILED}, got 'sse9'" in done.stderr


def test_name_that_this_processor_does_not_run():
    missing = [isa for isa in COMPILED.split(", ") if isa not in SUPPORTED.split(", ")]
    if not missing:
        pytest.skip("this processor runs all that is compiled")
    done = run(missing[0], "-c", CALL)
    assert f"CATS_CPU_ISA={missing[0]}: this processor cannot run these kernels, only {SUPPORTED}" in done.stderr
