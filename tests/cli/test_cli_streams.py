"""``cats`` with standard output or error closed, on a full disk, or read by nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cats_ext

PROGRAM = f"{sys.executable} -c 'from cats_ext.cli import main; main()'"
MODULE = f"{sys.executable} -m cats_ext.env"


def shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cats_ext.__file__).parents[1])}
    run = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.run(run, capture_output=True, text=True, cwd=directory, env=environment)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (f"{PROGRAM} env --json >&-", "error: standard output is closed"),
        (f"{PROGRAM} env >/dev/full", "error: standard output cannot be written: No space left on device"),
        (f"{PROGRAM} env --help >/dev/full", "error: standard output cannot be written: No space left on device"),
        (f"{PROGRAM} chat ./missing <&-", "error: standard input is closed"),
        (f"{MODULE} --json >&-", "standard output is closed"),
        (f"{MODULE} >/dev/full", "standard output cannot be written: No space left on device"),
    ],
)
def test_one_sentence(command, error, tmp_path):
    done = shell(command, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", [error])


def test_a_reader_that_leaves_is_no_error_to_speak_of(tmp_path):
    done = shell(f"{PROGRAM} env --json | true", tmp_path)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_the_work_is_done_without_standard_error(stderr, tmp_path):
    assert json.loads(shell(f"{PROGRAM} env --json {stderr}", tmp_path).stdout)["cats_ext"]
    done = shell(f"{PROGRAM} bench --shape big --json {stderr}", tmp_path)
    assert done.returncode == 1 and "--shape must be HxI" in json.loads(done.stdout)["error"]


def test_no_file_is_opened_where_standard_error_was(tmp_path):
    """Else what C libraries write there would go into the file."""
    script = "import sys; from cats_ext.cli import streams; streams.run(lambda: print(open(sys.argv[1]).fileno()))"
    (tmp_path / "file").touch()
    done = shell(f'{sys.executable} -c "{script}" file <&- 2>&-', tmp_path)
    assert int(done.stdout) > 2
