"""The cache, buffers and captured steps of the decode engine for one batch size and length.

On CUDA a step is captured once in a graph: the forward, the choice of the next token and the advance of the position.
Everything a graph reads or writes stays at its address as long as the session lives.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cats_ext.decode.cache import DecodeCache, cache_argument
from cats_ext.decode.fused import FusedStep, NotFusableError, check_fusable
from cats_ext.decode.sampling import GenerationRequest, Selection
from cats_ext.decode.state import common_prefix, nothing_skipped, uncounted
from cats_ext.patching.apply import sparse_mlps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 2  # tokens at the end of the cache that no text fills: warming up writes there
_MAX_GRAPHS = 4  # graphs kept at a time, one for each way of choosing tokens; the oldest goes first
# Tokens in the cache when a fused step is compared with the model: few, and enough that several programs of the
# attention kernel have keys.
_COMPARED_AFTER = (4, 200)
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1  # of the relative difference of the logits, in float32 and in half precision


@contextmanager
def _capture(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None
) -> Iterator[None]:
    """What runs inside is captured in ``graph``. Other threads may allocate meanwhile.

    A process's first graph allocates two numbers for torch's random generator. A graph that does not get them ends the
    process when it is freed (torch 2.10 to 2.13: its destructor raises), so without memory for them it is not begun.
    """
    with torch.cuda.stream(stream):  # torch.cuda.graph stays on the stream if the end of the capture fails
        torch.empty(1024, dtype=torch.uint8, device=stream.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield


class Session:
    """Runs the forwards of one call at a time.

    Args:
        model: see ``DecodeEngine``.
        batch, length: sequences, and tokens of each that the cache holds.
        padded: whether sequences can have padding on the left.
        state: of the model, from ``Fingerprint.read``; kept for comparison.
        fused: whether to take the fused step; None takes it where it can run.
        compile: whether to compile the model's forward in a step.

    Raises:
        ValueError: ``fused`` is True and the fused step cannot run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        length: int,
        padded: bool,
        state: tuple,
        fused: bool | None,
        compile: bool,
    ) -> None:
        self.model = model
        self.batch, self.length, self.padded, self.state = batch, length, padded, state
        device = model.device
        self.graph: torch.cuda.CUDAGraph | None = None  # of this call
        self.cache = DecodeCache(model.config.get_text_config().num_hidden_layers, length)
        self.ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.mask = torch.ones(batch, length, dtype=torch.int64, device=device) if padded else None
        self.padding = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # padding tokens before each sequence
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.known: list[int] = []  # the tokens whose keys and values are in the cache, for one sequence
        self.versions: list[int] = []  # of the model, when they were computed
        self.prompt_length = 0
        # While sparsity is tracked no step is launched ahead: one after the end of the text would be counted.
        self._launches_ahead = not any(module.forward_settings.tracking for module in sparse_mlps(model).values())
        self._graphs: dict[tuple | None, torch.cuda.CUDAGraph] | None = {}  # None if the step cannot be captured
        self._parameters = inspect.signature(model.forward).parameters
        self._cache_argument = cache_argument(model)
        self._compiles = compile
        self._helps = False  # see capture
        self._step = torch.compile(self._model_step, dynamic=False) if compile else self._model_step
        self._fused_step: FusedStep | None = None
        if fused is not False:
            self._try_fused(required=fused is True)

    def _try_fused(self, required: bool) -> None:
        try:
            if self.batch > 1 or self.padded:
                raise NotFusableError("it takes one sequence without padding")
            check_fusable(self.model)
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
                warnings.warn(f"the fused step failed, and the model's own forward serves: {error}", stacklevel=5)
            self.cache.length = 0
            return
        self._fused_step = fused
        self._step = lambda: fused(self.token, self.position)[None]

    @property
    def fused(self) -> bool:
        return self._fused_step is not None

    def _check_against_model(self, fused: FusedStep) -> None:
        """Raise unless both give the same logits, up to rounding.

        Both get one token at a time, since prompts can be set to run densely. The places of the cache that this writes
        are written again before they are read.
        """
        vocabulary = self.model.get_input_embeddings().num_embeddings
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.length
        most = min(self.length, longest) - SPARE
        ids = torch.linspace(0, vocabulary - 1, most, device=self.token.device).long()
        few, many = _COMPARED_AFTER
        for count in (few, min(many, most - 1)):
            self._forward(ids[None, :count], 0)
            self.cache.length = count
            expected = self._forward(ids[None, count : count + 1], count)[0].float()
            self.cache.length = 0
            got = fused(ids[count : count + 1], self.position + count).float()
            tolerance = _TOLERANCE if self.model.dtype == torch.float32 else _HALF_TOLERANCE
            error = float((got - expected).norm() / expected.norm())
            if not error <= tolerance:  # nor NaN
                raise RuntimeError(f"its logits after {count} tokens differ from the model's by {error:.1e}")

    def serves(self, batch: int, length: int, padded: bool) -> bool:
        """Whether a call of this size can run here, if the model is the same."""
        outdated = self._fused_step is not None and self._fused_step.outdated
        return (self.batch, self.padded) == (batch, padded) and self.length >= length and not outdated

    def start(self, ids: Tensor, mask: Tensor | None, versions: list[int], reuse: bool) -> None:
        """Take a prompt ``[B, T]``; with ``reuse``, keep the part of the cache that holds its first tokens."""
        count = ids.shape[1]
        self.prompt = ids
        self.prompt_length = count
        self.ids[:] = ids[:, :1]  # unfilled places repeat a token of the text, see Selection.graph_key
        self.ids[:, :count] = ids
        if mask is not None:
            self.mask[:, :count] = mask
            self.padding[:, 0] = (mask == 0).sum(1)
        kept = common_prefix(self.known, ids[0].tolist()) if reuse and versions == self.versions else 0
        self.versions = versions
        self.cache.length = min(kept, count - 1)
        self.known = self.known[: self.cache.length]

    # --- steps ------------------------------------------------------------------------------------------------------

    def _forward(self, ids: Tensor, start: int | Tensor) -> Tensor:
        """Logits ``[B, V]`` after ``ids`` ``[B, T]``, whose first place in the cache is ``start``."""
        count = ids.shape[1]
        positions = start + torch.arange(count, device=ids.device)
        options: dict[str, Any] = {self._cache_argument: self.cache}
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        if "cache_position" in self._parameters:  # transformers 5.0
            options["cache_position"] = positions
        in_step = isinstance(start, Tensor)
        if self.mask is not None:
            options["attention_mask"] = self.mask if in_step else self.mask[:, : start + count]
        elif in_step and self._helps:
            options["attention_mask"] = ids.new_ones(()).expand(self.batch, self.length)
        positions = (positions[None] - self.padding).clamp(min=0)
        return self.model(input_ids=ids, position_ids=positions, use_cache=True, **options).logits[:, -1]

    def prefill(self) -> Tensor:
        """Logits ``[B, V]`` after the prompt."""
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
        """One step, in place: reads ``token`` at ``position``, writes the next token or, for a later choice, logits."""
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

    def captured(self, selection: Selection) -> bool:
        """Set ``graph`` for this selection, if it is known; whether there is nothing to :meth:`capture`."""
        self.graph = None if self._graphs is None else self._graphs.get(selection.graph_key)
        return self.graph is not None or self._graphs is None

    def capture(self, selection: Selection) -> None:
        """Set ``graph`` for this selection; None, with a warning, if the step cannot be captured.

        It is tried a second time with help against what some models do in each step: they make a mask as long as the
        text, which a step does not know on the host (OPT), and copy numbers from the host (Gemma 3n, before
        transformers 5.23). Then a mask of the whole cache is given, and such numbers become constants of the graph.
        """
        self.graph = None
        if self._graphs is None:
            return
        try:
            try:
                self.graph = self._graph(selection)
            except Exception:
                if self._helps or self.fused:
                    raise
                self._helps = True
                self.graph = self._graph(selection)
        except Exception as error:
            self._graphs = None
            warnings.warn(f"the decode step cannot be captured and runs without a graph: {error}", stacklevel=4)

    def _help(self) -> AbstractContextManager:
        return HostNumbers(self.model.device) if self._helps and not self._compiles else nullcontext()

    def _graph(self, selection: Selection) -> torch.cuda.CUDAGraph:
        key = selection.graph_key
        if len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)))
        device = self.model.device
        random_state = torch.cuda.get_rng_state(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        warm = False
        try:
            with uncounted(self.model), self._help():
                with torch.cuda.stream(stream):
                    for _ in range(2):  # compiles kernels and allocates workspaces
                        self.position.fill_(self.length - SPARE)
                        self._advance(selection, key is not None)
                torch.cuda.current_stream(device).wait_stream(stream)
                warm = True
                graph = torch.cuda.CUDAGraph()
                pool = next(iter(self._graphs.values())).pool() if self._graphs else None
                with _capture(graph, stream, pool):
                    self._advance(selection, key is not None)
        except BaseException:
            if warm:
                with suppress(Exception):  # the first error says more
                    _leave_capture_mode(self.position)
            raise
        finally:
            torch.cuda.set_rng_state(random_state, device)
        self._graphs[key] = graph
        return graph

    # --- loops ------------------------------------------------------------------------------------------------------

    def tokens(self, request: GenerationRequest) -> Iterator[Tensor]:
        """The next tokens ``[B]`` on the CPU, up to the maximum length; the caller may stop before."""
        return self._plain_tokens(request) if self.graph is None else self._captured_tokens(request)

    def _plain_tokens(self, request: GenerationRequest) -> Iterator[Tensor]:
        token = request.selection(self.prompt, self.prefill())
        ids = torch.cat((self.prompt, token[:, None]), dim=1)
        while True:
            self.known = ids[0, :-1].tolist()
            yield token.cpu()
            if ids.shape[1] == request.max_length:
                return
            logits = self._forward(token[:, None], self.cache.length)
            self.cache.length += 1
            token = request.selection(ids, logits)
            ids = torch.cat((ids, token[:, None]), dim=1)

    def _captured_tokens(self, request: GenerationRequest) -> Iterator[Tensor]:
        self.token.copy_(request.selection(self.prompt, self.prefill()))
        self.position.fill_(self.prompt_length)
        self.ids[:, self.prompt_length] = self.token
        self.known = self.prompt[0].tolist()
        arrived = self._send()
        for end in range(self.prompt_length + 1, request.max_length + 1):  # tokens up to the one that has arrived
            host, event = arrived
            more = end < request.max_length
            if more and self._launches_ahead:  # the device computes a token while the host reads the one before
                arrived = self._next(request, end)
            event.synchronize()
            yield host
            self.known.append(int(host[0]))
            if more and not self._launches_ahead:
                arrived = self._next(request, end)

    def _next(self, request: GenerationRequest, end: int) -> tuple[Tensor, torch.cuda.Event]:
        """Launch the step for the token at place ``end`` and its copy to the host."""
        self.graph.replay()
        if request.selection.graph_key is None:
            self.token.copy_(request.selection(self.ids[:, :end], self.logits))
            self.ids[:, end] = self.token
        return self._send()

    def _send(self) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty(self.batch, dtype=torch.int64, pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event


class HostNumbers(TorchFunctionMode):
    """While it is active, numbers that a model copies to ``device`` are written there, not copied: graphs take that."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and isinstance(args[0], bool | int | float):
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type == self.device.type:
                return torch.full((), args[0], dtype=kwargs.get("dtype") or torch.tensor(args[0]).dtype, device=device)
        if function is Tensor.to and args[0].dim() == 0 and args[0].device.type == "cpu" != self.device.type:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == self.device.type:
                return torch.full((), args[0].item(), dtype=dtype or args[0].dtype, device=device)
        return function(*args, **kwargs)


def _leave_capture_mode(buffer: Tensor) -> None:
    """After a failed capture: torch's random generator refuses to draw until the next capture has ended well.

    ``buffer`` is on the capture's device, and nothing in it changes.
    """
    with _capture(torch.cuda.CUDAGraph(), torch.cuda.Stream(buffer.device)):
        buffer.zero_()
