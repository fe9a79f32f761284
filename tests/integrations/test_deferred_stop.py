"""transformers' ``generate`` with its stop check deferred: the same output, streams and caches, whatever ends it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.models import VOCABULARY, tiny_model, tokens
from support.patched import config_for
from transformers import DynamicCache, StaticCache, StoppingCriteria
from transformers.generation import utils

import cats_ext
from cats_ext.decode.cache import cache_argument
from cats_ext.integrations import deferred_stop as stopping

OLD = Version(transformers.__version__) < Version("5.17")
PROMPT = tokens(7)[None]
NEVER = VOCABULARY  # no token
needs_it = pytest.mark.skipif(OLD, reason="transformers cannot defer its stop check")


class Event:
    """The CPU has no events, nor any need of them."""

    def __init__(self, **arguments: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(stopping, "DEVICES", {"cpu"})
        monkeypatch.setattr(torch, "Event", Event)
    return request.param


@pytest.fixture
def model(device):
    model = tiny_model("llama")
    return cats_ext.apply_cats(model, config_for(model)).to(device)


class Forwards:
    """How often a model was run, and what it streamed."""

    def __init__(self, model: Any) -> None:
        self.count, self.streamed = 0, []
        model.register_forward_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1

    def put(self, value: torch.Tensor) -> None:
        self.streamed += value.flatten().tolist()

    def end(self) -> None:
        pass


def generate(model, deferred: bool, prompt=PROMPT, **arguments):
    """Its output, how many forwards it took, and what it streamed."""
    model, arguments = copy.deepcopy(model), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | arguments
    forwards = Forwards(model)
    if len(prompt) == 1:
        arguments["streamer"] = forwards
    prompt = prompt.to(model.device)
    torch.manual_seed(0)
    if not deferred:
        return model.generate(prompt, **arguments), forwards
    with cats_ext.deferred_stop():
        return model.generate(prompt, **arguments), forwards


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        ended = input_ids.shape[1] >= PROMPT.shape[1] + 3
        return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)


@needs_it
@pytest.mark.parametrize("case", ["length", "end of text", "criterion", "sampling", "batch", "first token"])
def test_the_same_output(model, case):
    plain, _ = generate(model, False, eos_token_id=NEVER)
    prompt, options = PROMPT, {"eos_token_id": NEVER}
    if case == "end of text":
        options = {"eos_token_id": plain[0, 12].item()}
    elif case == "criterion":
        options["stopping_criteria"] = [AfterThree()]
    elif case == "sampling":
        options |= {"do_sample": True, "temperature": 0.8, "top_k": 20}
    elif case == "batch":
        prompt, options = torch.cat([PROMPT, PROMPT.flip(1)]), {"eos_token_id": plain[0, 10].item()}
    elif case == "first token":
        options["max_new_tokens"] = 1
    before, after = generate(model, False, prompt, **options), generate(model, True, prompt, **options)
    assert torch.equal(before[0], after[0]) and before[1].streamed == after[1].streamed
    ended = case in ("end of text", "criterion") or (case == "batch" and before[0].shape[1] < 19)
    assert after[1].count == before[1].count + ended  # one forward more, behind the end: it was deferred


@needs_it
@pytest.mark.gpu
@pytest.mark.slow
def test_the_same_output_compiled():
    model = tiny_model("llama")
    cats_ext.apply_cats(model, config_for(model)).to("cuda")
    cache = StaticCache(config=model.config, max_cache_len=40)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, cache_argument(model): cache}
    options["attention_mask"] = torch.ones(1, PROMPT.shape[1], dtype=torch.int64, device="cuda")

    def text(**arguments):
        cache.reset()
        return model.generate(PROMPT.cuda(), **options, **arguments)

    plain = text(eos_token_id=NEVER)
    for end in (NEVER, plain[0, 20].item()):
        before = text(eos_token_id=end)
        with cats_ext.deferred_stop():
            assert torch.equal(text(eos_token_id=end), before)
    assert hasattr(model, "_compiled_call")


@needs_it
def test_scores_are_those_of_the_tokens(model):
    end = generate(model, False, eos_token_id=NEVER)[0][0, 12].item()
    options = {"eos_token_id": end, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    before, after = generate(model, False, **options)[0], generate(model, True, **options)[0]
    assert torch.equal(before.sequences, after.sequences) and len(before.scores) == len(after.scores) == 6
    for name in ("scores", "logits"):  # on CUDA the kernel adds in another order in every run
        torch.testing.assert_close(getattr(before, name), getattr(after, name), rtol=1e-4, atol=1e-4)


@needs_it
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_cache_that_was_passed_in_is_left_as_ever(model, kind):
    """The text can go on from it, with the same tokens."""
    end = generate(model, False, eos_token_id=NEVER)[0][0, 12].item()
    results = []
    for deferred in (False, True):
        size = {"max_cache_len": 40} if kind is StaticCache else {}
        cache = kind(config=model.config, **size)
        arguments = {cache_argument(model): cache, "disable_compile": True}
        text, forwards = generate(model, deferred, eos_token_id=end, **arguments)
        length = int(cache.get_seq_length())
        longer, _ = generate(model, False, text.cpu(), eos_token_id=NEVER, **arguments)
        results.append((length, longer.tolist(), forwards.count))
    assert results[0][:2] == results[1][:2] and results[1][2] == results[0][2] + 1


@needs_it
def test_a_cache_that_cannot_go_back_is_not_deferred(device):
    model = tiny_model("mistral").to(device)
    counts = []
    for deferred in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=40)
        end = {"stopping_criteria": [AfterThree()], cache_argument(model): cache, "disable_compile": True}
        counts.append(generate(model, deferred, eos_token_id=NEVER, **end)[1].count)
    assert counts[0] == counts[1]


@needs_it
def test_it_ends_with_the_last_user():
    own, entered, leave = utils.DeferredStopCheck, threading.Event(), threading.Event()

    def other():
        with cats_ext.deferred_stop():
            entered.set()
            leave.wait(10)

    with pytest.raises(KeyError), cats_ext.deferred_stop():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        raise KeyError
    assert utils.DeferredStopCheck is not own
    leave.set()
    thread.join()
    assert utils.DeferredStopCheck is own


@needs_it
def test_other_devices_are_transformers_own_affair():
    with cats_ext.deferred_stop():
        check = utils.DeferredStopCheck.is_supported
        assert check(torch.device("mps"), None, False, is_assistant=False)
        assert not check(torch.device("cpu"), None, False, is_assistant=False)
        assert not check(torch.device("cuda"), None, False, is_assistant=True)


@pytest.mark.skipif(not OLD, reason="this transformers can")
def test_an_old_transformers_is_named():
    with (
        pytest.raises(RuntimeError, match=f"5.17 or newer, found {transformers.__version__}"),
        cats_ext.deferred_stop(),
    ):
        pass
