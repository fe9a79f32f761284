"""Models patched with the rule three_threshold, whose gate sees only inputs above their threshold."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from support.models import HIDDEN, INTERMEDIATE, LAYERS, tiny_model, tokens
from support.patched import (
    GATES_NOT_BY_COLUMNS,
    InterruptAt,
    assert_unchanged,
    config_for,
    few,
    few_and_many,
    layers_of,
    logits,
    many,
    snapshot,
)
from torch.autograd import forward_ad
from torch.func import jvp

from cats_ext import (
    SparsityDriftWarning,
    apply_cats,
    masking_disabled,
    quantize,
    remove_cats,
    reset_sparsity,
    sparsity_report,
    track_sparsity,
)
from cats_ext.ops import dispatch
from cats_ext.ops.reference import ACTIVATIONS
from cats_ext.patching.apply import _patch, current_config
from cats_ext.patching.detection import find_gated_mlps
from cats_ext.patching.projections import KINDS, ColumnProjections
from cats_ext.patching.surgery import check_rule, make_dense, make_sparse, patch_module

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = "three_threshold"


def patched(family="llama", **arguments):
    model = tiny_model(family)
    return apply_cats(model, config_for(model, rule=RULE), **arguments)


def formula(mlp, x):
    """The MLP by its formula, in PyTorch operations that autograd knows."""
    v = ACTIVATIONS[mlp.forward_settings.activation](mlp.gate_proj(x * ~(x.abs() < mlp.input_threshold)))
    h = v * mlp.up_proj(x)
    kept = (v.detach().abs() >= mlp.threshold) & (h.detach().abs() >= mlp.down_threshold)
    return mlp.down_proj(h * kept)


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma2"])
@pytest.mark.parametrize(("count", "op"), [(1, "sparse_mlp_columns"), (8, "sparse_mlp_columns"), (40, None)])
def test_few_and_many_tokens_are_the_formula(family, count, op, called):
    mlp, x = layers_of(patched(family))[0], torch.randn(1, count, HIDDEN)
    with torch.no_grad():
        got = mlp(x)
        assert called == [op or "gated_threshold"]
        torch.testing.assert_close(got, formula(mlp, x), rtol=1e-4, atol=1e-5)
        mlp.input_threshold.zero_()
        assert not torch.allclose(mlp(x), got, atol=1e-3)


@pytest.mark.parametrize("count", [1, 40])
def test_a_nan_is_kept_and_a_threshold_of_zero_keeps_all(count):
    model = patched()
    mlp, x = layers_of(model)[0], torch.randn(1, count, HIDDEN)
    x[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert mlp(x)[0, 0].isnan().all() and not mlp(x)[0, 1:].isnan().any()
        x[0, 0, 3] = 0
        for buffer in (mlp.threshold, mlp.down_threshold, mlp.input_threshold):
            buffer.zero_()
        with masking_disabled(model):
            expected = mlp(x)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_input_at_the_threshold_is_kept_by_both_paths(dtype):
    """The threshold is no number of the inputs' dtype: it is compared as it is, not rounded."""
    mlp = layers_of(patched().to(dtype))[0]
    for below, threshold in ((0.1, 0.10003), (0.1, 0.09997)):
        x = torch.tensor(below, dtype=dtype)
        mlp.input_threshold.fill_(float(x) * threshold / below)
        with track_sparsity(mlp), torch.no_grad():
            for count in (1, 40):
                mlp(x.expand(1, count, HIDDEN).contiguous())
        assert mlp.input_threshold.dtype == torch.float32
        kept = mlp.counts[3].item() / (41 * HIDDEN)
        assert kept == (0 if threshold > below else 1)
        mlp.counts.zero_()


@pytest.mark.parametrize("prompt", [2, 30])
def test_dense_prompts(prompt):
    model, ids = patched(sparse_prefill=False), tokens(prompt)[None]
    torch.testing.assert_close(logits(model, ids), logits(tiny_model(), ids))
    assert not torch.allclose(logits(model, ids[:, :1]), logits(tiny_model(), ids[:, :1]), atol=1e-3)


def test_masking_disabled_is_the_dense_model():
    model = patched()
    with masking_disabled(model):
        torch.testing.assert_close(logits(model, many()), logits(tiny_model(), many()))


def test_autocast_computes_the_same_in_low_precision(called):
    model = patched()
    expected = logits(model, few())
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, few())
    assert set(called) == {"gated_threshold"}
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1).mean() > 0.99


@pytest.mark.parametrize("tracking", [False, True])
@pytest.mark.parametrize("count", [1, 40])
def test_compiled_in_one_graph(count, tracking):
    model, ids = patched(), tokens(count)[None]
    with track_sparsity(model, tracking):
        expected = logits(model, ids)
        counts = [mlp.counts.clone() for mlp in layers_of(model)]
        reset_sparsity(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    for mlp, want in zip(layers_of(model), counts, strict=True):
        assert torch.allclose(mlp.counts, want, atol=2) and bool(want.any()) == tracking


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 40])
def test_gradients_are_those_of_the_formula(count):
    mlp, x = layers_of(patched().double())[0], torch.randn(1, count, HIDDEN, dtype=torch.float64)
    found = []
    for function in (mlp, lambda x: formula(mlp, x)):
        leaf = x.clone().requires_grad_()
        mlp.zero_grad()
        function(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in mlp.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 40])
