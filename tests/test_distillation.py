"""Distillation: the dense model is found behind adapters and masks, and the sparse one is drawn to it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, tokens
from patched import config_for, many
from transformers import TrainerCallback

from cats_ext import apply_cats, distillation
from cats_ext.distillation import dense_logits, divergence
from cats_ext.evaluation import compare
from cats_ext.finetune import FinetuneSettings, finetune

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 48


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_dense_model_is_behind_adapters_and_masks(checkpointing):
    model, ids = tiny_model(), many()
    with torch.no_grad():
        want = model(input_ids=ids).logits
    model = adapted(apply_cats(model, config_for(model)))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    before = model.train()(input_ids=ids).logits
    found = dense_logits(model, ids)
    assert not found.requires_grad
    torch.testing.assert_close(found, want)
    after = model(input_ids=ids).logits  # masks and adapters are back
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.allclose(after, want, atol=1e-3)
    after.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_and_its_gradient(dtype, monkeypatch):
    monkeypatch.setattr(distillation, "_POSITIONS", 4)  # the last piece is a shorter one
    dense, sparse = (torch.randn(2, 5, 33).to(dtype).requires_grad_() for _ in range(2))
    wide = sparse.detach().float().requires_grad_()
    want = F.kl_div(wide.log_softmax(-1), dense.detach().float().log_softmax(-1), reduction="sum", log_target=True) / 10
    (3 * want).backward()
    got = divergence(dense, sparse)
    (3 * got).backward()
    torch.testing.assert_close(got, want)
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(sparse.grad.float(), wide.grad, **tolerance)
    assert dense.grad is None and divergence(sparse, sparse).abs() < 1e-6


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **_):
        self.seen.append(state.global_step)


def test_a_distilled_model_is_nearer_to_the_dense_one(tmp_path):
    model, data = tiny_model(), tokens(LENGTH * 12)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 8  # so that what is skipped matters
    dense = copy.deepcopy(model)
    config = config_for(model)
    apply_cats(model, config)
    kl = compare(model, data, window=LENGTH, progress=False).kl
    model = copy.deepcopy(dense)
    settings = FinetuneSettings(steps=24, sequence_length=LENGTH, batch_size=2, learning_rate=2e-3, distill=1.0)
    steps = Steps()
    found = finetune(model, data, tmp_path, settings, config=config, callbacks=[steps], save_every=30, progress=False)
    assert steps.seen == list(range(1, 25))
    with torch.no_grad():
        left = divergence(dense(input_ids=data.view(-1, LENGTH)).logits, model(input_ids=data.view(-1, LENGTH)).logits)
    assert left < 0.8 * kl  # without the weight in the loss it grows
    assert found["loss"][0][1] < 3 * kl  # the divergence alone, not the text's loss
