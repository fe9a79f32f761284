"""The decode engine: on CUDA one graph a token, of the forward, the logits processors and the choice of the token.

``DecodeEngine(model).generate`` takes the arguments of ``model.generate`` for greedy decoding and sampling, and gives
the same tokens; in half precision, where kernels round differently, two almost equally likely ones can change places.
transformers' ``generate`` makes the device wait for the host for 2 to 3 ms a token with a compiled forward, and for
most of some 30 ms without (docs/transformers.md). Here the host only launches a graph, one token ahead of the one it
reads.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cats_ext.decode.fingerprint import Fingerprint
from cats_ext.decode.sampling import GenerationRequest, prepare_generation
from cats_ext.decode.session import SPARE, Session
from cats_ext.decode.state import Turns, check_ids, check_ready, uncounted, unwrapped_decodable

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

_LENGTH_STEP = 256  # the cache is allocated in multiples of this many tokens: a longer one costs memory but no time


class DecodeEngine:
    """Generates tokens with ``model``, patched by ``apply_cats`` or not, one batch at a time.

    Args:
        model: a decoder-only language model of transformers, in eval mode, on one device; also inside torch.compile,
            DistributedDataParallel or PEFT, whose wrappers are left out.
        max_length: the least number of tokens, of prompt and answer together, to allocate the cache for; without it,
            what a call needs. A longer call allocates again.
        capture: whether to replay a CUDA graph; by default on CUDA. Otherwise each step calls the model.
        fused: whether a step for one sequence runs as a few fused kernels a layer (see ``decode/fused.py``) instead of
            the model's forward; by default on CUDA where the model is of a known kind. ``True`` raises where it cannot.
        compile: whether ``torch.compile`` the model's forward in the graph; for models that have no fused step.

    Raises:
        TypeError, ValueError: the model cannot be decoded this way; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int | None = None,
        capture: bool | None = None,
        fused: bool | None = None,
        compile: bool = False,
    ) -> None:
        model = unwrapped_decodable(model)
        if capture and model.device.type != "cuda":
            raise ValueError(f"capture=True needs a model on a CUDA device, got {model.device}")
        if max_length is not None and not (isinstance(max_length, Integral) and max_length >= 1):
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.model = model
        self.max_length = max_length or 0
        self.capture = capture
        self.fused = fused
        self.compile = compile
        self._session: Session | None = None
        self._fingerprint = Fingerprint(model)

    @property
    def captures(self) -> bool:
        """Whether a call now replays a graph, if the step can be captured."""
        return self.model.device.type == "cuda" if self.capture is None else self.capture

    @property
    def fused_active(self) -> bool:
        """Whether the last call ran the fused step."""
        return self._session is not None and self._session.fused

    def cache_bytes(self) -> int:
        """Bytes of the key-value cache."""
        return 0 if self._session is None else self._session.cache.nbytes()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        tokenizer: Any = None,
        reuse_prefix: bool = False,
        **options: Any,
    ) -> Tensor:
        """Continue ``input_ids`` ``[B, T]``, padded on the left where ``attention_mask`` ``[B, T]`` is 0.

        Args:
            generation_config, options: as for ``model.generate``, with the model's own defaults: ``max_new_tokens``,
                ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``, ``eos_token_id``, ...
                Sampling draws from torch's global generator of the device, in a graph once more than needed where a
                text ends before its maximum.
            streamer: gets the prompt, then each token ``[B]`` on the CPU.
            logits_processor: further processors; one that transformers does not know itself is called outside the
                graph, after each step.
            stopping_criteria: further criteria; they see token ids on the CPU and no scores.
            tokenizer: for the option ``stop_strings``.
            reuse_prefix: keep the cache of the tokens that this prompt has in common with the last call's (one
                sequence only): for conversations. Its rounding can differ from that of computing them again.

        Returns:
            ``[B, T + new]``; a sequence that ends before others is filled up with the padding token.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value, or is not supported.
        """
        device = self.model.device
        # Not in the caller's inference mode: a later call could not write the buffers made in it.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            Turns.of(self.model).running(),
        ):
            if self.model.training or device.type == "meta":
                check_ready(self.model)  # raises
            state, versions = self._fingerprint.read()
            if self._session is not None and self._session.state != state:
                self._drop_session()
            if self._session is None:
                check_ready(self.model)
            check_ids(input_ids, self.model)
            request = prepare_generation(
                self.model,
                input_ids,
                attention_mask,
                generation_config,
                logits_processor,
                stopping_criteria,
                tokenizer,
                options,
            )
            ids = input_ids.cpu()
            running = torch.ones(len(ids), dtype=torch.bool)
            session = self._prepare(input_ids.to(device), request, state, versions, reuse_prefix)
            if streamer is not None:
                streamer.put(ids)
            for token in session.tokens(request):
                if request.has_eos:
                    token = torch.where(running, token, request.pad)
                ids = torch.cat((ids, token[:, None]), dim=1)
                if streamer is not None:
                    streamer.put(token)
                running &= ~request.finished(ids)
                if not running.any():
                    break
        if streamer is not None:
            streamer.end()
        return ids.to(input_ids.device)

    def _prepare(
        self, ids: Tensor, request: GenerationRequest, state: tuple, versions: list[int], reuse: bool
    ) -> Session:
        """A session that has taken the prompt: the last call's, if it serves."""
        mask = None if request.mask is None else request.mask.to(ids.device)
        batch, padded = len(ids), mask is not None
        length = -(-(max(request.max_length, self.max_length) + SPARE) // _LENGTH_STEP) * _LENGTH_STEP
        if self._session is not None and not self._session.serves(batch, length, padded):
            self._drop_session()
        if self._session is None or (self.captures and not self._session.captured(request.selection)):
            with Turns.of(self.model).preparing(ids.device):
                if self._session is None:
                    fused = self.fused
                    if fused is None and (self.compile or not self.captures):
                        fused = False
                    with uncounted(self.model):
                        self._session = Session(self.model, batch, length, padded, state, fused, self.compile)
                if self.captures:
                    self._session.capture(request.selection)
            _, versions = self._fingerprint.read()  # the check of the fused step has set thresholds to 0 and back
        session = self._session
        session.start(ids, mask, versions, reuse and batch == 1 and not padded)
        return session

    def _drop_session(self) -> None:
        """Free its memory before another cache is allocated."""
        self._session = None
        gc.collect()  # a cache and its layers, a session and its step refer to each other
