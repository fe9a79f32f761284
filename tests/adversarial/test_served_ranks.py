"""A rank of vLLM's tensor parallelism is killed while it serves, on two GPUs: the call ends with an error, and so do
the processes.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from support.served import PROMPTS, engine, save_checkpoint, served, skip_without_vllm

pytestmark = pytest.mark.gpu
skip_without_vllm()
if torch.cuda.device_count() < 2:
    pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}", allow_module_level=True)

REQUESTS, NEW = 8000, 200  # more than can be served before the rank is killed
SECONDS = 120  # of an engine that hangs


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_call_and_the_other_rank(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the ranks are children of this process,
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # which may have used a GPU before
    from vllm import SamplingParams

    directory = save_checkpoint(tmp_path, "llama", "two_threshold")
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPTS[0]}] * REQUESTS
    options = {"dtype": "bfloat16", "enforce_eager": False, "tensor_parallel_size": 2}
    ended: list[BaseException | None] = []

    def serve() -> None:
        try:
            llm.generate(prompts, sampling, use_tqdm=False)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    with engine(directory, **options) as llm:
        assert all(len(tokens) > 0 for tokens in served(llm))
        workers = [worker.proc for worker in llm.llm_engine.model_executor.workers]
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        time.sleep(3)
        assert not ended and all(worker.is_alive() for worker in workers)
        os.kill(workers[rank].pid, signal.SIGKILL)
        killed = time.monotonic()
        thread.join(SECONDS)
        assert not thread.is_alive(), f"the call has not ended {SECONDS} s after rank {rank} was killed"
        seconds = time.monotonic() - killed
        assert isinstance(ended[0], Exception), f"the call ended with {ended[0]!r}"
    workers[1 - rank].join(SECONDS)
    assert not workers[1 - rank].is_alive()
    print(f"rank {rank} killed: {type(ended[0]).__name__} after {seconds:.1f} s: {str(ended[0])[:200]}")
