"""Lets a model that is sparse by itself skip its zeros, in place: in all layers that gain or, after an error, none."""

from __future__ import annotations

from torch import nn

from cats_ext.parallel.sharding import check_on_one_rank
from cats_ext.patching import listeners
from cats_ext.patching.apply import apply_cats, make_all_dense, sparse_mlps
from cats_ext.patching.detection import ACTIVATION_NAMES, check_module
from cats_ext.patching.exact.detection import ExactLayer, find_exact_layers
from cats_ext.patching.exact.modules import ExactState
from cats_ext.patching.mlp import CatsMLP, ForwardSettings
from cats_ext.patching.surgery import Layout, MemoryLayouts, column_strides, make_sparse, patch_module
from cats_ext.patching.wrappers import unwrapped
from cats_ext.thresholds.config import CatsConfig, LayerConfig
from cats_ext.thresholds.exact import ExactConfig


def apply_exact(model: nn.Module) -> nn.Module:
    """Let ``model`` skip what is exactly zero in its MLPs, in place: the same function, reading fewer weights.

    For models whose activation gives exact zeros: ReLU and squared ReLU, gated or not (ReLUfied Llamas, OPT, Nemotron,
    Arcee, NanoChat and others), and Gemma 3n, whose first layers keep the largest 5 % of each token. Nothing is
    calibrated. Few tokens are computed from the rows of the neurons that are not zero; many tokens, and training, run
    the model's own forward. Layers without exact zeros stay as they are.

    The result is the dense one up to the order of additions, with one exception: where an activation is zero and what
    it is multiplied by infinite or NaN, the dense model gives NaN, and here the neuron is skipped. NaN is kept.

    :func:`remove_cats` undoes it. :func:`track_sparsity` and :func:`sparsity_report` show how much is skipped.
    ``save_pretrained`` of a transformers model writes the dense checkpoint with an entry in ``config.json``, by which
    ``from_pretrained`` patches it again.

    Args:
        model: dense, on CPU or CUDA; also inside torch.compile, DistributedDataParallel or PEFT. Of a model that
            :func:`cats_ext.quantize` has quantised, gated ReLUs gain.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: no layer gains, the model is patched already or quantised by another library, or others have a down
            projection's memory too. The model is unchanged after any error, KeyboardInterrupt included.
    """
    check_module(model)
    inner = unwrapped(model)
    if sparse_mlps(inner):
        raise ValueError(f"model of class {type(inner).__name__} is patched already: call remove_cats first")
    check_on_one_rank(inner, "apply_exact")
    listeners.check(inner)
    layers, _ = find_exact_layers(inner)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    config = ExactConfig.of(((layer.name, _layer_config(layer)) for layer in layers), model_type)
    wanted = [{layer.down_name: (layer.down_weight, column_strides(layer.down_weight))} for layer in layers]
    layouts = MemoryLayouts({name: weight for layout in wanted for name, weight in layout.items()})
    try:
        for layer, own in zip(layers, wanted, strict=True):
            if layer.kind is CatsMLP:
                make_sparse(layer.mlp, config, layouts, own, exact=True)
            else:
                _make_exact(layer, config, layouts, own)
        listeners.patched(inner, config)
        return model
    except BaseException:
        make_all_dense(inner, [layer.module for layer in layers], layouts)
        raise


def apply_config(model: nn.Module, config: CatsConfig) -> nn.Module:
    """As ``config``, of a model that was patched, was applied: by :func:`apply_exact` or :func:`apply_cats`."""
    return apply_exact(model) if isinstance(config, ExactConfig) else apply_cats(model, config)


def _layer_config(layer: ExactLayer) -> LayerConfig:
    mlp = layer.mlp
    sizes = (mlp.hidden_size, mlp.intermediate_size) if mlp else layer.down_weight.shape
    return LayerConfig(*sizes, layer.activation, 0.0, 0.0, mlp.experts if mlp else None)


def _make_exact(layer: ExactLayer, config: ExactConfig, layouts: MemoryLayouts, layout: Layout) -> None:
    module, weight = layer.module, layer.down_weight
    own_activation = next((name for name in ACTIVATION_NAMES if hasattr(module, name)), None)
    state = ExactState(
        original_class=type(module),
        own_activation=getattr(module, own_activation) if own_activation else None,
        relufied=False,
        down_owner=layer.down_owner,
        down_strides=weight.stride(),
        config=config,
        name=layer.name,
        matrices=layer.matrices,
        activation=layer.formula,
        multipliers=layer.multipliers,
        relu_up=layer.relu_up,
    )
    settings = ForwardSettings(
        hidden_size=weight.shape[-2],
        activation=layer.formula,
        own_activation=own_activation,
        projections=layer.projections,
        dense_prefill=False,
    )
    patch_module(module, layer.kind, state, settings, layouts, layout)
