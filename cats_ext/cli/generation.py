"""One greedy or sampled continuation and its times: shared by ``cats generate``, ``cats chat`` and ``cats demo``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from cats_ext.decode.engine import DecodeEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuation:
    """The text that a model generated after a prompt, and the times it took."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prepare_seconds: float  # before the prompt: compilation and capture, once for a model and its settings
    first_token_seconds: float  # of the prompt
    tokens_per_second: float  # of the tokens after the first; 0 if there are none

    @property
    def speed(self) -> str:
        if self.new_tokens == 1:
            return "1 token"
        return f"{self.new_tokens} tokens, {self.tokens_per_second:.1f} tokens/s"


class _Streamer(TextStreamer):
    """Records when each token arrived (transformers passes the prompt first); gives complete words to ``write``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.write is not None:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write is not None:
            self.write(text)


def decoder(model: PreTrainedModel, **options: Any) -> DecodeEngine | PreTrainedModel:
    """The decode engine for ``model``, or the model itself if the engine does not support it."""
    try:
        return DecodeEngine(model, **options)
    except ValueError:
        return model


def check_prompt(prompt: str) -> None:
    """Raise ValueError for a prompt with nothing in it."""
    if not prompt.strip():
        raise ValueError(f"--prompt must not be empty, got {prompt!r}")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids ``[1, T]`` of ``prompt``, as a user's message in the model's chat template if ``chat``.

    Raises:
        ValueError: the prompt is empty, or ``chat`` is set and the tokenizer has no chat template.
    """
    check_prompt(prompt)
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat needs a model whose tokenizer has a chat template, and this one has none")
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(prompt, return_tensors="pt").input_ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids ``[1, T]`` of a conversation in the model's chat template, up to where the answer begins."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return encoded.input_ids


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    exact_length: bool = False,
    write: Callable[[str], Any] | None = None,
    engine: DecodeEngine | PreTrainedModel | None = None,
    **options: Any,
) -> Continuation:
    """Continue a prompt.

    Args:
        input_ids: ``[1, T]``.
        temperature: 0 is greedy; above 0 samples from torch's global generator.
        exact_length: continue after an end-of-text token, for timing.
        write: called with each new piece of the text.
        engine: the result of :func:`decoder` for ``model``, if it is kept from call to call.
        options: for the engine's ``generate``.

    Raises:
        ValueError: prompt and new tokens exceed the model's positions.
    """
    prompt_tokens = input_ids.shape[1]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and prompt_tokens + max_new_tokens > longest:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} after a prompt of {prompt_tokens} tokens exceeds the model's {longest} "
            "positions"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if exact_length:
        sampling["eos_token_id"] = model.get_input_embeddings().num_embeddings  # no token
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = _Streamer(tokenizer, write)
    ids = input_ids.to(model.device)
    with torch.inference_mode():
        output = (engine or decoder(model)).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
            **options,
        )
    new = output[0, prompt_tokens:]
    start, prompt, *arrivals = streamer.times
    decode = arrivals[-1] - arrivals[0]
    return Continuation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        prepare_seconds=prompt - start,
        first_token_seconds=arrivals[0] - prompt,
        tokens_per_second=(len(arrivals) - 1) / decode if decode > 0 else 0.0,
    )
