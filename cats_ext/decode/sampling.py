"""The choice of the next token and the end of the text, with transformers' logits processors and stopping criteria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import logits_process as processors

from cats_ext.decode.state import left_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Processors that read only the scores and launch the same kernels at every length: a graph can capture them.
_SCORES_ONLY = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.LogitNormalization,
    processors.InfNanRemoveLogitsProcessor,
)
# Options of generate that change the search for tokens or the result, and the value that switches each off.
_REFUSED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "guidance_scale": None,
    "return_dict_in_generate": False,
    "token_healing": False,
    "watermarking_config": None,
}
_OTHER_CACHES = ("quantized", "offloaded", "offloaded_static", "paged")  # the engine's own replaces any other


@dataclass
class Selection:
    """How the next token is chosen: ``(ids [B, T], logits [B, V]) -> [B]``.

    ``graph_key`` is None if a processor must get exactly the tokens so far. Otherwise a graph can capture the choice,
    from ids whose unfilled places repeat the first token; equal keys mean equal choices.
    """

    processors: LogitsProcessorList
    sample: bool

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if not self.processors and not self.sample:
            return torch.argmax(logits, dim=-1)
        scores = self.processors(ids, logits.to(torch.float32, copy=True))
        if self.sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)

    @property
    def graph_key(self) -> tuple | None:
        if not all(_can_be_captured(processor) for processor in self.processors):
            return None
        return (self.sample, *((type(p), *sorted((k, str(v)) for k, v in vars(p).items())) for p in self.processors))

    @property
    def needs_ids(self) -> bool:
        return any(type(p) not in _SCORES_ONLY for p in self.processors)


def _can_be_captured(processor: object) -> bool:
    if type(processor) is processors.RepetitionPenaltyLogitsProcessor:  # a repeated token counts once
        return getattr(processor, "prompt_ignore_length", None) is None
    return type(processor) in _SCORES_ONLY


@dataclass
class GenerationRequest:
    """The arguments of one call of ``generate``, resolved."""

    selection: Selection
    mask: Tensor | None  # int64 [B, T], zeros on the left; None if there are none
    finished: Callable[[Tensor], Tensor]  # ids on the CPU [B, T] -> bool [B]
    has_eos: bool
    pad: int
    max_length: int


def prepare_generation(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    tokenizer: Any,
    options: dict[str, Any],
) -> GenerationRequest:
    """Resolve the arguments of a call as ``model.generate`` does.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``; None takes padding tokens for padding, as ``model.generate`` does.
        generation_config, logits_processor, stopping_criteria, tokenizer, options: see ``DecodeEngine.generate``.

    Raises:
        TypeError, ValueError: an option has a wrong type or value, or the engine does not know or support it.
    """
    config, unknown = model._prepare_generation_config(generation_config, **options)
    # transformers puts what the model's forward may take here
    unknown = {k: v for k, v in unknown.items() if k in options}
    if unknown:
        raise ValueError(f"the decode engine does not know {', '.join(f'{k}={short(v)}' for k, v in unknown.items())}")
    for name, off in _REFUSED.items():
        if (value := getattr(config, name, off)) not in (off, None) and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"the decode engine does not support {name}={short(value)}: use model.generate")
    if config.cache_implementation in _OTHER_CACHES:
        name = config.cache_implementation
        raise ValueError(f"the decode engine does not support cache_implementation='{name}': use model.generate")
    for name in ("max_new_tokens", "max_length"):
        if not isinstance(value := getattr(config, name), Integral | None):
            raise TypeError(f"{name} must be an integer, got {short(value)}")
    length = input_ids.shape[1]
    if config.max_new_tokens is not None:
        config.max_length = length + config.max_new_tokens
    elif all(
        value is None
        for value in (
            options.get("max_length"),
            getattr(generation_config, "max_length", None),
            model.generation_config.max_length,  # transformers 5.0 adds the prompt's length to this one
        )
    ):
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        config.max_length = length + (20 if config.max_length is None else config.max_length)  # as generate does
        config.max_length = config.max_length if longest is None else min(config.max_length, longest)
    if config.min_new_tokens is not None:
        config.min_length = length + config.min_new_tokens
    if config.max_length <= length:
        raise ValueError(f"max_length must exceed the prompt's {length} tokens, got {config.max_length}")
    # transformers finds it only after the prompt has been computed, or not at all.
    sampled = config.do_sample and config.temperature is not None
    if sampled and not (isinstance(config.temperature, Real) and config.temperature > 0):
        got = short(config.temperature)
        raise ValueError(f"temperature must be above 0 to sample, got {got} (do_sample=False is greedy)")

    model._prepare_special_tokens(config, True, device=input_ids.device)
    mask = (
        _inferred_padding(model, input_ids, config)
        if attention_mask is None
        else left_padding(input_ids, attention_mask)
    )
    prepared = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=length,
        encoder_input_ids=input_ids,
        logits_processor=logits_processor if logits_processor is not None else LogitsProcessorList(),
        device=input_ids.device,
        model_kwargs={} if mask is None else {"attention_mask": mask.to(input_ids.device)},
    )
    model._prepare_special_tokens(config, True, device="cpu")  # stopping criteria run on the CPU
    criteria = model._get_stopping_criteria(
        generation_config=config,
        stopping_criteria=stopping_criteria if stopping_criteria is not None else StoppingCriteriaList(),
        tokenizer=tokenizer,
    )
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]  # the caller's replaces ours
    return GenerationRequest(
        selection=Selection(prepared, bool(config.do_sample)),
        mask=mask,
        finished=lambda ids: criteria(ids, None),
        has_eos=config._eos_token_tensor is not None,
        pad=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
        max_length=max(min(lengths), length + 1),
    )


def _inferred_padding(model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig) -> Tensor | None:
    mask = model._prepare_attention_mask_for_generation(input_ids, config, {})
    try:
        return left_padding(input_ids, mask)
    except ValueError:
        raise ValueError(
            f"input_ids have the padding token {int(config._pad_token_tensor)} elsewhere than on the left: pass "
            "attention_mask, with ones where it is text"
        ) from None
