"""``cats chat``: a conversation with a model, dense or sparse, each answer with its speed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import torch

from cats_ext.cli import options
from cats_ext.cli.common import load_patched, notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESET, _LEAVE = "/reset", ("/exit", "/quit")


def chat(
    model: options.Model,
    cats: options.CatsDirectory = None,
    check_weights: options.CheckWeights = True,
    sparsity: options.Sparsity = None,
    system: Annotated[str | None, options.text("Instructions that the conversation starts with.")] = None,
    max_new_tokens: Annotated[
        int | None, options.count("Tokens of an answer at most; without it half the context, up to 512.")
    ] = None,
    context: Annotated[int, options.count("Tokens that the model looks back on at most.", least=16)] = 4096,
    temperature: options.Temperature = 0.0,
    seed: options.SamplingSeed = 0,
    device: options.Device = None,
    dtype: options.DType = None,
) -> None:
    """Talk to a model: sparsely with --cats, or if it was saved with thresholds.

    Answers go to standard output, the rest to standard error.
    /reset clears the conversation, /exit or the end of the input ends it, Ctrl-C stops
    an answer. If the conversation outgrows --context, its oldest exchanges are dropped.

    Examples:

    $ cats chat smollm2-135m

    $ cats chat ./mistral-7b --cats thresholds --system "Answer in one sentence."

    $ echo "Why is the sky blue?" | cats chat ./mistral-7b
    """
    from cats_ext.cli.generation import continue_prompt, decoder

    if sys.stdin is None:
        raise OSError("standard input is closed")
    if max_new_tokens is not None and max_new_tokens >= context:
        raise ValueError(f"--max-new-tokens must be less than --context {context}, got {max_new_tokens}")
    network, tokenizer, _ = load_patched(model, options.pick_device(device), dtype, cats, sparsity, check_weights)
    if not tokenizer.chat_template:
        raise ValueError("cats chat needs a model whose tokenizer has a chat template, and this one has none")
    context = min(context, getattr(network.config, "max_position_embeddings", context))
    max_new_tokens = max_new_tokens or min(512, context // 2)
    if max_new_tokens >= context:
        raise ValueError(f"--max-new-tokens must be less than the context of {context} tokens, got {max_new_tokens}")
    engine = decoder(network, max_length=context)
    reuse = {"reuse_prefix": True} if engine is not network else {}
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    torch.manual_seed(seed)
    while (line := _read()) is not None:
        if line == _RESET:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        ids = _fit(tokenizer, messages, len(start), context - max_new_tokens)
        said: list[str] = []

        def write(text: str, said: list[str] = said) -> None:
            said.append(text)
            print(text, end="", flush=True)

        try:
            answer = continue_prompt(
                network, tokenizer, ids, max_new_tokens, temperature=temperature, write=write, engine=engine, **reuse
            )
            speed = answer.speed
        except KeyboardInterrupt:
            speed = "stopped"
        messages.append({"role": "assistant", "content": "".join(said)})
        print()
        notes.print(f"[dim]{speed}[/]")


def _read() -> str | None:
    """The next line with something in it; None at the end."""
    while True:
        if sys.stdin.isatty():
            notes.print("[bold cyan]>[/] ", end="")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error.reason}") from error
        if not line or line.strip() in _LEAVE:
            return None
        if line.strip():
            return line.strip()


def _fit(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], first: int, longest: int) -> torch.Tensor:
    """Token ids ``[1, T]`` of the conversation, with T at most ``longest``; drops its oldest exchanges if need be."""
    from cats_ext.cli.generation import encode_messages

    while True:
        ids = encode_messages(tokenizer, messages)
        if ids.shape[1] <= longest:
            return ids
        if len(messages) <= first + 1:
            raise ValueError(f"the message has {ids.shape[1]} tokens, but the context leaves room for {longest}")
        del messages[first : first + 2]
        notes.print("[dim]The oldest exchange no longer fits the context and is forgotten.[/]")
