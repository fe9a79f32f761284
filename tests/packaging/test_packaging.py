"""The build script's decisions, and what the built libraries ask of the machine they are loaded on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cats_ext
from cats_ext.native.library import LIBRARIES

# Here, before any test runs: after an import of the standard library's distutils, setuptools refuses to load.
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[2]
BUILT = [name for name, library in LIBRARIES.items() if library.path is not None]
# Found on every Linux with torch. libcudart is linked statically, libtorch_cuda comes with a CUDA build of torch.
# Before glibc 2.34 parts of libc were in libdl, libpthread and librt, which newer ones have too.
ALLOWED_LIBRARIES = re.compile(
    r"lib(c10|torch|torch_cpu|torch_cuda|stdc\+\+|gcc_s|c|m|dl|pthread|rt)\.so.*|ld-linux.*\.so.*"
)


@pytest.fixture
def build_script(monkeypatch) -> dict:
    """setup.py's functions, in an environment that says nothing about CUDA."""
    for name in ("CATS_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def fake_nvcc(home: Path, release: str) -> Path:
    """A CUDA toolkit of which only the part exists that setup.py asks."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\necho '#$ TOP={home}'\n"
    )
    nvcc.chmod(0o755)
    return nvcc


# --- what setup.py decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " "])
def test_unknown_cats_cuda_is_refused(build_script, monkeypatch, value):
    monkeypatch.setenv("CATS_CUDA", value)
    with pytest.raises(SystemExit, match=f"CATS_CUDA must be auto, 0 or 1, got '{value}'"):
        build_script["find_cuda"]()


def test_cats_cuda_0_leaves_cuda_out_even_where_nvcc_is(build_script, monkeypatch, tmp_path):
    fake_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CATS_CUDA", "0")
    assert build_script["find_cuda"]() == (None, "CATS_CUDA=0")


@pytest.mark.parametrize("value", ["", "auto", "1"])
def test_toolkit_of_cuda_home(build_script, monkeypatch, tmp_path, value):
    fake_nvcc(tmp_path, "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CATS_CUDA", value)
    assert build_script["find_cuda"]() == (tmp_path, "12.8")


def test_wrapper_in_path_leads_to_the_toolkit(build_script, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path / "toolkit", "12.8")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    assert build_script["find_cuda"]() == (tmp_path / "toolkit", "12.8")


def test_missing_and_old_nvcc_are_named(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_script["find_cuda"]() == (None, f"no bin/nvcc in CUDA_HOME '{tmp_path}'")
    monkeypatch.setenv("CATS_CUDA", "1")
    with pytest.raises(SystemExit, match=f"CATS_CUDA=1, but _C_cuda cannot be built: no bin/nvcc in .*{tmp_path.name}"):
        build_script["find_cuda"]()
    fake_nvcc(tmp_path, "11.8")
    with pytest.raises(SystemExit, match=r"nvcc 11\.8 is too old, the kernels need 12\.0"):
        build_script["find_cuda"]()


@pytest.mark.parametrize(
    ("asked", "nvcc", "expected"),
    [
        (None, "13.0", "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"),
        (None, "12.6", "8.0;8.6;8.9+PTX;9.0a"),  # 10.0 and 12.0 came with nvcc 12.8
        ("9.0a", "13.0", "9.0a"),
        ("8.0;9.0", "13.0", "8.0;9.0a"),
        ("7.0 7.5 8.0 9.0+PTX", "13.0", "8.0;9.0+PTX"),
        ("10.0;12.0", "13.0", "10.0;12.0"),
    ],
)
def test_architectures(build_script, monkeypatch, asked, nvcc, expected):
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build_script["cuda_arch_list"](nvcc) == expected


def test_architectures_that_are_all_too_old(build_script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    with pytest.raises(SystemExit, match=r"must name an architecture of 8\.0 or newer, got '7\.0;7\.5'"):
        build_script["cuda_arch_list"]("13.0")


def test_source_distribution_is_complete(tmp_path):
    """Also where it is made without nvcc, the archive holds every source, header and module."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "results"))
    subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')"],
        cwd=copy,
        env={**os.environ, "CATS_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh", ".toml", ".md", ".typed"}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("cats_ext", "csrc", "tests", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "results" not in path.parts
    }
    wanted |= {"LICENSE", "CHANGELOG.md", "README.md", "setup.py", "pyproject.toml"}
    assert sorted(wanted - held) == []


# --- what the built libraries ask for -------------------------------------------------------------------------------


def binutils(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", BUILT)
def test_dynamic_section(name):
    """No search path of the machine that built it, and no library that other machines with torch may lack."""
    section = binutils("readelf", "-d", LIBRARIES[name].path)
    assert not re.search(r"\((RPATH|RUNPATH)\)", section)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
    assert [library for library in needed if not ALLOWED_LIBRARIES.fullmatch(library)] == []
    assert "libtorch_cpu.so" in needed
    assert ("libtorch_cuda.so" in needed) == (name == "_C_cuda")


@pytest.mark.parametrize("name", BUILT)
def test_only_the_stable_abi_is_used(name):
    """Undefined symbols are C functions of the stable ABI: nothing of torch's C++ classes, nothing of Python."""
    assert LIBRARIES[name].path.endswith(f"{name}.abi3.so")
    undefined = binutils("nm", "-DC", "--undefined-only", "--format=just-symbols", LIBRARIES[name].path).splitlines()
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined)
    assert [s for s in undefined if re.search(r"\b(c10|at|torch|caffe2)::", s) or s.startswith(("Py", "_Py"))] == []


def test_changelog_has_this_version_below_what_is_not_released():
    titles = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == ("Unreleased", "") and titles[1][0] == cats_ext.__version__
    assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", titles[1][1])


def test_metadata():
    try:
        distribution = importlib.metadata.distribution("cats_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cats_ext is built in place and not installed")
    assert distribution.version == cats_ext.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert re.search(r"^Tag: cp310-abi3-(many)?linux_", distribution.read_text("WHEEL"), re.MULTILINE)
    entries = {(entry.group, entry.name): entry.value for entry in distribution.entry_points}
    assert entries["console_scripts", "cats"] == "cats_ext.cli:main"
    assert entries["vllm.general_plugins", "cats"] == "cats_ext.integrations.vllm:register"
