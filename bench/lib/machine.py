"""The facts about the machine and the sources that every result row carries."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str) -> str:
    """What ``command`` prints, run in the repository; nothing if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """The short commit id, with ``-dirty`` after it if a file other than a result has been changed since."""
    changed = output_of("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return (output_of("git", "rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def nvidia_smi(field: str) -> str:
    """Of the first GPU, without initialising CUDA."""
    return output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").partition("\n")[0]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(device: torch.device | str, commit_id: str | None = None, *, name: str | None = None) -> dict[str, str]:
    """``device``, with CUDA ``driver``, then ``torch``, ``commit`` and ``date``.

    ``name`` is the device's name where torch must not be asked for it, since that initialises CUDA.
    """
    cuda = torch.device(device).type == "cuda"
    found = {"device": name or (torch.cuda.get_device_name(device) if cuda else cpu_name())}
    if cuda:
        found["driver"] = nvidia_smi("driver_version")
    date = datetime.date.today().isoformat()
    return found | {"torch": torch.__version__, "commit": commit_id or commit(), "date": date}


def print_facts(found: dict[str, str]) -> None:
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
