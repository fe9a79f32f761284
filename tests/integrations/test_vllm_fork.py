"""What vLLM's plugin does before vLLM: it reads the checkpoint, in the process that the engine is forked off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import tiny_model, tokens

import cats_ext
from cats_ext.integrations.vllm.checkpoint import read_checkpoint

FORKED = """
import os, signal, sys
import torch
from cats_ext.integrations.vllm.checkpoint import read_checkpoint

read_checkpoint(sys.argv[1], None)
child = os.fork()
if not child:
    signal.alarm(30)  # one that hangs would be left behind
    torch.ones(4_000_000).exp().sum()  # in all threads
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_engine_has_its_threads(tmp_path):
    model = tiny_model(intermediate_size=14336)
    config = cats_ext.calibrate(model, [tokens(128)], sparsity=0.5, progress=False)
    cats_ext.apply_cats(model, config).save_pretrained(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    package = Path(cats_ext.__file__).parents[1]  # the one that is tested, also if it is not the sources here
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], cwd=package, env=environment, timeout=240, check=True)


def test_a_gate_that_is_read_by_columns_is_refused(tmp_path):
    model = tiny_model()
    config = cats_ext.calibrate(model, [tokens(128)], rule="three_threshold", progress=False)
    cats_ext.apply_cats(model, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has thresholds of rule 'three_threshold', which is not supported under vLLM"):
        read_checkpoint(str(tmp_path), None)
