"""Builds the two compiled libraries of cats_ext against the LibTorch stable ABI (target 2.10).

_C       CPU kernels; always built.
_C_cuda  CUDA kernels; built where nvcc is found. CATS_CUDA=auto|0|1 (0: leave out; 1: an error where it is not found).

One build serves every torch >= 2.10 and every Python >= 3.10. No GPU is needed to build: the architectures come from
TORCH_CUDA_ARCH_LIST, never from the card in the machine.
"""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from setuptools import setup
from torch.torch_version import TorchVersion
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
MIN_NVCC = "12.0"  # the first with C++20, which torch's headers ask for, and sm_90a
# Both compilers see the target version: with it, headers newer than 2.10 compile to calls that 2.10 has.
FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Torch's errors name the file in which an op is registered: without the directory of the build.
HOST_FLAGS = ["-g0", "-fvisibility=hidden", f"-fmacro-prefix-map={ROOT.resolve()}/="]


def say(message: str) -> None:
    print(f"cats_ext: {message}", file=sys.stderr, flush=True)


def ask_nvcc(nvcc: str, pattern: str, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return re.search(pattern, done.stdout).group(1)


def find_cuda() -> tuple[Path, str] | tuple[None, str]:
    """The CUDA toolkit to build _C_cuda with and its version, or None and the reason for leaving _C_cuda out."""
    wanted = os.environ.get("CATS_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"cats_ext: CATS_CUDA must be auto, 0 or 1, got '{wanted}'")
    if wanted == "0":
        return None, "CATS_CUDA=0"
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        nvcc, reason = f"{home}/bin/nvcc", f"no bin/nvcc in CUDA_HOME '{home}'"
    else:
        nvcc, reason = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "no nvcc in PATH or /usr/local/cuda/bin"
    if Path(nvcc).exists():
        version = ask_nvcc(nvcc, r"release (\d+\.\d+)", "--version")
        if TorchVersion(version) >= MIN_NVCC:
            # nvcc's own word for where its toolkit is: the one in PATH may be a wrapper script.
            return Path(ask_nvcc(nvcc, r"TOP=(.*)", "--dryrun", "-x", "cu", "-E", "/dev/null")).resolve(), version
        reason = f"{nvcc} {version} is too old, the kernels need {MIN_NVCC}"
    if wanted == "1":
        raise SystemExit(f"cats_ext: CATS_CUDA=1, but _C_cuda cannot be built: {reason}")
    return None, reason


def cuda_arch_list(nvcc_version: str) -> str:
    """TORCH_CUDA_ARCH_LIST without architectures before 8.0, which the kernels do not support, and 9.0 as 9.0a.

    Or the release list.
    """
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        archs = re.split(r"[; ]+", asked)
        kept = [arch for arch in archs if not re.match(r"[1-7]\.", arch)]
        kept = ["9.0a" if arch == "9.0" else arch for arch in kept]  # the same devices, with all their instructions
        if not kept:
            raise SystemExit(f"cats_ext: TORCH_CUDA_ARCH_LIST must name an architecture of 8.0 or newer, got '{asked}'")
        return ";".join(kept)
    return "8.0;8.6;8.9;9.0a;10.0;12.0+PTX" if TorchVersion(nvcc_version) >= "12.8" else "8.0;8.6;8.9+PTX;9.0a"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def cpu_extension(left_out: list[str]) -> CppExtension:
    return CppExtension(
        "cats_ext._C",
        sources("csrc/ops_cpu.cpp", "csrc/checks.cpp", "csrc/cpu/*.cpp", "csrc/cuda/plan.cpp"),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        py_limited_api=True,
        extra_compile_args={"cxx": [*FLAGS, *HOST_FLAGS, *left_out]},
    )


def cuda_extension(home: Path, nvcc_version: str) -> CppExtension:
    cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch leaves it unset
    # torch refuses an nvcc of another major version than its own; _C_cuda shares no CUDA header or runtime with torch.
    cpp_extension._check_cuda_version = lambda *_: None
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_arch_list(nvcc_version)
    # torch hides the conversions of the 16-bit types; the kernels compile the same with and without torch.
    undo_torch = ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    archs = f'-DCATS_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")}"'
    return CppExtension(
        "cats_ext._C_cuda",
        sources("csrc/ops_cuda.cu", "csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=[str(home / directory) for directory in ("lib64", "lib", "targets/x86_64-linux/lib")],
        # The static runtime: the wheel then needs a driver, but no particular libcudart.
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*FLAGS, *HOST_FLAGS],
            "nvcc": [*FLAGS, *(f"-Xcompiler={flag}" for flag in HOST_FLAGS), "-DUSE_CUDA", *undo_torch, archs],
        },
    )


def libtorch_cuda_dir(build_temp: str) -> str:
    """Where libtorch_cuda.so is to link against: torch's own, or an empty one of that soname for a CPU-only torch.

    _C_cuda's dynamic section has to name it, because Python loads torch's libraries privately.
    """
    torch_lib = Path(torch.__file__).parent / "lib"
    if (torch_lib / "libtorch_cuda.so").exists():
        return str(torch_lib)
    stub = Path(build_temp, "stub", "libtorch_cuda.so")
    stub.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc").split()
    subprocess.check_call([*compiler, "-shared", f"-Wl,-soname,{stub.name}", "-x", "c", "/dev/null", "-o", str(stub)])
    return str(stub.parent)


class Build(BuildExtension):
    """Says what is built and what is left out, and keeps nothing of an earlier build that is out of date."""

    def run(self) -> None:
        for stale in Path(ROOT if self.inplace else self.build_lib, "cats_ext").glob("_C*.so"):
            stale.unlink()
        # ninja knows what a .cu file includes only where torch itself has CUDA.
        newest_header = max(Path(ROOT, header).stat().st_mtime for header in self.extensions[-1].depends)
        for compiled in Path(self.build_temp).rglob("*.o"):
            if compiled.stat().st_mtime < newest_header:
                compiled.unlink()
        if cuda_home is None:
            summary = f"_C (CPU); left out _C_cuda (CUDA): {cuda_note}"
        else:
            self.extensions[-1].library_dirs.append(libtorch_cuda_dir(self.build_temp))
            summary = f"_C (CPU) and _C_cuda (CUDA {cuda_note} for {os.environ['TORCH_CUDA_ARCH_LIST']})"
        super().run()
        say(f"built {summary}")
        if cuda_home is None and os.environ.get("CATS_CUDA") != "0":
            # pip shows a build's output only with -v; its warnings always, from pip 26.3 on.
            warnings.warn(f"cats_ext: built {summary}", stacklevel=1)


if __name__ == "__main__":
    cuda_home, cuda_note = find_cuda()
    cuda_extensions = [cuda_extension(cuda_home, cuda_note)] if cuda_home else []
    left_out = [] if cuda_home else [f'-DCATS_LEFT_OUT="_C_cuda: {cuda_note}"']  # for `cats env`
    setup(
        ext_modules=[cpu_extension(left_out), *cuda_extensions],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
