"""The CPU kernel takes any row format with any dtype of x: a format that only this test knows, and dense ones mixed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Sums in fp32, then one rounding to x's dtype; relative to the largest output.
TOLERANCE = {"fp32": 1e-5, "fp16": 2**-11 + 1e-5, "bf16": 2**-8 + 1e-5}
BUILDS = {  # as csrc/cpu/isa_*.cpp
    "portable": ["-DCATS_VECTOR_BYTES=16"],
    "avx2": ["-DCATS_VECTOR_BYTES=32", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DCATS_VECTOR_BYTES=64", "-mavx512f", "-mavx512bw", "-mavx512vl"],
    "avx512_bf16": [
        "-DCATS_VECTOR_BYTES=64", "-DCATS_DOT_BF16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"
    ],
}  # fmt: skip


def runs_here(isa: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return isa == "portable" or {"avx512": "avx512bw"}.get(isa, isa) in flags


@pytest.mark.skipif(not (ROOT / "csrc").is_dir() or not shutil.which("g++"), reason="needs the sources and g++")
@pytest.mark.parametrize("isa", BUILDS)
def test_rows_of_one_type_and_x_of_another(isa, tmp_path):
    if not runs_here(isa):
        pytest.skip("not this processor's")
    program, source = tmp_path / "row_formats", ROOT / "tests/csrc/row_formats.cpp"
    include = [f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", "-std=c++17", "-O1", *BUILDS[isa], *include, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4 * 9
    for line in lines:  # "int8 rows, x fp32 3.1e-07"
        name, error = line.rsplit(" ", 1)
        assert float(error) <= TOLERANCE[name[-4:]], line
