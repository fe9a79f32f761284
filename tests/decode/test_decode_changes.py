"""A decode engine whose model is changed between calls never replays what is out of date."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.installed import skip_unless_transformers_takes_peft
from support.models import tiny_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cats_ext
from cats_ext.decode import session as decode
from cats_ext.decode.engine import DecodeEngine
from cats_ext.patching.apply import current_config

IDS = tokens(20)[None]
OPTIONS = {"max_new_tokens": 8, "attention_mask": torch.ones_like(IDS)}

pytestmark = [
    pytest.mark.filterwarnings("error:the decode step cannot be captured"),
    pytest.mark.usefixtures("one_thread"),
]


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: runs the recorded operations again, on the tensors that they ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for op, args, kwargs, out in self.calls:
            for new, old in zip(tree_leaves(op(*args, **kwargs)), tree_leaves(out), strict=True):
                if (
                    isinstance(new, torch.Tensor)
                    and new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


class _Event:
    def synchronize(self) -> None:
        pass


@pytest.fixture
def recorded_steps(monkeypatch) -> None:
    """The steps that are captured on CUDA, recorded once for a session and replayed."""

    def graph(self, selection):
        key = selection.graph_key
        if key not in self._graphs:
            self.position.fill_(self.length - 2)
            self._advance(selection, key is not None)
            self._graphs[key] = RecordedGraph()
            with self._graphs[key]:
                self._advance(selection, key is not None)
        return self._graphs[key]

    monkeypatch.setattr(decode.Session, "_graph", graph)
    monkeypatch.setattr(decode.Session, "_send", lambda self: (self.token.clone(), _Event()))


@pytest.fixture
def called_steps(monkeypatch) -> None:
    """The same steps called, for the fused ones, whose formula on the CPU reads the position on the host."""

    class Step:
        def __init__(self, session, selection):
            self.replay = lambda: session._advance(selection, selection.graph_key is not None)

    monkeypatch.setattr(decode.Session, "_graph", lambda self, selection: Step(self, selection))
    monkeypatch.setattr(decode.Session, "_send", lambda self: (self.token.clone(), _Event()))


def engine_of(model: nn.Module, fused: bool) -> DecodeEngine:
    engine = DecodeEngine(model, fused=fused)
    engine.capture = True
    return engine


def patched(neuron_rows: bool = True) -> nn.Module:
    model = tiny_model()
    config = cats_ext.calibrate(model, [tokens(256)], sparsity=0.9, rule="plain", progress=False)
    return cats_ext.apply_cats(model, config, neuron_rows=neuron_rows)


def adapted() -> nn.Module:
    skip_unless_transformers_takes_peft()
    from peft import LoraConfig

    model = tiny_model()
    for name, seed in (("b", 1), ("a", 0)):  # "a" is at work
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False), name)
    return model


def adapters(model: nn.Module) -> list:
    return [m for m in model.modules() if hasattr(m, "adapter_layer_names")]


def other_thresholds(model: nn.Module) -> None:
    config = current_config(model).at_sparsity(0.1)
    cats_ext.apply_cats(cats_ext.remove_cats(model), config, neuron_rows=False)  # the weights stay where they are


def other_frequencies(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.3


def other_hook(model: nn.Module) -> None:
    for key in list(model.lm_head._forward_hooks):
        del model.lm_head._forward_hooks[key]
    model.lm_head.register_forward_hook(lambda *given: -given[-1])


def other_forward(model: nn.Module) -> None:
    model.lm_head.forward = lambda x: -nn.functional.linear(x, model.lm_head.weight)


def hooked() -> nn.Module:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *given: 2 * given[-1])
    return model


CHANGES: dict[str, tuple[Callable, Callable]] = {
    "adapters merged": (adapted, lambda model: [m.merge() for m in adapters(model)]),
    "adapters disabled": (adapted, lambda model: model.disable_adapters()),
    "another adapter": (adapted, lambda model: model.set_adapter("b")),
    "adapters scaled": (adapted, lambda model: [m.set_scale("a", 5.0) for m in adapters(model)]),
    "thresholds in other tensors": (lambda: patched(neuron_rows=False), other_thresholds),
    "rotary frequencies in another tensor": (tiny_model, other_frequencies),
    "a factor": (tiny_model, lambda model: vars(model.model.layers[1].self_attn).update(scaling=0.7)),
    "another hook": (hooked, other_hook),
    "another forward": (tiny_model, other_forward),
}


def check_change(change: str, device: str) -> None:
    make, alter = CHANGES[change]
    model, ids = make().to(device), IDS.to(device)
    engine = engine_of(model, fused=False)
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    before = engine.generate(ids, **options)
    assert torch.equal(before, model.generate(ids, **options))
    alter(model)
    expected = model.generate(ids, **options)
    assert torch.equal(expected, before) == (change == "adapters merged")
    assert torch.equal(engine.generate(ids, **options), expected)
    session = engine._session
    assert torch.equal(engine.generate(ids, **options), expected) and engine._session is session


@pytest.mark.parametrize("change", CHANGES)
def test_captured_steps_follow(change, recorded_steps):
    check_change(change, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_captured_steps_follow_on_cuda(change):
    check_change(change, "cuda")


@pytest.mark.parametrize(
    "alter",
    [
        lambda rotary: rotary.inv_freq.mul_(0.3),
        lambda rotary: setattr(rotary, "attention_scaling", 1.7),
    ],
    ids=["frequencies in place", "scale"],
)
def test_fused_steps_follow_the_rotary_embedding(alter, called_steps):
    model = tiny_model()
    engine = engine_of(model, fused=True)
    before = engine.generate(IDS, **OPTIONS)
    alter(model.model.rotary_emb)
    expected = model.generate(IDS, **OPTIONS)
    assert not torch.equal(expected, before)
    assert torch.equal(engine.generate(IDS, **OPTIONS), expected) and engine.fused_active


def test_fused_steps_after_hidden_states_were_asked_for(called_steps):
    model = patched()
    model(IDS, output_hidden_states=True)
    engine = engine_of(model, fused=True)
    assert torch.equal(engine.generate(IDS, **OPTIONS), model.generate(IDS, **OPTIONS)) and engine.fused_active


def test_tracking_that_starts_and_stops(called_steps):
    model = patched()
    engine = engine_of(model, fused=True)
    engine.generate(IDS, **OPTIONS)
    with cats_ext.track_sparsity(model):
        engine.generate(IDS, **OPTIONS)
        counted = cats_ext.sparsity_report(model).to_dict()
        cats_ext.reset_sparsity(model)
        model.generate(IDS, **OPTIONS)
        assert cats_ext.sparsity_report(model).to_dict() == counted
        cats_ext.reset_sparsity(model)
    engine.generate(IDS, **OPTIONS)
    assert not any(layer.mlp.counts.any() for layer in model.model.layers)


@pytest.mark.parametrize("fused", [False, True])
def test_a_reused_prefix_is_that_of_the_same_model(fused, called_steps, monkeypatch):
    model, computed = patched(), []
    engine = engine_of(model, fused)
    forward = decode.Session._forward
    monkeypatch.setattr(
        decode.Session, "_forward", lambda self, ids, start: computed.append(ids.shape[1]) or forward(self, ids, start)
    )

    def scale_weights() -> None:
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(3)

    text = engine.generate(IDS, max_new_tokens=5)
    for alter in (lambda: None, lambda: cats_ext.set_sparsity(model, 0.1), scale_weights):
        alter()
        text = torch.cat((text, tokens(4)[None]), dim=1)
        expected = model.generate(text, max_new_tokens=5, attention_mask=torch.ones_like(text))
        computed.clear()
        reused = engine.generate(text, max_new_tokens=5, reuse_prefix=True)
        assert torch.equal(reused, expected)
        assert computed[0] == (5 if expected.shape[1] == 34 else text.shape[1])
        text = expected


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_patched_in_inference_mode(fused, called_steps):
    model = patched()
    config = current_config(model)
    with torch.inference_mode():
        cats_ext.apply_cats(cats_ext.remove_cats(model), config)
    engine = engine_of(model, fused)
    with cats_ext.track_sparsity(model):
        out = engine.generate(IDS, **OPTIONS)
        assert torch.equal(out, model.generate(IDS, **OPTIONS))
        assert cats_ext.sparsity_report(model).tokens == 2 * (out.shape[1] - 1)


def test_wrappers_are_left_out():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for wrapper in (lora, torch.compile(tiny_model(), backend="eager"), nn.DataParallel(tiny_model())):
        inner = wrapper.module if isinstance(wrapper, nn.DataParallel) else wrapper
        expected = inner.generate(input_ids=IDS, **OPTIONS)
        assert torch.equal(DecodeEngine(wrapper).generate(IDS, **OPTIONS), expected)
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PROMPT_TUNING puts tokens before the prompt"):
        DecodeEngine(prompts)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = tiny_model()
    engine = DecodeEngine(model)
    engine.generate(IDS, **OPTIONS)
    cpu_offload(model, execution_device="cpu")
    for call in (lambda: engine.generate(IDS, **OPTIONS), lambda: DecodeEngine(model)):
        with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device"):
            call()
