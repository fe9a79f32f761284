"""The decode engine: on CUDA one graph a token, of the forward, the logits processors and the choice of the token.

``DecodeEngine(model).generate`` takes what ``model.generate`` takes for greedy decoding and sampling, and gives the
same tokens; in half precision, where kernels round differently, two almost equally likely ones can change places.
transformers' ``generate`` waits for the host for 2 to 3 ms a token with a compiled forward and for most of some 30 ms
without (docs/transformers.md); here the host only launches a graph, one token ahead of the one it reads.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cats_ext.decode.cache import DecodeCache
from cats_ext.decode.fused import FusedStep, NotFusableError
from cats_ext.decode.sampling import Plan, Selection, plan
from cats_ext.decode.state import (
    check_ids,
    check_ready,
    common_prefix,
    fingerprint,
    nothing_skipped,
    uncounted,
    unwrapped_decodable,
)
from cats_ext.patching.apply import sparse_mlps

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

_LENGTH_STEP = 256  # the cache is allocated in multiples of this; how long it is costs memory but no time
_SPARE = 2  # places at its end that only warming up writes
_MANY = 200  # tokens before the one on which a fused step is compared with the model
_MAX_GRAPHS = 4  # kept at a time, one for each way of choosing tokens


class DecodeEngine:
    """Generates tokens with ``model``, patched by ``apply_cats`` or not, one batch at a time.

    Args:
        model: a decoder-only language model of transformers, in eval mode, on one device; also inside torch.compile,
            DistributedDataParallel or PEFT, whose wrappers are left out.
        max_length: tokens of prompt and answer to allocate the cache for at least; without it, what a call needs. A
            longer call allocates again.
        capture: whether to replay a CUDA graph; by default on CUDA. Otherwise each step calls the model.
        fused: whether a step for one sequence runs as a few fused kernels a layer (see ``decode_fused.py``) instead of
            the model's forward; by default on CUDA where the model is of a known kind. ``True`` raises where it cannot.
        compile: whether ``torch.compile`` the model's forward in the graph; for models that have no fused step.

    Raises:
        ValueError: the model cannot be decoded this way; the message says why.
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
        self._session: _Session | None = None

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
        # Not in the caller's inference mode: a later call could not write the buffers made in it.
        with torch.inference_mode(False), torch.no_grad():
            return self._generate(
                input_ids,
                attention_mask,
                (generation_config, logits_processor, stopping_criteria, tokenizer, options),
                streamer,
                reuse_prefix,
            )

    def _generate(
        self, input_ids: Tensor, attention_mask: Tensor | None, how: tuple, streamer: BaseStreamer | None, reuse: bool
    ) -> Tensor:
        check_ready(self.model)
        check_ids(input_ids, self.model)
        prepared = plan(self.model, input_ids, attention_mask, *how)
        device = self.model.device
        ids = input_ids.cpu()
        running = torch.ones(len(ids), dtype=torch.bool)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            session = self._prepare(input_ids.to(device), prepared, reuse)
            if streamer is not None:
                streamer.put(ids)
            for token in session.tokens(prepared):
                if prepared.has_eos:
                    token = torch.where(running, token, prepared.pad)
                ids = torch.cat((ids, token[:, None]), dim=1)
                if streamer is not None:
                    streamer.put(token)
                running &= ~prepared.finished(ids)
                if not running.any():
                    break
        if streamer is not None:
            streamer.end()
        return ids.to(input_ids.device)

    def _prepare(self, ids: Tensor, plan: Plan, reuse: bool) -> _Session:
        mask = None if plan.mask is None else plan.mask.to(ids.device)
        length = -(-(max(plan.max_length, self.max_length) + _SPARE) // _LENGTH_STEP) * _LENGTH_STEP
        session, (state, contents) = self._session, fingerprint(self.model)
        if session is None or not session.serves(len(ids), length, mask is not None, state):
            if session is not None:  # its memory is freed before the new cache is allocated
                self._session = session = None
                gc.collect()  # a cache and its layers, a session and its step refer to each other
            with uncounted(self.model):
                session = _Session(self, len(ids), length, mask is not None, state)
            self._session = session
            _, contents = fingerprint(self.model)  # its check has set thresholds to 0 and back
        if self.captures:
            with uncounted(self.model):
                session.capture(plan.selection)
        session.start(ids, mask, contents, reuse and len(ids) == 1 and mask is None)
        return session


class _Session:
    """A cache, the buffers of a step, and its graphs, for one batch size and length."""

    def __init__(self, engine: DecodeEngine, batch: int, length: int, padded: bool, state: tuple) -> None:
        self.model = engine.model
        self.batch, self.length, self.padded, self.state = batch, length, padded, state
        device = self.model.device
        self.graph: torch.cuda.CUDAGraph | None = None  # of this call
        self.cache = DecodeCache(self.model.config.get_text_config().num_hidden_layers, length)
        self.ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.mask = torch.ones(batch, length, dtype=torch.int64, device=device) if padded else None
        self.padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # pads before each sequence
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.known: list[int] = []  # the tokens whose keys and values are in the cache, of one sequence
        self.contents: tuple[int, ...] = ()  # of the model, with which they were computed
        self.prompt_length = 0
        self._graphs: dict[tuple | None, torch.cuda.CUDAGraph] | None = {}  # None: it cannot be captured
        self._parameters = inspect.signature(self.model.forward).parameters
        self._step = torch.compile(self._model_step, dynamic=False) if engine.compile else self._model_step
        self._fused_step: FusedStep | None = None
        wanted = engine.fused if engine.fused is not None else engine.captures and not engine.compile
        if wanted:
            self._try_fused(required=engine.fused is True)

    def _try_fused(self, required: bool) -> None:
        try:
            if self.batch > 1 or self.padded:
                raise NotFusableError("it takes one sequence without padding")
            # Allocates the cache in the shapes and dtype that the model itself asks for.
            self._forward(self.token[:, None], 0)
            layers = self.cache.layers
            fused = FusedStep(self.model, [layer.keys[0] for layer in layers], [layer.values[0] for layer in layers])
            with nothing_skipped(self.model):
                self._check_against_model(fused)
        except Exception as error:  # a kernel may also fail to compile for a new GPU or Triton
            if required:
                raise ValueError(f"fused=True: the model cannot run the fused step: {error}") from error
            if not isinstance(error, NotFusableError):
                warnings.warn(f"the fused step failed, and the model's own forward serves: {error}", stacklevel=4)
            self.cache.length = 0
            return
        self._fused_step = fused
        self._step = lambda: fused(self.token, self.position)[None]

    @property
    def fused(self) -> bool:
        return self._fused_step is not None

    def _check_against_model(self, fused: FusedStep) -> None:
        """Compare both on one token after few and after many, in places of the cache that are overwritten later.

        Many are as many as several programs of the attention kernel share. The model too takes the token alone, since
        prompts can be set to run densely.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.length
        many = min(self.length, longest) - _SPARE
        ids = torch.linspace(0, vocabulary - 1, many, device=self.token.device).long()
        for count in (4, min(many - 1, _MANY)):
            self._forward(ids[None, :count], 0)
            self.cache.length = count
            expected = self._forward(ids[None, count : count + 1], count)[0].float()
            self.cache.length = 0
            got = fused(ids[count : count + 1], self.position + count).float()
            tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
            error = float((got - expected).norm() / expected.norm())
            if not error <= tolerance:
                raise RuntimeError(f"its logits after {count} tokens differ from the model's by {error:.1e}")

    def serves(self, batch: int, length: int, padded: bool, state: tuple) -> bool:
        same = (self.batch, self.padded, self.state) == (batch, padded, state)
        return same and self.length >= length and not (self._fused_step is not None and self._fused_step.outdated)

    def start(self, ids: Tensor, mask: Tensor | None, contents: tuple[int, ...], reuse: bool) -> None:
        count = ids.shape[1]
        self.prompt = ids
        self.prompt_length = count
        self.ids[:] = ids[:, :1]  # a token that is in the text anyway, see Selection.graph_key
        self.ids[:, :count] = ids
        if mask is not None:
            self.mask[:, :count] = mask
            self.padding[:, 0] = (mask == 0).sum(1)
        kept = common_prefix(self.known, ids[0].tolist()) if reuse and contents == self.contents else 0
        self.contents = contents
        self.cache.length = min(kept, count - 1)
        self.known = self.known[: self.cache.length]

    # --- steps ------------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, start: int | Tensor) -> Tensor:
        """Logits ``[B, V]`` after ``ids`` ``[B, T]``, whose first place in the cache is ``start``."""
        count = ids.shape[1]
        positions = start + torch.arange(count, device=ids.device)
        options: dict[str, Any] = {}
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        if "cache_position" in self._parameters:  # transformers 5.0
            options["cache_position"] = positions
        if self.mask is not None:
            options["attention_mask"] = self.mask if isinstance(start, Tensor) else self.mask[:, : start + count]
        output = self.model(
            input_ids=ids,
            position_ids=(positions[None] - self.padding).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        return output.logits[:, -1]

    def prefill(self) -> Tensor:
        done = self.cache.length
        logits = self._forward(self.prompt[:, done:], done)
        self.cache.length = self.prompt_length
        return logits

    def _model_step(self) -> Tensor:
        self.cache.position = self.position
        try:
            return self._forward(self.token[:, None], self.position)
        finally:
            self.cache.position = None

    def _advance(self, selection: Selection, captured_choice: bool) -> None:
        """One step, in place: the token at ``position`` goes in, the next comes out, or its logits."""
        logits = self._step()
        self.position.add_(1)
        if captured_choice:
            self.token.copy_(selection(self.ids, logits))
            if selection.needs_ids:
                self.ids.index_copy_(1, self.position, self.token[:, None])
        else:
            if self.logits is None:
                self.logits = torch.empty_like(logits)
            self.logits.copy_(logits)

    def capture(self, selection: Selection) -> None:
        """Have a graph for ``selection``, if the step can be captured."""
        self.graph = None
        if self._graphs is not None:
            try:
                self.graph = self._graph(selection)
            except Exception as error:
                self._graphs = None
                warnings.warn(f"the decode step cannot be captured and runs without a graph: {error}", stacklevel=4)

    def _graph(self, selection: Selection) -> torch.cuda.CUDAGraph:
        key = selection.graph_key
        if key in self._graphs:
            return self._graphs[key]
        if len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        device = self.model.device
        random_state = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and allocates workspaces
                self.position.fill_(self.length - _SPARE)
                self._advance(selection, key is not None)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._advance(selection, key is not None)
        torch.cuda.set_rng_state(random_state, device)
        self._graphs[key] = graph
        return graph

    # --- loops ------------------------------------------------------------------------------------------------------

    def tokens(self, plan: Plan) -> Iterator[Tensor]:
        """The next tokens ``[B]`` on the CPU, up to the maximum length; the caller may stop before."""
        return self._plain_tokens(plan) if self.graph is None else self._captured_tokens(plan)

    def _plain_tokens(self, plan: Plan) -> Iterator[Tensor]:
        token = plan.selection(self.prompt, self.prefill())
        ids = torch.cat((self.prompt, token[:, None]), dim=1)
        while True:
            self.known = ids[0, :-1].tolist()
            yield token.cpu()
            if ids.shape[1] == plan.max_length:
                return
            logits = self._forward(token[:, None], self.cache.length)
            self.cache.length += 1
            token = plan.selection(ids, logits)
            ids = torch.cat((ids, token[:, None]), dim=1)

    def _captured_tokens(self, plan: Plan) -> Iterator[Tensor]:
        self.token.copy_(plan.selection(self.prompt, self.prefill()))
        self.position.fill_(self.prompt_length)
        self.ids[:, self.prompt_length] = self.token
        self.known = self.prompt[0].tolist()
        arrived = self._send()
        # The device works on the next token while the host reads this one. Where sparsity is tracked it does not: a
        # step after the end of the text would be counted.
        ahead = not any(module.forward_settings.tracking for module in sparse_mlps(self.model).values())
        for end in range(self.prompt_length + 1, plan.max_length + 1):  # tokens in all, with the one that has arrived
            host, event = arrived
            more = end < plan.max_length
            if more and ahead:
                arrived = self._next(plan, end)
            event.synchronize()
            yield host
            self.known.append(int(host[0]))
            if more and not ahead:
                arrived = self._next(plan, end)

    def _next(self, plan: Plan, end: int) -> tuple[Tensor, torch.cuda.Event]:
        """Put the token at place ``end`` on its way."""
        self.graph.replay()
        if plan.selection.graph_key is None:
            self.token.copy_(plan.selection(self.ids[:, :end], self.logits))
            self.ids[:, end] = self.token
        return self._send()

    def _send(self) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty(self.batch, dtype=torch.int64, pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
