"""The installation: versions, devices, compiled libraries, and the reason if one did not load. For bug reports.

``python -m cats_ext.env`` prints it (``--json`` for scripts), and so does ``cats env``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cats_ext._version import __version__
from cats_ext.native.library import LIBRARIES

_PACKAGES = ("transformers", "safetensors", "accelerate", "peft", "gguf")
_VARIABLES = ("CATS_CACHE", "CATS_REQUIRE_EXT", "CATS_DEBUG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def collect() -> dict[str, Any]:
    """The report as JSON types."""
    return {
        "cats_ext": {"version": __version__, "path": str(Path(__file__).parent)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": _gpu(),
        "libraries": {
            name: {"loaded": lib.loaded, "path": lib.path, "build_info": lib.build_info, "reason": lib.reason}
            for name, lib in LIBRARIES.items()
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu() -> dict[str, Any]:
    """Driver and devices. The driver's version comes from nvidia-smi, so it is there even if torch finds no device."""
    report: dict[str, Any] = {"available": torch.cuda.is_available(), "driver": None, "devices": []}
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, timeout=20)
            report["driver"] = found.stdout.split("\n")[0].strip() or None if found.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            pass
    if report["available"]:
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            report["devices"].append(
                {
                    "name": card.name,
                    "compute_capability": f"{card.major}.{card.minor}",
                    "memory_gib": round(card.total_memory / 2**30, 1),
                    "multiprocessors": card.multi_processor_count,
                }
            )
    return report


def describe(report: dict[str, Any]) -> str:
    """``collect()`` as aligned lines of text."""
    cpu, gpu = report["cpu"], report["gpu"]
    rows = [
        ("cats_ext", f"{report['cats_ext']['version']}  ({report['cats_ext']['path']})"),
        ("Python", f"{report['python']}  ({report['platform']})"),
        ("torch", f"{report['torch']['version']}  (CUDA {report['torch']['cuda'] or 'not built in'})"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}"),
        ("CUDA driver", gpu["driver"] or "no nvidia-smi answered"),
    ]
    for index, card in enumerate(gpu["devices"]):
        details = f"compute capability {card['compute_capability']}, {card['memory_gib']} GiB"
        rows.append((f"GPU {index}", f"{card['name']}, {details}, {card['multiprocessors']} multiprocessors"))
    if not gpu["devices"]:
        rows.append(("GPU", "none that torch can use"))
    for name, lib in report["libraries"].items():
        rows.append((name, f"loaded: {lib['build_info']}" if lib["loaded"] else f"not loaded: {lib['reason']}"))
        if lib["path"]:
            rows.append(("", lib["path"]))
    rows += list(report["environment"].items())
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments not in ([], ["--json"]):
        raise SystemExit("usage: python -m cats_ext.env [--json]")
    if sys.stdout is None:
        raise SystemExit("standard output is closed")
    report = collect()
    try:
        print(json.dumps(report, indent=2) if arguments else describe(report), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
        raise SystemExit(f"standard output cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    main()
