"""``torchrun -m cats_ext``: one model over several processes, of which the first one writes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_runner import json_of
from support.ranks import run_torchrun, takes_tensor_parallelism

import cats_ext
from cats_ext import cli
from cats_ext.cli import common
from cats_ext.cli import torchrun as program

pytestmark = [takes_tensor_parallelism, pytest.mark.usefixtures("one_thread")]


def torchrun(*arguments: object, count: int = 2, module: tuple = ("-m", "cats_ext")) -> subprocess.CompletedProcess:
    package = Path(cats_ext.__file__).parents[1]  # the one that is tested, also if it is not the sources here
    return run_torchrun(*module, *arguments, count=count, cwd=package)


def document_of(*arguments: object) -> dict:
    result = torchrun(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # of one rank


def test_generate(model_dir, thresholds):
    arguments = ("generate", model_dir, "--cats", thresholds, "--prompt", "the cat sat on", "--max-new-tokens", 8)
    found, expected = document_of(*arguments), json_of(*arguments)
    assert found["text"] == expected["text"]
    assert found["sparsity"]["tokens"] == expected["sparsity"]["tokens"]
    assert found["sparsity"]["up_sparsity"] == pytest.approx(expected["sparsity"]["up_sparsity"], abs=1e-3)


def test_eval(model_dir, thresholds, text_file, tmp_path):
    arguments = ("eval", model_dir, "--cats", thresholds, "--text", text_file, "--curve", "0.7", "--max-windows", 4)
    found, expected = document_of(*arguments, "--output", tmp_path / "found.json"), json_of(*arguments)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    for ours, theirs in zip(found["text"]["variants"], expected["text"]["variants"], strict=True):
        assert ours["sparse"]["ppl"] == pytest.approx(theirs["sparse"]["ppl"], rel=1e-3)
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "count", "message"),
    [
        (("chat",), 2, "torchrun must start 2 processes of cats generate and cats eval only, got cats chat"),
        (
            ("generate", "--prompt", "a"),
            3,
            "torchrun must start as many processes as divide the model's 2 key-value heads, got 3",
        ),
    ],
)
def test_what_is_refused_is_said_on_every_rank(arguments, count, message, model_dir):
    command, *options = arguments
    result = torchrun(command, model_dir, *options, count=count)
    assert result.returncode == 1 and result.stdout == ""
    assert f"error: {message}" in result.stderr


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        (("--temperature", "warm"), 2, "Invalid value for '--temperature'"),
        ((), 3, "torchrun must start as many processes as divide the model's 2 key-value heads, got 3"),
    ],
)
def test_an_error_of_all_ranks_is_one_document(options, count, message, model_dir):
    result = torchrun("generate", model_dir, "--prompt", "a", *options, "--json", count=count)
    assert result.returncode == 1
    assert message in json.loads(result.stdout)["error"]


ONE_FAILS = """
import os
from cats_ext import cli

if os.environ["RANK"] == "{rank}":
    def fail(*arguments):
        raise ValueError("no such tokens")
    cli.generate.torch.manual_seed = fail  # after the model has been loaded
cli.main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_the_document(rank, model_dir, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(ONE_FAILS.format(rank=rank))
    result = torchrun("generate", model_dir, "--prompt", "the cat", "--json", module=(script,))
    assert result.returncode == 1
    assert json.loads(result.stdout) == {"error": "no such tokens"}


WORK_IS_LEFT = """
import atexit, os, sys, time
import torch
import torch.distributed as dist
from cats_ext import cli
from cats_ext.cli import torchrun

end, collectives = torchrun.end, 1000

def end_before_the_other_rank():
    if os.environ["RANK"] == "1":
        for _ in range(collectives):
            dist.all_reduce(torch.ones(1), async_op=True)  # gloo's thread has the last reference
        atexit.register(lambda: print("ended", file=sys.stderr))
        end()
        return
    try:
        for _ in range(collectives):
            time.sleep(0.002)  # more seconds than Python needs to end
            dist.all_reduce(torch.ones(1))
    except RuntimeError:  # the other rank has ended
        pass
    end()

torchrun.end = end_before_the_other_rank
cli.main()
"""


def test_a_collective_that_is_left_over_does_not_abort_a_rank(model_dir, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(WORK_IS_LEFT)
    arguments = ("generate", model_dir, "--prompt", "the cat", "--max-new-tokens", 2, "--json")
    result = torchrun(*arguments, module=(script,))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"]
    assert result.stderr.count("ended\n") == 1


def test_json_is_written_at_once(monkeypatch):
    """torchrun ends a rank soon after another one has failed."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    common.print_json({"error": "no such tokens"})
    assert json.loads(written.getvalue()) == {"error": "no such tokens"}


@pytest.mark.parametrize(("arguments", "code", "ended"), [(["--version"], 0, True), (["report", "/none"], 1, False)])
def test_the_group_is_ended_after_success_only(arguments, code, ended, monkeypatch):
    ends = []
    monkeypatch.setattr(program, "end", lambda: ends.append(True))
    monkeypatch.setattr(sys, "argv", ["cats", *arguments])
    monkeypatch.setattr(cli.streams, "run", lambda program: program())  # leaves pytest's streams
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert (done.value.code, bool(ends)) == (code, ended)
