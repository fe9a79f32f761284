"""Builds the two compiled libraries of cats_ext against the LibTorch stable ABI (target 2.10).

_C       CPU kernels; always built.
_C_cuda  CUDA kernels; built where nvcc is found. CATS_CUDA=auto|0|1 (1: an error where it is not found).

One build serves every torch >= 2.10 and every Python >= 3.10. No GPU is needed to build: the architectures come from
TORCH_CUDA_ARCH_LIST, never from the card in the machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
RELEASE_ARCH_LIST = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
# Both compilers see the target version: with it, headers newer than 2.10 compile to calls that 2.10 has.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]


def say(message: str) -> None:
    print(f"cats_ext: {message}", file=sys.stderr, flush=True)


def find_cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    return next((Path(c) for c in candidates if c and (Path(c) / "bin" / "nvcc").exists()), None)


def cuda_home_or_reason() -> tuple[Path | None, str]:
    """Where to build _C_cuda with, or why not to."""
    wanted = os.environ.get("CATS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"cats_ext: CATS_CUDA must be auto, 0 or 1, got '{wanted}'")
    if wanted == "0":
        return None, "CATS_CUDA=0"
    home, reason = find_cuda_home(), "no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda or PATH"
    if home is not None and torch.version.cuda:
        release = subprocess.check_output([home / "bin" / "nvcc", "--version"], text=True)
        major = release.split("release ")[1].split(".")[0]
        if major != torch.version.cuda.split(".")[0]:
            home, reason = None, f"nvcc is CUDA {major} and torch {torch.__version__} is CUDA {torch.version.cuda}"
    if home is None and wanted == "1":
        raise SystemExit(f"cats_ext: CATS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    return home, reason


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def libtorch_cuda_dir() -> str:
    """A directory with libtorch_cuda.so to link against: torch's own, or a stub of that soname for CPU-only torch.

    The library has to be named in _C_cuda's dynamic section, because Python loads torch's libraries privately; its
    contents are only needed at run time.
    """
    torch_lib = Path(torch.__file__).parent / "lib"
    if (torch_lib / "libtorch_cuda.so").exists():
        return str(torch_lib)
    stub_dir = ROOT / "build" / "stub"
    stub_dir.mkdir(parents=True, exist_ok=True)
    (stub_dir / "empty.c").write_text("")
    subprocess.check_call(
        [os.environ.get("CC", "cc"), "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", "libtorch_cuda.so", "empty.c"],
        cwd=stub_dir,
    )
    return str(stub_dir)


def cpu_extension() -> CppExtension:
    return CppExtension(
        "cats_ext._C",
        sources("csrc/ops_cpu.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        py_limited_api=True,
        extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", *STABLE_ABI]},
    )


def cuda_extension(home: Path) -> CppExtension:
    cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch leaves it unset
    arch_list = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", RELEASE_ARCH_LIST)
    defines = [*STABLE_ABI, "-DUSE_CUDA", f'-DCATS_ARCH_LIST="{arch_list}"']
    return CppExtension(
        "cats_ext._C_cuda",
        sources("csrc/ops_cuda.cu", "csrc/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[libtorch_cuda_dir(), str(home / "lib64")],
        # The static runtime: the wheel then needs a driver, but no particular libcudart.
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"],
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O3", *defines],
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", "--expt-relaxed-constexpr", *defines],
        },
    )


extensions = [cpu_extension()]
cuda_home, reason = cuda_home_or_reason()
if cuda_home is not None:
    extensions.append(cuda_extension(cuda_home))
    say(f"building _C (CPU) and _C_cuda (CUDA, {cuda_home}, {os.environ['TORCH_CUDA_ARCH_LIST']})")
else:
    say(f"building _C (CPU); leaving out _C_cuda (CUDA): {reason}")

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
