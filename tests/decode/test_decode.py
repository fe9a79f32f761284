"""The decode engine gives the tokens of ``model.generate``, in all modes."""

from __future__ import annotations

import functools
import gc
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from support.models import FAMILIES, INTERMEDIATE, installed, tiny_model, tokens
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import cats_ext
from cats_ext.decode import fused as decode_fused
from cats_ext.decode import session as decode
from cats_ext.decode.engine import DecodeEngine

PADDED = ("mistral", "gemma2")
FUSED_FAMILIES = ("llama", "llama-bias", "llama-relu", "mistral", "ministral", "qwen2", "qwen3", "phi3", "smollm3")
ENDS = [5, 9, 40, 77]  # tokens that some of the texts below reach
MODES = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},  # needs exactly the tokens so far
    "an end, not before 15": {"min_new_tokens": 15, "eos_token_id": ENDS},
    "several ends": {"eos_token_id": ENDS},
}
NEW = 24  # with the prompt of 20 tokens past the window of mistral, 32
OPTIONS = {mode: {"max_new_tokens": NEW, "eos_token_id": 1, **options} for mode, options in MODES.items()}
CASES = [("llama", mode) for mode in MODES] + [
    (family, "greedy") for family in installed(FAMILIES) if family != "llama"
]


pytestmark = [
    pytest.mark.filterwarnings("error:the decode step cannot be captured"),
    pytest.mark.usefixtures("one_thread"),
]


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny_model("llama")


@functools.cache
def dense_model(family: str) -> torch.nn.Module:
    return tiny_model(family)


def generated(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    torch.manual_seed(3)
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


@functools.cache
def expected(family: str, mode: str) -> torch.Tensor:
    return generated(dense_model(family), tokens(20)[None], **OPTIONS[mode])


def decoded(engine: DecodeEngine, ids: torch.Tensor, **options: object) -> torch.Tensor:
    torch.manual_seed(3)
    return engine.generate(ids, **options)


def statically(engine: DecodeEngine) -> DecodeEngine:
    engine.capture = True
    return engine


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_same_tokens_as_generate(family, mode):
    out = decoded(DecodeEngine(dense_model(family)), tokens(20)[None], **OPTIONS[mode])
    assert torch.equal(out, expected(family, mode))


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_static_steps_give_the_same_tokens(family, mode, static_steps):
    engine = statically(DecodeEngine(dense_model(family), fused=False))
    assert torch.equal(decoded(engine, tokens(20)[None], **OPTIONS[mode]), expected(family, mode))
    assert not engine.fused_active


@pytest.mark.parametrize(("family", "mode"), [case for case in CASES if case[0] in FUSED_FAMILIES])
def test_fused_steps_give_the_same_tokens(family, mode, static_steps):
    engine = statically(DecodeEngine(dense_model(family), fused=True))
    assert torch.equal(decoded(engine, tokens(20)[None], **OPTIONS[mode]), expected(family, mode))
    assert engine.fused_active


def test_fused_steps_of_layers_without_a_rotary_embedding(static_steps):
    model, ids = tiny_model("smollm3"), tokens(20)[None]
    model.model.layers[1].self_attn.use_rope = False
    out = decoded(statically(DecodeEngine(model, fused=True)), ids, **OPTIONS["greedy"])
    assert torch.equal(out, generated(model, ids, **OPTIONS["greedy"]))
    assert not torch.equal(out, expected("smollm3", "greedy"))


@pytest.mark.parametrize("family", ["llama-bias", "qwen3", "phi3"])
def test_fused_steps_of_a_patched_model(family, static_steps, monkeypatch):
    model, ids, calls = tiny_model(family), tokens(20)[None], []
    step = decode_fused.sparse_mlp_step
    monkeypatch.setattr(decode_fused, "sparse_mlp_step", lambda *arguments: calls.append(1) or step(*arguments))
    cats_ext.apply_cats(model, cats_ext.calibrate(model, [tokens(256)], sparsity=0.5, progress=False))
    out = decoded(statically(DecodeEngine(model, fused=True)), ids, **OPTIONS["greedy"])
    assert torch.equal(out, generated(model, ids, **OPTIONS["greedy"]))
    assert not torch.equal(out, expected(family, "greedy"))
    assert bool(calls) == (family != "llama-bias")  # a sum has no bias: the module is called


def test_fused_steps_after_a_dense_prompt(static_steps):
    model, ids = tiny_model(), tokens(20)[None]
    config = cats_ext.calibrate(model, [tokens(256)], sparsity=0.9, progress=False)
    config.sparse_prefill = False
    cats_ext.apply_cats(model, config)
    out = decoded(statically(DecodeEngine(model, fused=True)), ids, **OPTIONS["greedy"])
    assert torch.equal(out, generated(model, ids, **OPTIONS["greedy"]))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", PADDED)
@pytest.mark.parametrize("mode", ["greedy", "repetition penalty", "without a mask"])
def test_batch_with_left_padding(mode, family, static, request):
    ids = tokens(60).view(3, 20).clone()
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :3] = 0, 0
    ids[mask == 0] = 0
    model = dense_model(family)
    engine = DecodeEngine(model)
    if static:
        request.getfixturevalue("static_steps")
        statically(engine)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": ENDS, **MODES.get(mode, {})}
    if mode == "without a mask":  # then generate takes tokens 0 for padding
        options["attention_mask"] = None
    elif mode == "repetition penalty":  # which is for what a mask leaves
        ids[mask == 0] = generated(model, ids, **options | {"repetition_penalty": 1.0})[0, 20]
    assert torch.equal(decoded(engine, ids, **options), generated(model, ids, **options))


