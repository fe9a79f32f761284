"""``cats bench --model``: a whole model, dense against sparse, in every mode of generation that applies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cats_ext
from cats_ext.cli.common import escape, notes, patched
from cats_ext.cli.generation import continue_prompt, decoder, encode_prompt
from cats_ext.decode.engine import DecodeEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Once upon a time"
ENGINE, PLAIN, COMPILED = "DecodeEngine", "generate", "generate, compiled, in deferred_stop()"
WORTH_IT = 1.02  # less is within what one run differs from the next


@dataclass
class Mode:
    """A way of generation, and tokens a second in it by sparsity; 0 is the dense model."""

    name: str
    engine: DecodeEngine | PreTrainedModel
    options: dict[str, Any] = field(default_factory=dict)
    context: Callable[[], AbstractContextManager] = nullcontext
    rates: dict[float, float] = field(default_factory=dict)


def modes(network: PreTrainedModel) -> list[Mode]:
    """Those that apply to ``network`` on its device."""
    found = [Mode(PLAIN, network)]
    engine = decoder(network)
    if isinstance(engine, DecodeEngine):
        found.insert(0, Mode(ENGINE, engine))
    if network.device.type == "cuda":
        found.append(Mode(COMPILED, network, {"cache_implementation": "static"}, cats_ext.deferred_stop))
    return found


def measure(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: cats_ext.CatsConfig,
    sparsities: list[float],
    *,
    new_tokens: int,
    rounds: int,
    report: Callable[[str], None],
) -> list[Mode]:
    """Time every mode, dense and at ``sparsities`` in turns, each warmed up; the median of ``rounds`` counts.

    Args:
        network: dense, and dense again afterwards.
        config: thresholds with statistics, from which those of each sparsity are set.
        new_tokens: generated in each run, of which all but the first are timed.
        report: called with a message before each step.
    """
    ids = encode_prompt(tokenizer, PROMPT, chat=False)
    found = modes(network)
    for mode in list(found):
        times: dict[float, list[float]] = {sparsity: [] for sparsity in (0.0, *sparsities)}

        def timed(sparsity: float, mode: Mode = mode, times: dict[float, list[float]] = times) -> None:
            for count in (min(8, new_tokens), new_tokens):  # the first compiles and captures
                run = {"exact_length": True, "engine": mode.engine, **mode.options}
                done = continue_prompt(network, tokenizer, ids, count, **run)
            times[sparsity].append(done.tokens_per_second)

        try:
            with mode.context():
                for number in range(rounds):
                    report(f"timing {mode.name}, round {number + 1} of {rounds}")
                    timed(0.0)
                    with patched(network, lambda dense: cats_ext.apply_cats(dense, config)):
                        for sparsity in sparsities:
                            cats_ext.set_sparsity(network, sparsity)
                            timed(sparsity)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if mode.name == PLAIN:
                raise
            sentence = " ".join(str(error).split())[:200]
            notes.print(f"[yellow]left out {escape(mode.name)}: {escape(sentence)}[/]", soft_wrap=True)
            found.remove(mode)
            continue
        mode.rates = {sparsity: statistics.median(some) for sparsity, some in times.items()}
    return found


def advice(found: list[Mode], share_read: Callable[[float], float]) -> str:
    """Which mode to use and what it gains. ``share_read`` gives the share of the MLP weights read at a sparsity."""
    dense = max(found, key=lambda mode: mode.rates[0.0])
    fastest = dense.rates[0.0]
    sparsities = sorted(sparsity for sparsity in dense.rates if sparsity)
    sparse = max(found, key=lambda mode: mode.rates[sparsities[0]])
    if max(sparse.rates[sparsity] for sparsity in sparsities) < WORTH_IT * fastest:
        return (
            f"Use {dense.name} without CATS: at {fastest:.1f} tokens/s the dense model is as fast as any sparse one. "
            "The MLPs are too small a part of the work, or another program is busy."
        )
    gains = [
        f"{sparse.rates[sparsity] / fastest:.2f} times as fast at {sparsity:.0%} ({share_read(sparsity):.0%} read)"
        for sparsity in sparsities
    ]
    return f"Use {sparse.name}. Compared with the fastest dense mode, {dense.name}, it is {', '.join(gains)}."
