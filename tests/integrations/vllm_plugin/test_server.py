"""``cats serve``: vLLM's OpenAI server on loopback, asked by OpenAI's client."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from support.served import NEW, PROMPTS, skip_without_vllm

skip_without_vllm()


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    """The address of a server for ``llama``."""
    port = _free_port()
    options = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 --kv-cache-memory-bytes 67108864"
    options = [*options.split(), "--middleware", "cats_ext.integrations.vllm.metrics.SparsityMetrics"]
    options += ["--additional-config", '{"cats": {"count": true}}']
    command = [sys.executable, "-c", "from cats_ext.cli import main; main()", "serve", str(llama[0]), *options]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output, env=environment
        )
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def _free_port() -> int:
    """A port that the system gives to nobody before vLLM has been imported and binds it."""
    for port in random.sample(range(20000, 32000), 20):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("20 ports between 20000 and 32000 are taken")


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(address: str, path: str, **content) -> None:
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    assert urllib.request.urlopen(request, timeout=60).status == 200


def completions(address: str) -> list[list[int]]:
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    (model,) = client.models.list().data
    options = {"max_tokens": NEW, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    choices = client.completions.create(model=model.id, prompt=PROMPTS, extra_body=extra, **options).choices
    return [choice.token_ids for choice in sorted(choices, key=lambda choice: choice.index)]


def metrics(address: str) -> dict[str, float]:
    """What the server's page of metrics says about CATS, by name and label."""
    lines = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("cats_")}


@pytest.mark.slow
def test_server(server, llama):
    _, expected = llama
    assert completions(server) == expected["sparse"]
    reached = metrics(server)
    assert reached["cats_counting"] == 1
    assert all(0.3 < reached[f'cats_up_sparsity{{layer="model.layers.{i}.mlp"}}'] < 0.7 for i in range(3))
    post(server, "/collective_rpc", method="cats_set_sparsity", args=[0.0])
    post(server, "/collective_rpc", method="cats_reset_sparsity")
    post(server, "/reset_prefix_cache")
    assert completions(server) == expected["dense"]
    assert metrics(server)['cats_up_sparsity{layer="model.layers.0.mlp"}'] == 0
