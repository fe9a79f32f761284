"""The second moments of what linear layers get, from a model's run over text: what error compensation goes by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from cats_ext._inputs import batches_of, evaluation_mode, hooked, input_device
from cats_ext._progress import progress_bar

MEMORY = 4 << 30  # bytes of moments that are kept at a time; the model runs over all of the text for each part


class Moments:
    """``x x^T`` summed over the tokens of a run, for some layers. Layers with the same input share it.

    Args:
        linears: by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._name_of: dict[str, str] = {}  # under which a layer's sum is
        self._last: tuple[Tensor | None, str] = (None, "")

    def _see(self, name: str, x: Tensor) -> None:
        if x is self._last[0]:
            self._name_of[name] = self._last[1]
            return
        self._last, self._name_of[name] = (x, name), name
        x = x.reshape(-1, x.shape[-1]).float()
        if name not in self._sums:
            self._sums[name] = x.new_zeros(x.shape[1], x.shape[1])
        self._sums[name].addmm_(x.t(), x)

    def run(self, model: nn.Module, windows: list[Tensor], batch_size: int, progress: bool) -> None:
        """Run ``model`` over windows of token ids, ``[T]`` each."""
        backbone = model.base_model if hasattr(model, "base_model_prefix") else model
        options = {"use_cache": False} if hasattr(model, "base_model_prefix") else {}
        batches = batches_of(windows, batch_size)
        hooks = {
            linear: lambda module, args, name=name: self._see(name, args[0]) for name, linear in self._linears.items()
        }
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            advance = stack.enter_context(progress_bar("inputs of the layers", len(batches), progress))
            stack.enter_context(hooked(nn.Module.register_forward_pre_hook, hooks))
            for batch in batches:
                backbone(input_ids=batch.to(input_device(model)), **options)
                self._last = (None, "")
                advance()

    def of(self, name: str) -> Tensor:
        """The moment of a layer. Raises ``ValueError`` if no token reached it, or values that are not finite."""
        if name not in self._name_of:
            raise ValueError("no token of data reaches it")
        moment = self._sums[self._name_of[name]]
        if not moment.isfinite().all():
            raise ValueError("its inputs from data have values that are NaN or infinite")
        return moment


def parts_by_memory(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """``linears`` in their order, as many together as moments fit into ``MEMORY``; one at least."""
    part: dict[str, nn.Linear] = {}
    size = 0
    for name, linear in linears.items():
        own = 4 * linear.in_features**2
        if part and size + own > MEMORY:
            yield part
            part, size = {}, 0
        part[name] = linear
        size += own
    if part:
        yield part
