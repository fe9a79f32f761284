"""What the decode engine cannot do it refuses, naming the argument and its value."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, tiny_model, tokens

from cats_ext.decode.engine import DecodeEngine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "does not support num_beams=2"),
        ({"return_dict_in_generate": True}, "does not support return_dict_in_generate=True"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "does not support penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "does not support dola_layers='high'"),
        ({"constraints": [1]}, r"does not support constraints=\[1\]"),
        ({"force_words_ids": [[4]]}, r"does not support force_words_ids=\[\[4\]\]"),
        ({"assistant_early_exit": 1}, "does not support assistant_early_exit=1"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "does not know assistant_model=.{,40}$"),
        ({"cache_implementation": "quantized"}, "does not support cache_implementation='quantized'"),
        ({"input_ids": tokens(20)[None] % 7}, "padding token 0 elsewhere than on the left: pass attention_mask"),
        ({"max_new_tokens": 0}, "max_new_tokens.* must be greater than 0, but is 0"),
        ({"max_length": 5}, "max_length must exceed the prompt's 20 tokens, got 5"),
        ({"max_new_token": 3}, "max_new_token"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0 to sample, got 0.0"),
        ({"do_sample": True, "temperature": "x"}, "temperature must be above 0 to sample, got 'x'"),
        ({"stop_strings": ["a"]}, "tokenizer"),
    ],
)
def test_refused_options_are_named(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        DecodeEngine(llama).generate(**{"input_ids": tokens(20)[None], **arguments})


def test_bad_input_is_named(llama):
    engine, ids = DecodeEngine(llama), tokens(20)[None]
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, T\].*got \[20\]"):
        engine.generate(ids[0])
    with pytest.raises(ValueError, match=r"got \[1, 0\]"):
        engine.generate(ids[:, :0])
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}"):
        engine.generate(torch.full((1, 3), VOCABULARY))
    with pytest.raises(TypeError, match="integer tensor"):
        engine.generate(ids.float())
    with pytest.raises(TypeError, match=r"max_new_tokens must be an integer, got 2\.5"):
        engine.generate(ids, max_new_tokens=2.5)
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        engine.generate(ids, [[1] * 20])
    with pytest.raises(ValueError, match=r"shape \[1, 20\], got \[1, 3\]"):
        engine.generate(ids, torch.ones(1, 3))
    with pytest.raises(ValueError, match="zeros on the left"):
        engine.generate(ids, torch.tensor([[1] * 19 + [0]]))
    with pytest.raises(ValueError, match="training mode"):
        DecodeEngine(tiny_model().train())
    with pytest.raises(TypeError, match="got Linear"):
        DecodeEngine(torch.nn.Linear(2, 2))
    for wrong in (-3, 2.5):
        with pytest.raises(ValueError, match=f"max_length must be at least 1, got {wrong}"):
            DecodeEngine(llama, max_length=wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="capture=True needs a model on a CUDA device, got cpu"):
            DecodeEngine(llama, capture=True)


def test_models_with_other_caches_are_refused():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        DecodeEngine(AutoModelForSeq2SeqLM.from_config(config).eval())
    model = tiny_model()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        DecodeEngine(model)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_fused_refuses_by_name(family):
    with pytest.raises(ValueError, match=r"fused=True: .*(Gemma2|Olmo2)ForCausalLM is none of"):
        DecodeEngine(tiny_model(family), fused=True).generate(tokens(5)[None], max_new_tokens=1)


def test_fused_refuses_hooks_and_other_linears():
    model = tiny_model()
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj has a hook"):
        DecodeEngine(model, fused=True).generate(tokens(5)[None], max_new_tokens=1)
    handle.remove()
    model.model.layers[0].self_attn.o_proj.__class__ = type("Other", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj is a Other"):
        DecodeEngine(model, fused=True).generate(tokens(5)[None], max_new_tokens=1)


def test_fused_refuses_hooks_for_all_modules():
    engine = DecodeEngine(tiny_model(), fused=True)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        with pytest.raises(ValueError, match=r"fused=True: .*there are hooks for all modules"):
            engine.generate(tokens(5)[None], max_new_tokens=1)
