"""A real model writes the same greedy text through generate, the compiled model and the decode engine.

Runs where CATS_TEST_MODEL names a model (a directory or a .gguf file), such as SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import os

import pytest
import torch

import cats_ext
from cats_ext.decode.engine import DecodeEngine

PROMPTS = ("The capital of France is", "Once upon a time, there was a cat who", "def fibonacci(n):")
NEW = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("CATS_TEST_MODEL" not in os.environ, reason="CATS_TEST_MODEL names no model"),
]


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["dense", "sparse"])
def real(request):
    from cats_ext.cli.models import load_model

    # Not bfloat16, where two kernels may round two equally likely tokens apart. In a sparse model rounding also carries
    # a neuron over its threshold now and then, and the text may go another way. CUDA's kernels add in different orders,
    # so there only float64 keeps the ways together: with the mask on the dense path, without the sparse kernel.
    dtype = torch.float64 if request.param and DEVICE == "cuda" else torch.float32
    model, tokenizer = load_model(os.environ["CATS_TEST_MODEL"], device=DEVICE, dtype=dtype)
    if request.param:
        text = "A cat is a small animal that people keep in their homes. It sleeps most of the day. " * 60
        config = cats_ext.calibrate(model, text, tokenizer=tokenizer, sparsity=request.param, progress=False)
        cats_ext.apply_cats(model, config)
    return model, tokenizer


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_text_in_every_way(real, prompt):
    model, tokenizer = real
    inputs = tokenizer(prompt, return_tensors="pt").to(DEVICE)
    inputs = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = tokenizer.decode(model.generate(**inputs, **options)[0])
    engine = DecodeEngine(model)
    assert tokenizer.decode(engine.generate(**inputs, **options)[0]) == expected
    if DEVICE == "cuda":
        assert engine.fused_active == (model.dtype == torch.float32)
        model_step = DecodeEngine(model, fused=False)
        assert tokenizer.decode(model_step.generate(**inputs, **options)[0]) == expected
        compiled = model.generate(**inputs, **options, cache_implementation="static")  # transformers compiles it
        assert tokenizer.decode(compiled[0]) == expected
