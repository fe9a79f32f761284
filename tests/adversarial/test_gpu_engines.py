"""Two decode engines at once, each in a thread and on a stream of its own: each gives its model's tokens.

CATS_ENGINE_SECONDS=60 runs them for that long.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from support.models import tiny_model, tokens
from support.patched import config_for

from cats_ext import apply_cats
from cats_ext.decode.engine import DecodeEngine

SECONDS = float(os.environ.get("CATS_ENGINE_SECONDS", 5))
OPTIONS = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1}

pytestmark = pytest.mark.gpu


def patched_model(seed: int) -> torch.nn.Module:
    model = tiny_model(seed=seed, intermediate_size=2304)  # with a kernel for a step
    return apply_cats(model, config_for(model)).cuda()


def generated(model, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **OPTIONS)


@pytest.mark.parametrize("prepared", ["one after the other", "at once"])
@pytest.mark.parametrize("models", ["two models", "one model"])
def test_two_engines(models, prepared):
    both = [patched_model(0)] * 2 if models == "one model" else [patched_model(0), patched_model(1)]
    prompts = [tokens(length, seed=length)[None].cuda() for length in (5, 20, 33)]
    expected = [[generated(model, ids) for ids in prompts] for model in both]
    assert models == "one model" or not torch.equal(expected[0][0], expected[1][0])
    torch.cuda.synchronize()
    counts, errors = [0, 0], []
    in_turn = threading.Lock() if prepared == "one after the other" else None
    start = threading.Barrier(2, timeout=300)

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                engine = DecodeEngine(both[number])
                if in_turn is not None:  # the first call captures; other threads must not allocate meanwhile
                    with in_turn:
                        engine.generate(prompts[0], **OPTIONS)
                start.wait()
                end = time.monotonic() + SECONDS
                while time.monotonic() < end and not errors:
                    which = counts[number] % len(prompts)
                    found = engine.generate(prompts[which], **OPTIONS)
                    if not torch.equal(found, expected[number][which]):
                        raise AssertionError(f"call {counts[number]} of engine {number}: {found} is not as expected")
                    counts[number] += 1
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert min(counts) >= len(prompts), counts
