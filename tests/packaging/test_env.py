"""``cats env``: the report is complete, and says why a library did not load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cats_ext
from cats_ext import env
from cats_ext.native.library import LibraryStatus


def test_report_is_json_and_names_the_versions():
    report = json.loads(json.dumps(env.collect()))
    assert report["cats_ext"]["version"] == cats_ext.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["libraries"].keys() == {"_C", "_C_cuda"}
    for library in report["libraries"].values():
        assert library["loaded"] != bool(library["reason"])
        assert not library["loaded"] or library["build_info"]


def test_text_shows_what_loaded_and_why_not(monkeypatch):
    libraries = {
        "_C": LibraryStatus("_C", "/somewhere/_C.abi3.so", True, build_info="avx2, avx512"),
        "_C_cuda": LibraryStatus("_C_cuda", "/somewhere/_C_cuda.abi3.so", False, reason="OSError: no libcuda"),
    }
    monkeypatch.setattr(env, "LIBRARIES", libraries)
    text = env.describe(env.collect())
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["_C", "loaded: avx2, avx512"] in lines
    assert ["_C_cuda", "not loaded: OSError: no libcuda"] in lines
    assert "/somewhere/_C_cuda.abi3.so" in text


def test_packages_that_are_missing_are_said_to_be(monkeypatch):
    def version(name: str) -> str:
        raise env.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(env.importlib.metadata, "version", version)
    assert re.search(r"^transformers +not installed$", env.describe(env.collect()), re.MULTILINE)


def test_gpus_are_listed(monkeypatch):
    card = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    text = env.describe(env.collect())
    assert "Some GPU, compute capability 9.0, 80.0 GiB, 132 multiprocessors" in text


@pytest.mark.parametrize("failure", ["missing", "broken", "hangs"])
def test_driver_is_unknown_without_an_answer(monkeypatch, failure):
    monkeypatch.setattr(env.shutil, "which", lambda name: None if failure == "missing" else "/bin/nvidia-smi")

    def run(*_, **__):
        if failure == "hangs":
            raise subprocess.TimeoutExpired("nvidia-smi", 20)
        return SimpleNamespace(returncode=9, stdout="NVIDIA-SMI has failed\n")

    monkeypatch.setattr(env.subprocess, "run", run)
    assert env.collect()["gpu"]["driver"] is None


def test_module_runs_by_itself(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # not from the repository, whose uncompiled sources -m would find first
        command = [sys.executable, "-m", "cats_ext.env", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(cats_ext.__file__).parents[1])}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    assert json.loads(run("--json").stdout)["cats_ext"]["version"] == cats_ext.__version__
    wrong = run("--xml")
    assert wrong.returncode == 1 and "usage: python -m cats_ext.env [--json]" in wrong.stderr
