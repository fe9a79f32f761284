"""What the decode engine requires of a model and its input, and what it restores in a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cats_ext._inputs import check_token_ids
from cats_ext.parallel.sharding import group_of
from cats_ext.patching.apply import sparse_mlps
from cats_ext.patching.wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Result = TypeVar("_Result")
_ATTENTION = ("full_attention", "sliding_attention")


def unwrapped_decodable(model: nn.Module) -> PreTrainedModel:
    """The language model in ``model``; raise unless the engine can decode it."""
    from transformers import PreTrainedModel

    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(f"the adapter {adapter.peft_type} puts tokens before the prompt: use model.generate")
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model must be a transformers model that can generate, got {type(model).__name__}")
    name, config = type(model).__name__, model.config.get_text_config()
    if group_of(model) is not None:
        raise ValueError(f"{name} is tensor-parallel, which the decode engine does not support: use model.generate")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model: the decode engine takes decoder-only models")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION))
    if other or not hasattr(config, "num_hidden_layers"):
        what = f"layers of the types {', '.join(other)}" if other else "no layers with keys and values"
        raise ValueError(f"{name} has {what}: the decode engine takes attention over all tokens or a window of them")
    check_ready(model)
    return model


def check_ready(model: nn.Module) -> None:
    """Raise unless ``model`` can run now, with all its weights where they are."""
    if model.training:
        raise ValueError(f"model of class {type(model).__name__} is in training mode: call model.eval() first")
    away = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{away} is on the meta device (offloaded?), and the decode engine needs all weights in place: use "
            "model.generate"
        )


def check_ids(ids: Tensor, model: nn.Module) -> None:
    """Raise unless ``ids`` are tokens of the model, ``[B, T]``."""
    check_token_ids("input_ids", ids, model)
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids must have shape [B, T] with at least one token, got {list(ids.shape)}")


def left_padding(ids: Tensor, mask: Tensor) -> Tensor | None:
    """The attention mask ``[B, T]`` as int64, or None if it masks nothing.

    Raises:
        TypeError, ValueError: it is no tensor, has another shape than ``ids``, or zeros elsewhere than on the left.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {list(ids.shape)}, got {list(mask.shape)}")
    kept = mask != 0
    if bool(kept.all()):
        return None
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()) or not bool(kept[:, -1].all()):
        raise ValueError("attention_mask must have its zeros on the left of each sequence, and a 1 at its end")
    return kept.long()


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        with torch.inference_mode():  # which can write any tensor, also those made in inference mode
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def uncounted(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the counts of the sparsity report afterwards."""
    return _restored([module.counts for module in sparse_mlps(model).values()])


@contextmanager
def nothing_skipped(model: nn.Module) -> Iterator[None]:
    """Set all thresholds to 0 inside, in place: rounding then cannot move a neuron over its threshold."""
    every = [(m.threshold, m.down_threshold, m.input_threshold) for m in sparse_mlps(model).values()]
    thresholds = [t for of_module in every for t in of_module if t is not None]
    with _restored(thresholds):
        with torch.inference_mode():
            for threshold in thresholds:
                threshold.zero_()
        yield


class Turns:
    """Of the engines of one model, which may run in threads and on streams of their own.

    Calls run side by side. While one prepares a session it changes thresholds and counts in place, and no other runs.
    Of all models one prepares at a time: waiting for a device fails while another thread captures a graph on it.
    An interrupt leaves no call waiting for one that has ended.
    """

    _of_models: ClassVar[WeakKeyDictionary[nn.Module, Turns]] = WeakKeyDictionary()
    _changed: ClassVar[threading.Condition] = threading.Condition()
    _preparing: ClassVar[dict[Turns, int]] = {}  # the thread that prepares, of one model

    def __init__(self) -> None:
        self._running: dict[object, int] = {}  # the thread of each call: a streamer may call another engine
        self._waiting: set[int] = set()  # threads that prepare or want to: others need not wait for their calls

    @classmethod
    def of(cls, model: nn.Module) -> Turns:
        return cls._change(lambda: cls._of_models.setdefault(model, cls()))

    def running(self) -> AbstractContextManager[None]:
        """For a call of an engine, from its first look at the model on."""
        me, call = threading.get_ident(), object()

        def begin() -> None:
            self._changed.wait_for(lambda: self._preparing.get(self, me) == me)
            self._running[call] = me

        return self._between(begin, lambda: self._running.pop(call, None))

    @contextmanager
    def preparing(self, device: torch.device) -> Iterator[None]:
        """Inside a running call: alone, and with nothing in flight on the device before and after."""
        me = threading.get_ident()

        def is_alone() -> bool:
            return {me}.issuperset(self._preparing.values()) and self._waiting.issuperset(self._running.values())

        def begin() -> None:
            self._waiting.add(me)
            self._changed.notify_all()
            self._changed.wait_for(is_alone)
            self._preparing[self] = me

        def end() -> None:
            self._waiting.discard(me)
            if self._preparing.get(self) == me:
                del self._preparing[self]

        with self._between(begin, end):
            _wait_for(device)
            yield
            _wait_for(device)

    @classmethod
    @contextmanager
    def _between(cls, begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
        """Change the state by ``begin``, and undo by ``end`` what that has come to; ``end`` may be called again."""
        try:
            try:
                cls._change(begin)
                yield
            finally:
                cls._change(end)
        finally:  # of an interrupt in or right before the first one
            cls._change(end)

    @classmethod
    def _change(cls, action: Callable[[], _Result]) -> _Result:
        """Call ``action`` with the lock. No ``with``: an interrupt at its end would leave it locked."""

        def release() -> None:
            with suppress(RuntimeError):  # not locked by this thread
                cls._changed.release()

        try:
            try:
                cls._changed.acquire()
                result = action()
                cls._changed.notify_all()
                return result
            finally:
                release()
        finally:
            release()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    differences = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))
