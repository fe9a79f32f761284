"""``cats generate``: a continuation of a prompt, dense or sparse, with its speed and the sparsity it reached."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer

import cats_ext
from cats_ext.cli import options
from cats_ext.cli.common import load_patched, note_drift, notes, print_json


def generate(
    model: options.Model,
    prompt: Annotated[str, options.text("Text to continue.")],
    cats: options.CatsDirectory = None,
    check_weights: options.CheckWeights = True,
    sparsity: options.Sparsity = None,
    max_new_tokens: Annotated[int, options.count("Tokens to write at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: options.Temperature = 0.0,
    seed: options.SamplingSeed = 0,
    stream: Annotated[bool, typer.Option(help="Print words as they come.")] = True,
    device: options.Device = None,
    dtype: options.DType = None,
    json: options.Json = False,
) -> None:
    """Continue a prompt: sparsely with --cats, or if the model was saved with thresholds.

    The text goes to standard output, the rest to standard error.

    Examples:

    $ cats generate smollm2-135m --prompt "The capital of France is"

    $ cats generate ./mistral-7b --cats thresholds --chat --prompt "What is a cat?"
    """
    from cats_ext.cli.generation import check_prompt, continue_prompt, encode_prompt

    check_prompt(prompt)
    network, tokenizer, config = load_patched(model, options.pick_device(device), dtype, cats, sparsity, check_weights)
    input_ids = encode_prompt(tokenizer, prompt, chat)
    if config is not None:
        cats_ext.track_sparsity(network)

    torch.manual_seed(seed)
    write = partial(print, end="", flush=True) if stream and not json else None
    result = continue_prompt(network, tokenizer, input_ids, max_new_tokens, temperature=temperature, write=write)
    report = None if config is None else cats_ext.sparsity_report(network)
    if json:
        sparsity = None if report is None else {**report.to_dict(), "target": config.sparsity}
        print_json({"model": model, "prompt": prompt, **asdict(result), "sparsity": sparsity})
        return
    print("" if write else result.text)
    notes.print(
        f"[dim]{result.speed}; first token after {result.first_token_seconds:.2f} s ({result.prompt_tokens} prompt "
        f"tokens), {result.prepare_seconds:.1f} s to prepare[/]",
        soft_wrap=True,
    )
    if report is not None:
        target = f" (target {config.sparsity:.0%})" if config.sparsity else ""
        notes.print(
            f"[dim]neurons skipped: {report.up_sparsity:.1%} of up, {report.down_sparsity:.1%} of down{target}; a "
            f"token read {report.bytes_share:.1%} of the MLP weights[/]",
            soft_wrap=True,
        )
        note_drift(report, "this text", tolerance=0.1)  # a few tokens vary more than a corpus
