"""quantize: rounds a model's weights to packed rows, in place, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext._inputs import LARGEST_SEED, check_integer, check_token_ids
from cats_ext._progress import finish_despite_interrupt, progress_bar
from cats_ext.data.windows import collect_windows
from cats_ext.parallel.sharding import check_on_one_rank
from cats_ext.patching import listeners
from cats_ext.patching.apply import check_complete, sparse_mlps
from cats_ext.patching.detection import (
    MERGED,
    SEPARATE,
    GatedMLP,
    check_module,
    check_weight,
    find_gated_mlps,
    sharing_memory,
)
from cats_ext.patching.mlp import PatchedMLP
from cats_ext.patching.projections import kind_of
from cats_ext.patching.wrappers import only_aligns_devices, unwrapped
from cats_ext.quantization.config import QuantizationConfig
from cats_ext.quantization.moments import Moments, parts_by_memory
from cats_ext.rows import QuantizedLinear, RowFormat
from cats_ext.thresholds.exact import ExactConfig
from cats_ext.thresholds.fit import sample_weights, weight_of
from cats_ext.thresholds.rules import has_input_threshold

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    model: nn.Module,
    weights: str = QuantizationConfig.weights,
    group_size: int | None = None,
    *,
    zero_points: bool = QuantizationConfig.zero_points,
    gate: str | None = None,
    up: str | None = None,
    down: str | None = None,
    scope: str = QuantizationConfig.scope,
    data: Any = None,
    tokenizer: Any = None,
    max_tokens: int = 32768,
    sequence_length: int = 1024,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Keep the weights of ``model`` in int4, int8 or fp8 from now on, in place.

    Each projection of the gated MLPs becomes a :class:`cats_ext.rows.QuantizedLinear`, with one packed row a neuron.
    ``calibrate``, ``apply_cats``, ``save_pretrained`` and ``from_pretrained`` take the quantised model like a dense
    one. Calibrate after quantising: thresholds that a model is patched with stay as they are, and were set for the
    weights before. The weights before are not kept; :func:`cats_ext.remove_cats` does not bring them back.

    Without ``data`` weights are rounded to the nearest values, with scales that are searched for the smallest error.
    With it, the errors of rounding are compensated (GPTQ, arXiv 2210.17323) by what each layer gets when ``model``,
    dense or patched, runs over that text. Layers are rounded one by one and replaced together at the end: beside the
    model, memory is needed for the packed rows, and with ``data`` for 4 GiB of sums or those of the widest layer.

    Args:
        model: dense or patched with thresholds, with gated MLPs as for :func:`cats_ext.apply_cats`; the whole of it if
            it is to be saved.
        weights: int4, int8, fp8 (e4m3, one scale a row), or the name of a format such as ``int4_g64_zp``.
        group_size: columns of a row that share a scale: 32, 64 or 128. By default the largest that divides the rows.
        zero_points: whether int4 has a zero point a group too.
        gate, up, down: as ``weights``, for these matrices. By default they are as ``weights``, but with
            ``weights="int4"`` the down projection is in int8: int4 loses most there. ``down="int4"`` keeps it in int4.
        scope: "mlp", or "all" for every linear layer beside the MLPs as well (attention), in the format of
            ``weights``, and for the output layer in int8. An output layer that is tied to the embedding gets rows of
            its own, and the embedding stays as it is.
        data, tokenizer, max_tokens, sequence_length, batch_size, seed: as for :func:`cats_ext.calibrate`.
        progress: show bars on standard error.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``data`` is not what it can be.
        ValueError: an argument is out of its range, the model is quantised already, patched by
            :func:`cats_ext.apply_exact` or with the rule ``three_threshold``, or cannot run sparsely, groups do not
            divide a matrix's rows, its weights are not finite, have scales outside of float16, are no plain tensors or
            are tied to others, or no token of ``data`` reaches a layer. The model is unchanged after any error,
            KeyboardInterrupt included.
    """
    config = QuantizationConfig(weights, group_size, zero_points, gate, up, down, scope)
    check_module(model)
    windows = None
    if data is not None:
        sizes = {"max_tokens": max_tokens, "sequence_length": sequence_length, "batch_size": batch_size}
        for name, value in sizes.items():
            check_integer(name, value, 1)
        check_integer("seed", seed, 0, LARGEST_SEED)
        longest = getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None)
        windows = collect_windows(data, tokenizer, min(sequence_length, longest or sequence_length), max_tokens, seed)
        check_token_ids("data", torch.cat(windows), unwrapped(model))
    return quantize_as(model, config, windows, batch_size=batch_size, progress=progress)


