"""From logits to tokens, with transformers' own processors, and the text's end, with its own stopping criteria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Processors that only compute on the scores, with the same kernels at every length: they can be captured.
_SCORES_ONLY = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.LogitNormalization,
    processors.InfNanRemoveLogitsProcessor,
)
# Options of generate that change how tokens are searched for or what comes back: name and the value that is off.
_REFUSED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "guidance_scale": None,
    "return_dict_in_generate": False,
    "token_healing": False,
    "watermarking_config": None,
}


@dataclass
class Selection:
    """How the next token is chosen: ``(ids [B, T], logits [B, V]) -> [B]``.

    ``graph_key`` is None if the processors have to see exactly the tokens so far; otherwise the choice can be captured,
    with ids whose unfilled places repeat the first token, and equal keys mean equal choices.
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
    if type(processor) is processors.RepetitionPenaltyLogitsProcessor:  # a set of tokens: repeats do not count
        return getattr(processor, "prompt_ignore_length", None) is None
    return type(processor) in _SCORES_ONLY


@dataclass
class Plan:
    """One call of ``generate``, prepared."""

    config: GenerationConfig
    selection: Selection
    finished: Callable[[Tensor], Tensor]  # ids on the CPU [B, T] -> bool [B]
    has_eos: bool
    pad: int
    max_length: int


def plan(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    tokenizer: Any,
    options: dict[str, Any],
) -> Plan:
    """Read the options as ``model.generate`` does.

    Raises:
        ValueError: an option that the engine does not know or does not support.
    """
    config, unknown = model._prepare_generation_config(generation_config, **options)
    # transformers puts what the model's forward may take here
    unknown = {k: v for k, v in unknown.items() if k in options}
    if unknown:
        raise ValueError(f"the decode engine does not know {', '.join(f'{k}={v!r}' for k, v in unknown.items())}")
    for name, off in _REFUSED.items():
        if (value := getattr(config, name, off)) not in (off, None) and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"the decode engine does not support {name}={value!r}: use model.generate")
    length = input_ids.shape[1]
    if config.max_new_tokens is not None:
        config.max_length = length + config.max_new_tokens
    elif options.get("max_length") is None and getattr(generation_config, "max_length", None) is None:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        config.max_length = length + (20 if config.max_length is None else config.max_length)  # as generate does
        config.max_length = config.max_length if longest is None else min(config.max_length, longest)
    if config.min_new_tokens is not None:
        config.min_length = length + config.min_new_tokens
    if config.max_length <= length:
        raise ValueError(f"max_length must exceed the prompt's {length} tokens, got {config.max_length}")
    _check_sampling(config)

    model._prepare_special_tokens(config, True, device=input_ids.device)
    prepared = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=length,
        encoder_input_ids=input_ids,
        logits_processor=logits_processor if logits_processor is not None else LogitsProcessorList(),
        device=input_ids.device,
        model_kwargs={},
    )
    model._prepare_special_tokens(config, True, device="cpu")  # the end is looked for on the CPU
    criteria = model._get_stopping_criteria(
        generation_config=config,
        stopping_criteria=stopping_criteria if stopping_criteria is not None else StoppingCriteriaList(),
        tokenizer=tokenizer,
    )
    return Plan(
        config=config,
        selection=Selection(prepared, bool(config.do_sample)),
        finished=lambda ids: criteria(ids, None),
        has_eos=config._eos_token_tensor is not None,
        pad=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
        max_length=config.max_length,
    )


def _check_sampling(config: GenerationConfig) -> None:
    """What transformers would find only after the prompt has been computed, or not at all."""
    if config.do_sample and config.temperature is not None and not config.temperature > 0:
        raise ValueError(f"temperature must be above 0 to sample, got {config.temperature} (do_sample=False is greedy)")