def test_forward_derivatives(count):
    mlp, (x, v) = layers_of(patched())[0], torch.randn(2, 1, count, HIDDEN)
    _, tangent = jvp(lambda x: formula(mlp, x), (x,), (v,))
    torch.testing.assert_close(jvp(mlp, (x,), (v,))[1], tangent, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(got, tangent, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_gate_gets_the_inputs_that_count():
    from peft import LoraConfig, get_peft_model

    model = patched()
    expected = few_and_many(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj"], init_lora_weights=False))
    mlp, x = layers_of(model)[1], torch.randn(1, 5, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), formula(mlp, x), rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            for got, want in zip(few_and_many(adapted), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    remove_cats(adapted)
    assert all(layer.gate_proj.base_layer.weight.is_contiguous() for layer in layers_of(model))


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_gate_has_a_contiguous_row_an_input_and_is_put_back():
    model = tiny_model()
    first, second, _ = (mlp.gate_proj for mlp in layers_of(model))
    first.weight.data = torch.zeros(INTERMEDIATE, HIDDEN + 24)[:, :HIDDEN].copy_(first.weight.detach())
    second.weight.data = second.weight.data.t().contiguous().t()  # as it is to be
    before, expected = snapshot(model), logits(model, few())
    size = sum(p.numel() for p in model.parameters())
    apply_cats(model, config_for(model, rule=RULE))
    assert snapshot(model)["parameters"] == before["parameters"]
    for mlp in layers_of(model):
        assert mlp.gate_proj.weight.shape == (INTERMEDIATE, HIDDEN)
        assert mlp.gate_proj.weight.stride() == (1, INTERMEDIATE) and mlp.up_proj.weight.is_contiguous()
        assert mlp.counts.shape == (4,) and mlp.input_threshold.shape == ()
        assert KINDS[mlp.forward_settings.projections] is ColumnProjections
    assert sum(p.numel() for p in model.parameters()) == size
    assert not {name for name in model.state_dict() if "threshold" in name}
    assert "three thresholds, target sparsity up 0.250, down 0.450, input 0.300" in repr(model)
    remove_cats(model)
    assert_unchanged(model, before)
    assert first.weight.stride() == (HIDDEN + 24, 1) and torch.equal(logits(model, few()), expected)


def test_weights_may_stay_where_they_are(called):
    model, usual = patched(neuron_rows=False), patched()
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    found = logits(model, few())
    assert set(called) == {"gated_threshold"}
    torch.testing.assert_close(found, logits(usual, few()), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in remove_cats(model).parameters())


def test_a_gate_that_lies_as_before_is_not_read_by_columns():
    mlp = layers_of(patched())[0]
    assert ColumnProjections.operands(mlp._modules) is not None
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.contiguous()
    assert ColumnProjections.operands(mlp._modules) is None


def test_a_gate_whose_memory_others_have_is_refused_by_name():
    model = tiny_model()
    config, mlp = config_for(model, rule=RULE), layers_of(model)[1]
    both = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = both.chunk(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.gate_proj is a view of a buffer of .* detach.*clone"):
        apply_cats(model, config)
    assert_unchanged(model, before)
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.clone()
    apply_cats(model, config)
    mlp.gate_proj.weight.share_memory_()
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.gate_proj is in memory shared between processes"):
        remove_cats(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_patching_and_removal_interrupted_at_any_line(error):
    model = tiny_model()
    config, before = config_for(model, rule=RULE), snapshot(model)
    for line in itertools.count():
        try:
            with InterruptAt(line, [_patch, make_sparse, patch_module], error):
                apply_cats(model, config)
            break
        except error:
            assert_unchanged(model, before)
    assert line > 10 * LAYERS
    for line in itertools.count():
        try:
            with InterruptAt(line, [make_dense], error):
                remove_cats(model)
            break
        except error:
            assert_unchanged(model, before)
        apply_cats(model, config)
    assert line > 10 * LAYERS
    assert_unchanged(model, before)


CASTS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("how", CASTS)
def test_casting_keeps_the_layout_and_the_thresholds(how):
    model = patched()
    config = current_config(model)
    cast = CASTS[how](model)
    for name, mlp in zip(config.layers, layers_of(cast), strict=True):
        assert mlp.input_threshold.dtype == torch.float32
        assert torch.equal(mlp.input_threshold, config.input_thresholds[name])
        assert mlp.gate_proj.weight.stride() == (1, INTERMEDIATE)
    few_and_many(cast)
    assert all(p.is_contiguous() for p in remove_cats(cast).parameters())


def test_weights_load_into_a_patched_model():
    model, other = patched(), tiny_model(seed=1)
    model.load_state_dict(other.state_dict())
    assert layers_of(model)[0].gate_proj.weight.stride() == (1, INTERMEDIATE)
    torch.testing.assert_close(logits(remove_cats(model), many()), logits(other, many()))


# --- which implementation -------------------------------------------------------------------------------------------


def test_as_many_tokens_as_its_own_limit_says(monkeypatch):
    mlp = layers_of(patched().requires_grad_(False))[0]

    def chosen(count):
        return dispatch.choose(torch.randn(1, count, HIDDEN), HIDDEN, ColumnProjections, mlp._modules)[0]

    assert chosen(8) == dispatch.KERNEL and chosen(40) == dispatch.MASKED
    monkeypatch.setitem(dispatch.MAX_COLUMN_TOKENS, "cpu", 3)
    assert chosen(3) == dispatch.KERNEL and chosen(4) == dispatch.MASKED


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "expected"),
    [
        (576, 1536, torch.bfloat16, True),
        (4096, 14336, torch.bfloat16, True),
        (576, 1537, torch.bfloat16, False),
        (580, 1536, torch.bfloat16, False),
        (580, 1536, torch.float32, True),
        (12416, 1536, torch.bfloat16, False),
        (8224, 1536, torch.float32, False),
    ],
)
def test_rows_that_the_kernel_takes(hidden, intermediate, dtype, expected):
    up = torch.empty(intermediate, hidden, dtype=dtype, device="meta")
    weights = torch.empty(hidden, intermediate, dtype=dtype, device="meta"), up, up
    assert dispatch.column_rows_fit(weights)  # elsewhere any
    assert dispatch.column_rows_fit(tuple(w.as_subclass(OnCuda) for w in weights)) == expected


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "found"), GATES_NOT_BY_COLUMNS.items())
def test_a_gate_that_is_not_read_by_columns(family, found):
    model = quantize(tiny_model(), progress=False) if family == "quantised" else tiny_model(family)
    config, before = config_for(tiny_model(), rule=RULE), snapshot(model)
    message = f"rule 'three_threshold' needs a whole gate_proj of dense weights, got {found} in model.layers.0.mlp"
    with pytest.raises(ValueError, match=message):
        apply_cats(model, config)
    assert_unchanged(model, before)


def test_a_part_of_the_neurons():
    (mlp, *_) = find_gated_mlps(tiny_model())
    check_rule(RULE, [mlp])
    sharded = replace(mlp, shard=object())
    check_rule("two_threshold", [sharded])
    with pytest.raises(
        ValueError, match=r"got a part of its neurons on this rank \(tensor parallelism\) in model\.layers\.0"
    ):
        check_rule(RULE, [mlp, sharded])


def test_a_patched_model_is_not_quantised():
    model = patched()
    expected = logits(model, few())
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched with rule 'three_threshold', which needs dense"):
        quantize(model, progress=False)
    assert torch.equal(logits(model, few()), expected)


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 50], ids=["kernel 1", "kernel 3", "dense path"])
def test_report_is_what_was_skipped(count):
    model, x = patched(), torch.randn(count, HIDDEN)
    mlp = layers_of(model)[0]
    with track_sparsity(model), torch.no_grad():
        for layer in layers_of(model):
            layer(x)
    report = sparsity_report(model)
    layer = report.layers[0]
    skipped = x.abs() < mlp.input_threshold
    with torch.no_grad():
        v = torch.nn.functional.silu(mlp.gate_proj(x.masked_fill(skipped, 0))).abs()
        up = v < mlp.threshold
        down = up | ((v * mlp.up_proj(x)).abs() < mlp.down_threshold)
    pairs = count * INTERMEDIATE
    assert layer.tokens == count
    assert layer.input_sparsity == pytest.approx(skipped.double().mean().item())
    assert layer.up_sparsity == pytest.approx(up.sum().item() / pairs, abs=1.5 / pairs)
    assert layer.down_sparsity == pytest.approx(down.sum().item() / pairs, abs=1.5 / pairs)
    assert layer.input_target == 0.3 and 0 < layer.input_sparsity < 0.6
    read = 3 - layer.up_sparsity - layer.down_sparsity - layer.input_sparsity
    assert layer.bytes_share == pytest.approx(read / 3)
    document = report.to_dict()
    assert document["input_sparsity"] == report.input_sparsity and document["input_target"] == pytest.approx(0.3)
    assert document["layers"][0]["input_sparsity"] == layer.input_sparsity
    assert "input" in str(report) and "30.0%" in str(report)


def test_reports_of_other_rules_have_no_inputs():
    model = tiny_model()
    apply_cats(model, config_for(model))
    with track_sparsity(model):
        logits(model, few())
    report = sparsity_report(model)
    assert report.input_sparsity == 0 and "input" not in str(report)
    assert not any("input" in key for document in (report.to_dict(), report.to_dict()["layers"][0]) for key in document)


def test_inputs_that_drift_are_warned_of():
    model = patched()
    layers_of(model)[1].input_threshold.zero_()
    with track_sparsity(model):
        logits(model, many())
    with pytest.warns(
        SparsityDriftWarning, match=r"furthest in model.layers.1.mlp: up .*, input 0.0% of 30.0%\. Calib"
    ):
        report = sparsity_report(model, tolerance=0.15)
    assert report.layers[1].drift == pytest.approx(0.3, abs=0.05)
