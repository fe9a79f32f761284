"""The passes of a calibration in their order: what each of them counts in every layer, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from cats_ext._inputs import batches_of
from cats_ext._progress import duration, note
from cats_ext.calibration.accumulator import LayerAccumulator
from cats_ext.calibration.checkpoint import Checkpoint
from cats_ext.calibration.passes import run_gradient_pass, run_pass
from cats_ext.calibration.search import CHECK_TOKENS
from cats_ext.calibration.settings import CalibrationSettings
from cats_ext.data.windows import sample_windows
from cats_ext.patching.detection import GatedMLP
from cats_ext.thresholds.allocation import search_options
from cats_ext.thresholds.histogram import Histogram
from cats_ext.thresholds.rules import has_down_threshold, has_input_threshold

_GRADIENT_TOKENS = 16384  # of the passes with gradients, in whole windows from all parts of the data
_SAMPLE_TOKENS = 2048  # likewise, on which the bins of the joint histogram are chosen
_GRADIENT_COST = 4  # of a token with gradients, in tokens without (measured on two CPU cores: 3.6)
_TRIAL_TOKENS = 256  # of the first window, on which the time is estimated


@dataclass(frozen=True)
class _Pass:
    """One pass over the data or a part of it."""

    observe: Callable[..., None]  # gets an MLP and its activations
    batches: list[Tensor]
    finish: Callable[[LayerAccumulator], None] = lambda layer: None  # of every layer, after the pass
    gradient: bool = False
    inputs: bool = False  # are observed too


def count_activations(
    model: nn.Module,
    layers: dict[str, LayerAccumulator],
    windows: list[Tensor],
    settings: CalibrationSettings,
    checkpoint: Checkpoint,
    progress: bool,
) -> None:
    """Run all passes, from the place that ``checkpoint`` has reached, and count into ``layers``.

    Args:
        model: dense.
        layers: by name of the MLP, in the model's order.
        windows: token ids, ``[T]`` each.
        settings: for this model.
        progress: show about how long it takes, and a bar a pass, on standard error.

    Raises:
        ValueError: activations of a layer are NaN, infinite or all zero, or no token reached it.
    """
    mlps = [layer.mlp for layer in layers.values()]
    passes = _passes(layers, windows, settings)
    if progress and checkpoint.step < len(passes):
        todo = [(this.gradient, this.batches) for this in passes[checkpoint.step :]]
        todo[0] = (todo[0][0], todo[0][1][checkpoint.batch :])
        work = sum((_GRADIENT_COST if gradient else 1) * sum(map(Tensor.numel, some)) for gradient, some in todo)
        work += 4 * CHECK_TOKENS * (settings.allocation == "search")  # two models, dense and sparse, each measured
        about = f"{len(passes)} pass{'es' * (len(passes) > 1)}: "
        about += f"about {duration(work * _seconds_a_token(model, mlps, windows[0]))}"
        note(f"calibration on {sum(map(len, windows)):,} tokens in {about}")
    for number in range(checkpoint.step, len(passes)):
        this = passes[number]
        title = f"calibration, pass {number + 1} of {len(passes)}" if len(passes) > 1 else "calibration"
        start = checkpoint.batch if number == checkpoint.step else 0
        run = partial(run_gradient_pass, seed=settings.seed) if this.gradient else partial(run_pass, inputs=this.inputs)
        after = partial(checkpoint.save, number)
        run(model, mlps, this.batches, this.observe, title=title, progress=progress, start=start, after=after)
        for layer in layers.values():
            this.finish(layer)
    if checkpoint.step < len(passes):
        checkpoint.write(len(passes), 0)


def _seconds_a_token(model: nn.Module, mlps: list[GatedMLP], window: Tensor) -> float:
    """Of a pass without gradients, from the second of two short ones, whose counts are not kept."""
    tokens = window[None, :_TRIAL_TOKENS]
    for _ in range(2):
        started = time.monotonic()
        run_pass(model, mlps, [tokens], lambda mlp, gate, up: Histogram(device=gate.device).add(gate))
    return (time.monotonic() - started) / tokens.numel()


def _passes(layers: dict[str, LayerAccumulator], windows: list[Tensor], settings: CalibrationSettings) -> list[_Pass]:
    def each(method: Callable[..., None]) -> Callable[..., None]:
        return lambda mlp, *activations: method(layers[mlp.name], *activations)

    batches, sample = (
        batches_of(some, settings.batch_size) for some in (windows, sample_windows(windows, _SAMPLE_TOKENS))
    )
    single = [window[None] for window in sample_windows(windows, _GRADIENT_TOKENS)]  # gradients need the memory
    passes = []
    if settings.importance == "gradient":
        passes.append(_Pass(each(LayerAccumulator.add_gradient), single, LayerAccumulator.finish_weights, True))
    elif settings.gate_power or settings.last_gate_power:
        passes.append(_Pass(each(LayerAccumulator.add_up), batches, LayerAccumulator.finish_weights))
    count = each(LayerAccumulator.add_activations)
    if has_down_threshold(settings.rule):
        passes.append(_Pass(count, sample, LayerAccumulator.finish_sample))
    inputs = has_input_threshold(settings.rule)
    if inputs:
        count = each(LayerAccumulator.add_inputs_and_activations)
    passes.append(_Pass(count, batches, LayerAccumulator.finish_activations, inputs=inputs))
    if settings.allocation == "search":
        cuts: dict[str, list[tuple[float, float]]] = {}

        def add_losses(mlp: GatedMLP, *activations: Tensor) -> None:
            if mlp.name not in cuts:
                statistics = layers[mlp.name].statistics()
                cuts[mlp.name] = [statistics.cuts(*option) for option in search_options(settings.rule)]
            layers[mlp.name].add_losses(*activations, cuts[mlp.name])

        passes.append(_Pass(add_losses, single, gradient=True))
    return passes
