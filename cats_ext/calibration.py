"""calibrate: runs text through a dense model and sets each MLP's thresholds to quantiles of what it sees.

Activations are counted into histograms as they come (see histogram.py) and never kept. Every pass runs the dense
model, so that each layer's thresholds are set on the inputs of the model as it was trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext._run import check_token_ids, evaluation_mode, input_device, progress_bar
from cats_ext._version import __version__
from cats_ext.calibration_data import collect_windows
from cats_ext.config import CatsConfig, LayerConfig, thresholds_of
from cats_ext.detection import MERGED, SEPARATE, GatedMLP
from cats_ext.histogram import Histogram
from cats_ext.patching import find_dense_mlps
from cats_ext.reference import ACTIVATIONS
from cats_ext.rules import sparsity_split
from cats_ext.statistics import JointHistogram, LayerStatistics

_CHUNK = 1 << 22  # activations looked at together: bounds the temporaries to tens of MB


def calibrate(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    sparsity: float = 0.5,
    rule: str = "plain",
    down_sparsity: float | None = None,
    weighted_gate: bool = False,
    max_tokens: int = 32768,
    sequence_length: int = 1024,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> CatsConfig:
    """Find the thresholds at which the gated MLPs of ``model`` skip the share ``sparsity`` of their neurons.

    Rules (v = act(x Wg), u = x Wu, h = v u, Wd_j the down projection's weights of neuron j):

    - ``plain``: CATS (arXiv 2404.08763, section 3). One threshold a layer, the ``sparsity`` quantile of ``|v|``. One
      pass over the data.
    - ``two_threshold``: the gate's threshold is set to the lower sparsity s_u, then a neuron is dropped if ``|h_j|
      norm(Wd_j)`` is below its quantile s_d (dropped neurons counted as 0), which gives ``down_threshold_j = t2 /
      norm(Wd_j)``. ``s_u + s_d = 2 sparsity``, so a token reads as many bytes as with the plain rule. By default s_d is
      ``sparsity + 0.1``, closer where that leaves [0, 1). Two passes.

    Args:
        model: dense model on any device; unchanged afterwards.
        data: a text, an iterable of texts, or an iterable of token ids: integer tensors ``[T]`` or ``[B, T]``, or
            mappings with ``input_ids`` and optionally ``attention_mask`` (padding is left out). See
            :func:`cats_ext.calibration_data.collect_windows` for how windows are made and chosen.
        tokenizer: needed for texts.
        sparsity: share of neurons to skip, in [0, 1); 0 sets thresholds of 0, which is the dense model.
        rule: "plain" or "two_threshold".
        down_sparsity: s_d of the two-threshold rule.
        weighted_gate: divide the gate's threshold by ``rms(u_j) norm(Wd_j)``, neuron by neuron; one more pass. Lowers
            perplexity, but hurt a last-word prediction task (LAMBADA), so it is off by default.
        max_tokens: how many tokens to use at most.
        sequence_length: tokens in a window; at most as many as the model has positions are used.
        batch_size: windows of equal length run together.
        seed: chooses the windows where there are more than needed. Equal arguments give equal thresholds.
        progress: show a bar per pass, with the time left, on standard error.

    Returns:
        The config, with its histograms, for :func:`cats_ext.apply_cats` and ``save_pretrained``.

    Raises:
        TypeError, ValueError: an argument is out of its range, there is too little data, the model has no gated MLP, is
            patched already, or a layer's activations are NaN, infinite or all zero.
    """
    up_sparsity, down_sparsity = sparsity_split(sparsity, rule, down_sparsity)
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    layers = [_Layer(mlp) for mlp in find_dense_mlps(model)]
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None:
        sequence_length = min(sequence_length, longest)
    windows = collect_windows(data, tokenizer, sequence_length, max_tokens, seed)
    check_token_ids("data", torch.cat(windows), model)

    passes: list[tuple[str, Callable[[_Layer, Tensor, Tensor], None]]] = []
    if weighted_gate:
        passes.append(("weights", _Layer.add_up_squares))
    passes.append(("gate", _Layer.add_gate))
    if rule == "two_threshold":
        passes.append(("joint", _Layer.add_joint))
    for number, (kind, observe) in enumerate(passes, 1):
        title = f"calibration, pass {number} of {len(passes)}" if len(passes) > 1 else "calibration"
        _run_pass(model, layers, windows, batch_size, observe, title, progress)
        for layer in layers:
            layer.finish(kind)

    statistics = {layer.mlp.name: layer.statistics(rule) for layer in layers}
    thresholds, down_thresholds = thresholds_of(statistics, {name: (up_sparsity, down_sparsity) for name in statistics})
    return CatsConfig(
        thresholds=thresholds,
        down_thresholds=down_thresholds,
        layers={
            layer.mlp.name: LayerConfig(
                layer.mlp.hidden_size, layer.mlp.intermediate_size, layer.mlp.activation, up_sparsity, down_sparsity
            )
            for layer in layers
        },
        model_type=getattr(getattr(model, "config", None), "model_type", None),
        sparsity=sparsity,
        rule=rule,
        weighted_gate=weighted_gate,
        calibration={
            "tokens": sum(len(window) for window in windows),
            "windows": len(windows),
            "sequence_length": sequence_length,
            "seed": seed,
            "cats_ext_version": __version__,
        },
        statistics=statistics,
    )


@dataclass
class _Layer:
    """What is counted of one MLP, pass by pass."""

    mlp: GatedMLP
    tokens: int = 0
    up_squares: Tensor | None = None  # float64 [I], sum of u_j^2
    gate_weight: Tensor | None = None  # float32 [I], c_j
    gate: Histogram | None = None
    joint: JointHistogram | None = None

    def __post_init__(self) -> None:
        weight = self.mlp.down.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.down_norm = torch.linalg.vector_norm(weight, dim=0, dtype=wide).float()
        self.act = ACTIVATIONS[self.mlp.activation]

    def add_up_squares(self, gate: Tensor, up: Tensor) -> None:
        squares = up.double().square().sum(0)
        self.up_squares = squares if self.up_squares is None else self.up_squares + squares
        self.tokens += len(up)

    def score(self, v: Tensor) -> Tensor:
        return v if self.gate_weight is None else v * self.gate_weight

    def add_gate(self, gate: Tensor, up: Tensor) -> None:
        if self.gate is None:
            self.gate = Histogram(device=gate.device)
        self.gate.add(self.score(self.act(gate.float())))

    def add_joint(self, gate: Tensor, up: Tensor) -> None:
        if self.joint is None:
            self.joint = JointHistogram.over(self.gate)
        v = self.act(gate.float())
        self.joint.add(self.score(v), v * up.float() * self.down_norm)

    def finish(self, kind: str) -> None:
        """Turn what the pass ``kind`` counted into what the next one needs."""
        if kind == "weights":
            if self.up_squares is None:
                raise ValueError(f"no token of the data reached {self.mlp.name}")
            self.gate_weight = (self.up_squares / self.tokens).sqrt().float() * self.down_norm
        elif kind == "gate":
            if self.gate is None:
                raise ValueError(f"no token of the data reached {self.mlp.name}")
            if self.gate.zeros == self.gate.total:
                raise ValueError(f"all gate activations of {self.mlp.name} are zero: no threshold can be set")

    def statistics(self, rule: str) -> LayerStatistics:
        self.gate.counts = self.gate.counts.cpu()
        down_weight = self.down_norm.cpu() if rule == "two_threshold" else None
        gate_weight = None if self.gate_weight is None else self.gate_weight.cpu()
        return LayerStatistics(self.gate, self.joint and self.joint.trimmed(), gate_weight, down_weight)


def _run_pass(
    model: nn.Module,
    layers: list[_Layer],
    windows: list[Tensor],
    batch_size: int,
    observe: Callable[[_Layer, Tensor, Tensor], None],
    title: str,
    progress: bool,
) -> None:
    """Run all windows once, and hand every MLP's gate and up projections to ``observe``, some rows at a time."""
    # The decoder alone, where there is one: the logits of a window can be larger than all activations.
    is_transformers = hasattr(model, "base_model_prefix")
    backbone = model.base_model if is_transformers else model
    options = {"use_cache": False} if is_transformers else {}
    batches = list(_batches(windows, batch_size))
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for layer in layers:
            stack.enter_context(_Hooks(layer, observe))
        advance = stack.enter_context(progress_bar(title, len(batches), progress))
        for batch in batches:
            backbone(input_ids=batch.to(input_device(model)), **options)
            advance()


def _batches(windows: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Windows of equal length stacked to [B, T], so that nothing has to be padded."""
    for _, group in itertools.groupby(sorted(windows, key=len, reverse=True), key=len):
        same_length = list(group)
        for i in range(0, len(same_length), batch_size):
            yield torch.stack(same_length[i : i + batch_size])


class _Hooks:
    """While entered, catches the outputs of one MLP's gate and up projections and passes them on together."""

    def __init__(self, layer: _Layer, observe: Callable[[_Layer, Tensor, Tensor], None]) -> None:
        self.layer, self.observe = layer, observe
        self.outputs: dict[str, Tensor] = {}
        self.names = MERGED[:1] if layer.mlp.merged else SEPARATE[:2]

    def __enter__(self) -> None:
        self.handles = [
            getattr(self.layer.mlp.module, name).register_forward_hook(
                lambda module, args, output, name=name: self.catch(name, output)
            )
            for name in self.names
        ]

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def catch(self, name: str, output: Tensor) -> None:
        self.outputs[name] = output
        if len(self.outputs) < len(self.names):
            return
        size = self.layer.mlp.intermediate_size
        gate, up = (t.reshape(-1, size) for t in self.layer.mlp.gate_and_up(self.outputs))
        self.outputs.clear()
        rows = max(1, _CHUNK // size)
        try:
            for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True):
                self.observe(self.layer, gate_rows, up_rows)
        except ValueError as error:
            raise ValueError(f"activations of {self.layer.mlp.name}: {error}") from error
