"""Casting, moving, copying and pickling of patched models: thresholds keep float32 and their exact values."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_model
from support.patched import config_for, few, layers_of, logits, many

from cats_ext import CatsMLP, apply_cats, remove_cats, sparsity_report, track_sparsity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_dtypes(dtype, family, called):
    model = tiny_model(family)
    config = config_for(model)
    reference = logits(apply_cats(copy.deepcopy(model), config), few())
    called.clear()
    model = apply_cats(model.to(dtype), config)
    got = logits(model, few())
    assert got.dtype == dtype
    assert set(called) == {"gated_threshold" if dtype == torch.float64 else "sparse_mlp"}
    # rounding moves neurons across their thresholds, hence only close
    similarity = F.cosine_similarity(got.float(), reference, dim=-1)
    assert similarity.min() > 0.95 and similarity.mean() > 0.99


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "device": lambda m: m.to("cpu"),
    "device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "eval": lambda m: m.train().eval(),
    "there and back": lambda m: m.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("how", CASTS)
def test_thresholds_stay_float32_with_their_exact_values(how):
    model = tiny_model()
    config = config_for(model, rule="two_threshold", gate_power=1)
    apply_cats(model, config)
    track_sparsity(model)
    cast = CASTS[how](model)
    for name, module in zip(config.layers, layers_of(cast), strict=True):
        for attribute, expected in (("threshold", config.thresholds), ("down_threshold", config.down_thresholds)):
            threshold = getattr(module, attribute)
            assert threshold.dtype == torch.float32
            assert torch.equal(threshold, expected[name])
        assert module.counts.dtype == torch.int64
        assert module.down_proj.weight.t().is_contiguous()
    logits(cast, few())
    logits(cast, many())
    assert sparsity_report(cast).tokens == few().numel() + many().numel()
    remove_cats(cast)
    assert all(m.down_proj.weight.is_contiguous() for m in layers_of(cast))


def test_thresholds_follow_to_another_device():
    model = tiny_model()
    apply_cats(model, config_for(model))
    model.to("meta")
    for module in layers_of(model):
        assert module.threshold.device.type == module.counts.device.type == "meta"
        assert module.threshold.dtype == torch.float32


def test_deepcopy_is_independent():
    model = tiny_model()
    apply_cats(model, config_for(model))
    twin = copy.deepcopy(model)
    remove_cats(twin)
    assert all(isinstance(m, CatsMLP) for m in layers_of(model))
    assert all(m.down_proj.weight.t().is_contiguous() for m in layers_of(model))
    with pytest.raises(ValueError, match="not patched"):
        remove_cats(twin)


def test_pickle_of_the_whole_model():
    model = tiny_model("phi3")
    apply_cats(model, config_for(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded, few()), logits(model, few()))
    assert layers_of(loaded)[0].threshold.dtype == torch.float32
    remove_cats(loaded)
    assert type(layers_of(loaded)[0]).__name__ == "Phi3MLP"
    assert layers_of(loaded)[0].down_proj.weight.is_contiguous()


def test_thresholds_changed_in_place_act_at_once():
    model = tiny_model()
    expected = logits(model, few())
    apply_cats(model, config_for(model))
    assert not torch.allclose(logits(model, few()), expected)
    for module in layers_of(model):
        module.threshold.zero_()
        module.down_threshold.zero_()
    torch.testing.assert_close(logits(model, few()), expected, rtol=1e-5, atol=1e-5)