@torch.inference_mode(False)
@torch.no_grad()
def quantize_as(
    model: nn.Module,
    config: QuantizationConfig,
    windows: list[Tensor] | None = None,
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> nn.Module:
    """As :func:`cats_ext.quantize`, with its arguments in ``config``, and windows of token ids ``[T]`` for its data."""
    check_module(model)
    inner = unwrapped(model)
    check_on_one_rank(inner, "quantize")
    if quantized_linears(inner):
        raise ValueError(f"model of class {type(model).__name__} is quantised already: quantise the dense one")
    listeners.check(inner)
    places = _places(inner, config)
    made = _rounded(inner, places, windows, batch_size, progress)
    patched = list(sparse_mlps(inner).values())
    undo: list[Callable[[], object]] = [] if patched else [lambda: listeners.removing(inner)]
    try:
        for place in places:
            undo.append(partial(setattr, place.owner, place.child, place.linear))
            setattr(place.owner, place.child, made[place.name])
            if place.tied:
                _untie(inner, place.name, undo)
        _follow(patched, undo)
        listeners.quantized(inner)
        return model
    except BaseException:
        finish_despite_interrupt(lambda: [action() for action in reversed(undo)])
        raise


def _rounded(
    model: nn.Module, places: list[_Place], windows: list[Tensor] | None, batch_size: int, progress: bool
) -> dict[str, QuantizedLinear]:
    """The new layers by name; ``model`` stays as it is. The output layer is rounded to the nearest values."""
    by_name, made = {place.name: place for place in places}, {}
    nearest = [place.name for place in places if windows is None or place.head]
    linears = {place.name: place.linear for place in places if place.name not in nearest}
    for part in (*parts_by_memory(linears), None):
        moments, names = (None, nearest) if part is None else (Moments(part), list(part))
        if moments is not None:
            moments.run(model, windows, batch_size, progress)
        with progress_bar("rounding", len(names), progress and bool(names)) as advance:
            for name in names:
                place = by_name[name]
                with _naming(name):
                    options = {"input_rows": place.input_rows, "moment": moments and moments.of(name)}
                    made[name] = QuantizedLinear.from_linear(place.linear, place.row_format, **options)
                advance()
    return made


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of ``model`` with packed rows, by name; empty if it is not quantised."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@dataclass(frozen=True)
class _Place:
    """A linear layer that becomes one of packed rows."""

    name: str
    owner: nn.Module
    child: str  # its name there
    row_format: RowFormat
    input_rows: bool = False
    head: bool = False  # the output layer
    tied: bool = False  # its weight is the embedding's

    @property
    def linear(self) -> nn.Linear:
        return getattr(self.owner, self.child)


def _places(model: nn.Module, config: QuantizationConfig) -> list[_Place]:
    """All layers to quantise, in the model's order; raises ValueError if one of them cannot be."""
    mlps, shared = _gated_mlps(model), sharing_memory(model)
    matrices: dict[str, str] = {}  # what each layer is, by its name
    for mlp in mlps:
        with _naming(mlp.name):
            if mlp.experts:
                raise ValueError("it is a mixture of experts, whose weights are not quantised")
            _check_merged(mlp, config)
        matrices |= {f"{mlp.name}.{child}": child.split("_")[0] for child in (MERGED if mlp.merged else SEPARATE)}
    head, tied = None, False
    if config.scope == "all":
        for layer in dict.fromkeys(mlp.name.rpartition(".")[0] for mlp in mlps):
            matrices |= {name: "other" for name in _linears_of(model, layer) if name not in matrices}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tied = isinstance(head, nn.Linear) and head.weight is model.get_input_embeddings().weight
    found = []
    for name, module in model.named_modules():
        if name not in matrices and module is not head:
            continue
        matrix = "head" if module is head else matrices[name]
        with _naming(name):
            _check_layer(module, set() if module is head and tied else shared)
            rows_of_inputs = matrix == "down"
            columns = module.out_features if rows_of_inputs else module.in_features
            owner, _, child = name.rpartition(".")
            place = model.get_submodule(owner), child, config.format_of(matrix, columns)
            found.append(_Place(name, *place, rows_of_inputs, module is head, module is head and tied))
    return found


def _gated_mlps(model: nn.Module) -> list[GatedMLP]:
    patched = sparse_mlps(model)
    if not patched:
        return find_gated_mlps(model)
    check_complete(model, patched)
    config = next(iter(patched.values())).cats.config
    if isinstance(config, ExactConfig):
        raise ValueError(
            f"model of class {type(model).__name__} is patched by apply_exact: call remove_cats, quantize, and then "
            "apply_exact again"
        )
    if has_input_threshold(config.rule):
        raise ValueError(
            f"model of class {type(model).__name__} is patched with rule {config.rule!r}, which needs dense weights: "
            "call remove_cats, quantize, and calibrate with another rule"
        )
    return [
        GatedMLP(name, m, m.cats.target.activation, MERGED[0] in m._modules, m.cats.target.experts)
        for name, m in patched.items()
    ]


def _check_merged(mlp: GatedMLP, config: QuantizationConfig) -> None:
    if mlp.merged and (gate := config.gate or config.weights) != (up := config.up or config.weights):
        raise ValueError(f"gate and up must have one format, as {MERGED[0]} is one matrix, got {gate} and {up}")


def _linears_of(model: nn.Module, layer: str) -> list[str]:
    """The names of all linear layers of a decoder layer."""
    names = []
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        if hasattr(module, "base_layer"):
            raise ValueError(f"{name} has an adapter: merge it before quantising")
        if isinstance(module, nn.Linear):
            names.append(name)
    return names


def _check_layer(linear: nn.Module, shared: set[int]) -> None:
    """Raise ValueError unless ``linear`` is a bare layer with a weight of its own."""
    kind = type(linear)
    if kind is not nn.Linear:
        raise ValueError(f"it is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear (merge adapters before)")
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or ("forward" in vars(linear) and not only_aligns_devices(linear)):
        raise ValueError("it has a hook or a replaced forward, which would be lost")
    check_weight("weight", linear.weight, shared, DTYPES)


def _follow(modules: list[PatchedMLP], undo: list[Callable[[], object]]) -> None:
    """Let patched modules use their new projections."""
    if not modules:
        return
    config = modules[0].cats.config
    if config.weights:
        config = replace(config, weights={m.cats.name: sample_weights(partial(weight_of, m)) for m in modules})
    for module in modules:
        cats, settings = module.cats, module.forward_settings
        undo.append(partial(vars(cats).update, vars(cats).copy()))
        undo.append(partial(setattr, module, "forward_settings", settings))
        cats.config, cats.down_owner = config, module.down_proj
        cats.down_strides = module.down_proj.weight.stride()
        module.forward_settings = settings._replace(projections=kind_of(MERGED[0] in module._modules, packed=True))


def _untie(model: nn.Module, head: str, undo: list[Callable[[], object]]) -> None:
    """Let a transformers model know that its output layer has a weight of its own now."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            undo.append(partial(setattr, config, "tie_word_embeddings", True))
            config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", {})
    undo.append(partial(setattr, model, "all_tied_weights_keys", tied))
    model.all_tied_weights_keys = {key: source for key, source in tied.items() if key != f"{head}.weight"}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantised: {error}") from error
