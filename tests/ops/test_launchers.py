"""Programs of tests/csrc on a GPU: the launcher, and the kernels as they are with a row format of the tests' own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.slow  # compiles the kernels for one format, about a minute
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("program", ["launch", "int8_rows"])
def test_program(program, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + "a" * (major == 9)
    sources = [ROOT / "tests" / "csrc" / f"{program}.cu", ROOT / "csrc" / "cuda" / "plan.cpp"]
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-O3", "-std=c++17", gencode, f"-I{ROOT / 'csrc'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(tmp_path / program)], check=True)
    done = subprocess.run([str(tmp_path / program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
