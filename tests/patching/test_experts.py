"""Mixtures of experts: the formula's numbers in every family, each implementation of experts, checkpoints, training."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.experts import experts_ref, routed
from support.models import MIXTURES, installed, keeps_experts_together, tiny_model, tokens
from support.patched import assert_unchanged, config_for, few, logits, many, snapshot
from transformers import AutoModelForCausalLM

from cats_ext import (
    CatsConfig,
    DecodeEngine,
    apply_cats,
    calibrate,
    remove_cats,
    set_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.functional import MAX_EXPERT_TOKENS, MAX_KERNEL_TOKENS
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.patching.experts import CatsExperts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.usefixtures("one_thread")


def experts_of(model) -> dict[str, torch.nn.Module]:
    return {mlp.name: mlp.module for mlp in find_gated_mlps(model) if mlp.experts}


def mixture(name="mixtral", **arguments):
    model = tiny_model(name, **arguments)
    if not keeps_experts_together(model):
        pytest.skip("this version of transformers keeps the experts' weights in lists")
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", installed(MIXTURES))
def test_family(name, device, called):
    model = mixture(name).to(device)
    short, long = (
        tokens(min(MAX_EXPERT_TOKENS[device], MAX_KERNEL_TOKENS[device]), 5)[None].to(device),
        many().to(device),
    )
    before, dense = snapshot(model), [logits(model, ids) for ids in (short, long)]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    text = model.generate(long, **greedy)
    blocks = experts_of(model)
    assert blocks

    config = config_for(model)
    apply_cats(model, config)
    for block_name, block in blocks.items():
        assert isinstance(block, CatsExperts) and block.down_proj.mT.is_contiguous()
        thresholds = config.thresholds[block_name].to(device), config.down_thresholds[block_name].to(device)
        weights = block.gate_up_proj.detach(), block.down_proj.detach()
        for count in (1, MAX_EXPERT_TOKENS[device], 40):
            arguments = routed(count, device=device)
            with torch.no_grad():
                torch.testing.assert_close(
                    block(*arguments), experts_ref(*arguments, *weights, *thresholds), rtol=1e-4, atol=1e-4
                )
    called.clear()
    by_kernel = logits(model, short)
    assert called.count("sparse_experts") == len(blocks) and "gated_threshold" not in called
    assert (by_kernel - dense[0]).norm() > 0.01 * dense[0].norm()

    with track_sparsity(model):
        counted = logits(model, long)
    assert torch.equal(logits(model, long), counted)
    report = sparsity_report(model)
    assert report.tokens == long.numel()
    assert abs(report.up_sparsity - 0.375) < 0.1 and abs(report.down_sparsity - 0.625) < 0.1

    set_sparsity(model, 0.0)
    for ids, expected in zip((short, long), dense, strict=True):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(long, **greedy), text)
    remove_cats(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, long), dense[1])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_is_masked(implementation, called):
    model = mixture()
    model.config._experts_implementation = implementation
    dense = logits(model, many())
    apply_cats(model, config_for(model))
    called.clear()
    masked = logits(model, many())
    assert set(called) == {"gated_threshold"}
    assert not torch.allclose(masked, dense, atol=1e-2)
    rows = torch.cat([logits(model, many()[:, : i + 1])[:, -1:] for i in (3, 9)], dim=1)  # few tokens: the op
    assert "sparse_experts" in called
    torch.testing.assert_close(masked[:, [3, 9]], rows, rtol=1e-4, atol=1e-4)


def test_half_precision(called):
    model = mixture()
    config = config_for(model)
    expected = logits(apply_cats(copy.deepcopy(model), config), few())
    apply_cats(model.to(torch.bfloat16), config)
    called.clear()
    got = logits(model, few())
    assert "sparse_experts" in called and next(iter(experts_of_patched(model))).threshold.dtype == torch.float32
    assert F.cosine_similarity(got.float(), expected, dim=-1).mean() > 0.98


def experts_of_patched(model):
    return [module for module in model.modules() if isinstance(module, CatsExperts)]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_checkpoints(name, tmp_path):
    model = mixture(name)
    keys, config = list(model.state_dict()), config_for(model)
    model.save_pretrained(tmp_path / "dense")
    dense = logits(model, few())
    apply_cats(model, config)
    expected = [logits(model, ids) for ids in (few(), many())]
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "cats")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cats")
    at_loading = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    for loaded in (again, at_loading, copy.deepcopy(again)):
        assert len(experts_of_patched(loaded)) == len(experts_of_patched(model))
        for ids, want in zip((few(), many()), expected, strict=True):
            assert torch.equal(logits(loaded, ids), want)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "cats", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(remove_cats(again), few()), dense)
    assert CatsConfig.from_pretrained(tmp_path / "cats").layers == config.layers


def test_generate_and_pickle():
    model, prompt = mixture("qwen2-moe"), tokens(17)[None]
    apply_cats(model, config_for(model))
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, use_cache=False, **greedy)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    draft = set_sparsity(copy.deepcopy(model), 0.8)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({}, static, {"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        assert torch.equal(again.generate(prompt, **greedy, **options), expected), options


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_are_those_of_the_formula(implementation):
    model = mixture()
    model.config._experts_implementation = implementation
    block = experts_of(model)["model.layers.0.mlp.experts"]
    config = config_for(model)
    apply_cats(model, config)
    x, chosen, routing = routed(5)
    thresholds = block.threshold, block.down_threshold
    inputs = [x, routing, block.gate_up_proj, block.down_proj]
    for tensor in inputs:
        tensor.requires_grad_()
    got = torch.autograd.grad(block(x, chosen, routing).square().sum(), inputs)
    want = torch.autograd.grad(
        experts_ref(x, chosen, routing, block.gate_up_proj, block.down_proj, *thresholds).square().sum(), inputs
    )
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_dense_prompt(called):
    model = mixture("qwen2-moe")
    config, dense = config_for(model), logits(mixture("qwen2-moe"), many())
    apply_cats(model, config, sparse_prefill=False)
    called.clear()
    torch.testing.assert_close(logits(model, many()), dense)
    assert not called
    model.generate(many(), max_new_tokens=3, do_sample=False)
    assert set(called) == {"sparse_experts", "sparse_mlp"}


@pytest.mark.parametrize("count", [1, 40])
def test_compile_fullgraph(count):
    model = mixture().bfloat16()
    apply_cats(model, config_for(model))
    block, arguments = experts_of_patched(model)[0], routed(count, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = block(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected)
        block.threshold.zero_()  # not baked in
        assert not torch.allclose(compiled(*arguments), expected)


def test_export(tmp_path):
    model = mixture()
    apply_cats(model, config_for(model))
    ids = few()[:, :1]
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs={"input_ids": ids, "use_cache": False}, strict=False)
    assert "cats.sparse_experts.default" in {str(node.target) for node in program.graph.nodes}
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, logits(model, ids))


@pytest.mark.parametrize("device", DEVICES)
def test_decode_engine(device, called):
    model = mixture("qwen2-moe").to(device)
    apply_cats(model, config_for(model))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(many().to(device), **options)
    engine = DecodeEngine(model)
    called.clear()
    assert torch.equal(engine.generate(many().to(device), **options), expected)
    assert "sparse_experts" in called
    set_sparsity(model, 0.0)
    dense = model.generate(many().to(device), **options)
    assert torch.equal(engine.generate(many().to(device), **options), dense)


def test_adapters_on_experts():
    from peft import LoraConfig, get_peft_model

    model = mixture()
    apply_cats(model, config_for(model))
    expected = logits(model, few())
    lora = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    got = logits(adapted, few())
    assert not torch.allclose(got, expected, atol=1e-2)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, few()), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    assert len(experts_of_patched(merged)) == 3
    torch.testing.assert_close(logits(merged, few()), got, rtol=1e-3, atol=1e-3)
    remove_cats(merged)


# --- refused --------------------------------------------------------------------------------------------------------


def test_rules_with_weights_and_the_search_are_refused():
    model = mixture()
    for arguments, message in (
        ({"rule": "weighted"}, "gate_power .* must be 0 for mixtures of experts, got 1"),
        ({"importance": "gradient"}, "importance must be 'norm' for mixtures of experts, got 'gradient'"),
        ({"allocation": "search"}, "allocation must be 'uniform' for mixtures of experts, got 'search'"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, tokens(300), progress=False, **arguments)
    config = config_for(model)
    config.thresholds["model.layers.0.mlp.experts"] = torch.zeros(176)
    with pytest.raises(ValueError, match=r"experts'\] must have shape \[\], got \[176\]"):
        apply_cats(model, config)


CHANGES = {
    "biased": (
        lambda block: block.register_parameter("gate_up_proj_bias", torch.nn.Parameter(torch.zeros(4, 352))),
        "it has further children: gate_up_proj_bias",
    ),
    "transposed": (
        lambda block: setattr(block, "down_proj", torch.nn.Parameter(block.down_proj.detach().mT.contiguous())),
        r"must have shapes \[E, 2 I, H\] and \[E, H, I\], got \[4, 352, 64\] and \[4, 176, 64\]",
    ),
    "interleaved": (lambda block: setattr(type(block), "_apply_gate", interleaved), "its forward is not down"),
    "a part": (lambda block: setattr(block, "_is_expert_parallel", True), "only a part of the experts"),
    "dtype": (lambda block: halve(block), "down_proj is torch.float16 on cpu, but"),
}


def interleaved(self, gate_up):
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


def halve(block):
    block.down_proj = torch.nn.Parameter(block.down_proj.detach().half())


@pytest.mark.parametrize("name", CHANGES)
def test_other_experts_are_refused(name):
    change, message = CHANGES[name]
    model, config = mixture(), config_for(mixture())
    block = model.model.layers[1].mlp.experts
    block.__class__ = type("OtherExperts", (type(block),), {})
    change(block)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layers.1.mlp.experts \(OtherExperts\) cannot run sparsely: .*{message}"):
        apply_cats(model, config)
    assert_unchanged(model, before)