def test_streams_the_prompt_and_each_token(llama):
    streamer, ids = Recorder(), tokens(10)[None]
    out = DecodeEngine(llama).generate(ids, max_new_tokens=7, streamer=streamer)
    assert torch.equal(streamer.values[0], ids) and streamer.ended
    assert torch.equal(torch.cat(streamer.values[1:]), out[0, 10:]) and len(streamer.values) == 8


def test_own_processors_and_criteria(llama):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, forbidden, float("-inf"))

    class Five(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 25)

    engine, ids = DecodeEngine(llama), tokens(20)[None]
    forbidden = torch.tensor([int(engine.generate(ids, max_new_tokens=1)[0, -1])])
    options = {"max_new_tokens": 40}
    options |= {"logits_processor": LogitsProcessorList([Forbid()])}
    options |= {"stopping_criteria": StoppingCriteriaList([Five()])}
    out = decoded(engine, ids, **options)
    assert torch.equal(out, generated(llama, ids, **options)) and out.shape[1] == 25 and forbidden not in out[0, 20:]
    options["stopping_criteria"] = StoppingCriteriaList([MaxLengthCriteria(64)])  # goes before max_new_tokens
    out = decoded(engine, ids, **options)
    assert torch.equal(out, generated(llama, ids, **options)) and out.shape[1] == 64


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="5.0 takes max_length as new tokens")
def test_defaults_of_the_model():
    model, ids = tiny_model(), tokens(20)[None]
    engine = DecodeEngine(model)
    plain = decoded(engine, ids)
    assert torch.equal(plain, generated(model, ids)) and plain.shape[1] > 30
    model.generation_config.update(max_length=30, repetition_penalty=1.5, do_sample=True, temperature=0.5)
    for options in ({}, {"max_length": 36}, {"max_new_tokens": 4}, {"do_sample": False, "repetition_penalty": 1.0}):
        out = decoded(engine, ids, **options)
        assert torch.equal(out, generated(model, ids, **options)) and not torch.equal(out, plain)


@pytest.mark.parametrize("static", [False, True])
def test_conversation_keeps_the_common_prefix(llama, static, request, monkeypatch):
    engine = DecodeEngine(llama, max_length=200)
    if static:
        request.getfixturevalue("static_steps")
        statically(engine)
    first = engine.generate(tokens(20)[None], max_new_tokens=10)
    session, computed = engine._session, []
    forward = decode.Session._forward
    monkeypatch.setattr(
        decode.Session, "_forward", lambda self, ids, start: computed.append(ids.shape[1]) or forward(self, ids, start)
    )
    longer = torch.cat((first, tokens(6, seed=1)[None]), dim=1)
    out = engine.generate(longer, max_new_tokens=10, reuse_prefix=True)
    assert engine._session is session and computed[0] == 7  # the last token of the answer was not in the cache yet
    assert torch.equal(out, generated(llama, longer, max_new_tokens=10))
    other = tokens(20, seed=2)[None]
    assert torch.equal(
        engine.generate(other, max_new_tokens=10, reuse_prefix=True), generated(llama, other, max_new_tokens=10)
    )


