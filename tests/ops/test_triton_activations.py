"""The activation functions of the Triton kernels, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cats_ext.ops.reference import ACTIVATIONS

PROGRAM = Path(__file__).parents[1] / "support" / "interpreted_activations.py"
VALUES = [float("nan"), -3.0, -0.5, 0.0, 0.5, 3.0, 20.0, 1e30]


def test_as_in_pytorch():
    pytest.importorskip("triton.runtime.interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(PROGRAM)]
    run = subprocess.run(command, input=json.dumps(VALUES), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert results.keys() == ACTIVATIONS.keys()
    for name, got in results.items():
        expected = ACTIVATIONS[name](torch.tensor(VALUES))
        torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