def test_patching_between_calls_is_noticed(static_steps):
    model, ids = tiny_model(), tokens(20)[None]
    engine = statically(DecodeEngine(model, fused=True))
    config = cats_ext.calibrate(model, [tokens(256)], sparsity=0.9, progress=False)
    dense = engine.generate(ids, max_new_tokens=20)
    cats_ext.apply_cats(model, config)
    sparse = engine.generate(ids, max_new_tokens=20)
    assert torch.equal(sparse, generated(model, ids, max_new_tokens=20)) and not torch.equal(sparse, dense)
    cats_ext.remove_cats(model)
    assert torch.equal(engine.generate(ids, max_new_tokens=20), dense)


def test_thresholds_set_in_place_take_effect(static_steps):
    model, ids = tiny_model(), tokens(20)[None]
    cats_ext.apply_cats(model, cats_ext.calibrate(model, [tokens(256)], sparsity=0.9, progress=False))
    engine = statically(DecodeEngine(model, fused=True))
    sparse, session = engine.generate(ids, max_new_tokens=20), engine._session
    for layer in model.model.layers:
        layer.mlp.threshold.zero_()
    dense = engine.generate(ids, max_new_tokens=20)
    assert engine._session is session and not torch.equal(dense, sparse)
    assert torch.equal(dense, generated(model, ids, max_new_tokens=20))


@pytest.mark.parametrize("fused", [False, True])
def test_the_sparsity_report_counts_the_text_alone(fused, static_steps):
    model, ids = tiny_model(), tokens(20)[None]
    cats_ext.apply_cats(model, cats_ext.calibrate(model, [tokens(256)], sparsity=0.5, progress=False))
    reports = []
    with cats_ext.track_sparsity(model):
        for generate in (model.generate, statically(DecodeEngine(model, fused=fused)).generate):
            cats_ext.reset_sparsity(model)
            generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS["greedy"])
            reports.append(cats_ext.sparsity_report(model).to_dict())
    assert reports[0] == reports[1]


def test_cache_grows_with_the_call(llama):
    engine = DecodeEngine(llama)
    engine.generate(tokens(20)[None], max_new_tokens=10)
    small = engine.cache_bytes()
    engine.generate(tokens(300)[None], max_new_tokens=10)
    assert engine.cache_bytes() == 2 * small == 2 * 3 * 2 * 512 * 2 * 16 * 2  # K and V, layers, heads, length, D, fp32


@pytest.mark.parametrize("fused", [False, True])
def test_a_cache_is_freed_before_another_is_made(fused, static_steps, monkeypatch):
    model, ids, before = tiny_model(), tokens(20)[None], []
    engine = statically(DecodeEngine(model, fused=fused))
    decoded(engine, ids, **OPTIONS["greedy"])
    cache, make = weakref.ref(engine._session.cache), decode.DecodeCache
    monkeypatch.setattr(decode, "DecodeCache", lambda *shape: before.append(cache()) or make(*shape))
    cats_ext.apply_relufication(model)
    gc.disable()  # what refers to each other would wait for it
    try:
        decoded(engine, ids, **OPTIONS["greedy"])
    finally:
        gc.enable()
    assert before == [None]


@pytest.mark.parametrize(("change", "tokens_before"), [({"scaling": -0.25}, 4), ({"window": 64}, 200)])
def test_a_model_that_computes_something_else_is_not_fused(monkeypatch, change, tokens_before):
    names = decode.FusedStep.__init__.__globals__
    describe = names["_describe_attention"]
    monkeypatch.setitem(names, "_describe_attention", lambda *arguments: replace(describe(*arguments), **change))
    with pytest.raises(ValueError, match=f"its logits after {tokens_before} tokens differ from the model's"):
        DecodeEngine(tiny_model(), fused=True).generate(tokens(5)[None], max_new_tokens=1)


def test_a_fused_step_that_fails_gives_way_with_a_warning(monkeypatch, static_steps):
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this GPU")

    monkeypatch.setattr(decode.FusedStep, "__call__", fail)
    engine = statically(DecodeEngine(dense_model("llama")))
    with pytest.warns(UserWarning, match="the fused step failed.*no kernel for this GPU"):
        out = decoded(engine, tokens(20)[None], **OPTIONS["greedy"])
    assert torch.equal(out, expected("llama", "greedy")) and not engine.fused_active


def test_nothing_is_left_when_a_call_is_interrupted(llama):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    engine, ids = DecodeEngine(llama), tokens(20)[None]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ids, stopping_criteria=StoppingCriteriaList([Interrupt()]))
    assert torch.equal(engine.generate(ids, max_new_tokens=9), generated(llama, ids, max_new_tokens=9))


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*FUSED_FAMILIES, "gemma2", "olmo2"])
def test_captured_greedy_tokens_on_cuda(family):
    model, ids = tiny_model(family).cuda(), tokens(20)[None].cuda()
    engine = DecodeEngine(model)
    for options in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"eos_token_id": ENDS}):
        options = options | {"max_new_tokens": 40}
        assert torch.equal(decoded(engine, ids, **options), generated(model, ids, **options))
    assert engine._session._graphs and engine.fused_active == (family in FUSED_FAMILIES)


@pytest.mark.gpu
def test_captured_sampling_on_cuda():
    model, ids = tiny_model().cuda(), tokens(20)[None].cuda()
    engine = DecodeEngine(model)
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    first = decoded(engine, ids, **options)
    assert torch.equal(decoded(engine, ids, **options), first)  # the seed decides
    torch.manual_seed(4)
    assert not torch.equal(engine.generate(ids, **options), first)
    assert torch.equal(first, generated(model, ids, **options))


@pytest.mark.gpu
@pytest.mark.slow
def test_captured_and_compiled_on_cuda():
    model, ids = tiny_model("gemma2").cuda(), tokens(20)[None].cuda()
    engine = DecodeEngine(model, compile=True)
    assert torch.equal(decoded(engine, ids, **OPTIONS["greedy"]), generated(model, ids, **OPTIONS["greedy"]))
    assert engine._session._graphs and not engine.fused_active


@pytest.mark.gpu
def test_captured_batch_on_cuda():
    model = tiny_model().cuda()
    ids = tokens(60).view(3, 20).cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": ENDS}
    assert torch.equal(decoded(DecodeEngine(model), ids, **options), generated(model, ids, **options))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_a_gate_that_is_read_by_columns(fused, static_steps, called):
    model, ids = tiny_model(), tokens(20)[None]
    config = cats_ext.calibrate(model, [tokens(256)], sparsity=0.8, rule="three_threshold", progress=False)
    cats_ext.apply_cats(model, config)
    engine = statically(DecodeEngine(model, fused=fused))
    sparse = generated(model, ids, **OPTIONS["greedy"])
    called.clear()
    assert torch.equal(decoded(engine, ids, **OPTIONS["greedy"]), sparse) and engine.fused_active == fused
    assert ("sparse_mlp_columns_step" if fused else "sparse_mlp_columns") in called
    cats_ext.set_sparsity(model, 0.1)
    following = generated(model, ids, **OPTIONS["greedy"])
    assert torch.equal(decoded(engine, ids, **OPTIONS["greedy"]), following) and not torch.equal(following, sparse)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["plain", "two_threshold", "three_threshold"])
@pytest.mark.parametrize("intermediate", [INTERMEDIATE, 2304])  # the second has a kernel for a step
def test_captured_patched_model_on_cuda(rule, intermediate):
    model, ids = tiny_model(intermediate_size=intermediate).cuda(), tokens(20)[None].cuda()
    cats_ext.apply_cats(model, cats_ext.calibrate(model, [tokens(256)], sparsity=0.9, rule=rule, progress=False))
    engine = DecodeEngine(model)
    sparse = generated(model, ids, **OPTIONS["greedy"])
    assert torch.equal(decoded(engine, ids, **OPTIONS["greedy"]), sparse) and engine.fused_active
    session = engine._session
    cats_ext.set_sparsity(model, 0.0)
    dense = decoded(engine, ids, **OPTIONS["greedy"])
    assert engine._session is session and not torch.equal(dense, sparse)
    assert torch.equal(dense, generated(model, ids, **OPTIONS["greedy"]))
