"""A decode step of a plain Llama-like model for one token, as four or five kernels a layer instead of some twenty.

The products and the attention also do the normalisations, residual additions, rotary embedding and cache update.
Weights are the model's own parameters, not copies. The class of a model tells what its layers compute; all their parts
are checked for hooks, adapters and replaced forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cats_ext.decode import launch as ops
from cats_ext.decode.fingerprint import version
from cats_ext.decode.launch import Attention, AttentionPartials, Norm, PackedRows, Weight
from cats_ext.ops.definitions import sparse_mlp_columns_step, sparse_mlp_packed_step, sparse_mlp_step
from cats_ext.ops.dispatch import ColumnsOfGate, deterministic
from cats_ext.ops.plan import packed_linear_supported, step_supported
from cats_ext.patching.detection import ACTIVATION_NAMES, MERGED, projection_names, recognise_activation
from cats_ext.patching.mlp import CatsMLP, PatchedMLP
from cats_ext.patching.projections import KINDS, PackedOperands, kind_of
from cats_ext.patching.wrappers import FORWARD_HOOKS, FORWARD_PRE_HOOKS
from cats_ext.rows import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Their decoder layers add attention(norm(x)) and mlp(norm(x)) to x and rotate whole heads. Some layers of SmolLM3 have
# no rotary embedding. Qwen3 normalises queries and keys head by head; Phi-3 has merged projections.
FUSED_MODELS = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("Phi3ForCausalLM", "SmolLM3ForCausalLM"),
)
_WINDOW_IN_CONFIG = ("MistralAttention", "Phi3Attention")  # in the others each layer has its own sliding_window
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # others choose their frequencies by the length of the text
_RECORDING_HOOKS = "transformers.utils.output_capturing"  # their module
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# (residual row [H], delta that is not added to it yet, position) -> (residual row, delta) after the block
Block = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]


class NotFusableError(ValueError):
    """The fused step does not support a model; the message says why. The engine then runs the model's own forward."""


class FusedStep:
    """``step(token, position)`` gives the logits ``[V]`` of the next token and writes key and value into the cache.

    Args:
        model: in eval mode, patched or not, and one for which :func:`check_fusable` does not raise.
        keys, values: for each layer ``[KV heads, L, D]``.
    """

    def __init__(self, model: PreTrainedModel, keys: list[Tensor], values: list[Tensor]) -> None:
        base = model.model
        self.embedding = base.embed_tokens.weight
        self._frequencies = base.rotary_emb.inv_freq
        self._frequencies_version = version(self._frequencies)
        positions = torch.arange(keys[0].shape[1], device=self.embedding.device)
        cos, sin = (t[0].contiguous() for t in base.rotary_emb(self.embedding, positions[None]))
        hidden = self.embedding.shape[1]
        # Outputs of the sparse MLPs in float32, which the next product rounds; after each the kernel's counter.
        self.sums = torch.zeros(len(base.layers), -(-(hidden + 1) // 4) * 4, device=self.embedding.device)
        partials = None
        self.blocks: list[Block] = []
        for layer, layer_keys, layer_values in zip(base.layers, keys, values, strict=True):
            attention = _describe_attention(layer.self_attn, layer_keys, layer_values, cos, sin)
            if self.embedding.is_cuda and partials is None:
                count = ops.attention_splits(attention.kv_heads, self.embedding.device)
                partials = AttentionPartials.create(count, attention.heads, attention.head_dim, self.embedding.device)
            mlp, mlp_norm = _mlp_block(layer, self.sums[len(self.blocks) // 2])
            self.blocks.append(_attention_block(layer, replace(attention, partials=partials), mlp_norm))
            self.blocks.append(mlp)
        self.norm = _norm(base.norm)
        self.head = (_weight(model.lm_head),), (model.lm_head.bias,)

    @property
    def outdated(self) -> bool:
        """Whether the rotary frequencies have been written in place since the tables were made from them."""
        return version(self._frequencies) != self._frequencies_version

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        self.sums.zero_()
        x, delta = self.embedding.index_select(0, token)[0], None
        for block in self.blocks:
            x, delta = block(x, delta, position)
        return ops.linear(x, *self.head, norm=self.norm, delta=delta)[0]


def check_fusable(model: nn.Module) -> None:
    """Raise :class:`NotFusableError` unless :class:`FusedStep` computes what ``model`` does.

    The model is not of a known kind, or a part of it has been replaced; the message says what.
    """
    name = type(model).__name__
    if name not in FUSED_MODELS or not type(model).__module__.startswith("transformers.models."):
        raise NotFusableError(f"{name} is none of {', '.join(FUSED_MODELS)}")
    rope = model.config.rope_parameters
    if rope.get("rope_type") not in _STATIC_ROPES:
        raise NotFusableError(f"its rotary embedding has the parameters {rope}, which may depend on the text's length")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotFusableError("its rotary embedding covers a part of each head only")
    if model.dtype not in _DTYPES:
        raise NotFusableError(f"its dtype is {model.dtype}")
    if model.device.type == "cuda" and find_spec("triton") is None:
        raise NotFusableError("Triton is not installed")
    if (head_dim := model.model.layers[0].self_attn.head_dim) < 16:
        raise NotFusableError(f"its heads have {head_dim} dimensions, and matrix instructions take 16 at least")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise NotFusableError(f"its weights are on {', '.join(sorted(devices))}")
    if FORWARD_HOOKS or FORWARD_PRE_HOOKS:
        raise NotFusableError("there are hooks for all modules")
    for path, module in model.named_modules():
        if ".mlp." in f"{path}.":  # one that is not plain is called as a module
            continue
        if not _is_plain(module):
            raise NotFusableError(f"{path or 'the model'} has a hook or a replaced forward")
        if path.endswith(("_proj", "lm_head")):
            _check_linear(path, module, model.dtype)


def _check_linear(path: str, module: nn.Module, dtype: torch.dtype) -> None:
    if type(module) is QuantizedLinear:
        if module.input_rows:
            raise NotFusableError(f"{path} has packed rows of inputs")
        if not packed_linear_supported(module.weight, module.in_features, dtype):
            raise NotFusableError(f"{path} has packed rows of {module.in_features} columns, and its dtype is {dtype}")
    elif type(module) is not nn.Linear:
        raise NotFusableError(f"{path} is a {type(module).__name__}, not a torch.nn.Linear")


def _is_plain(module: nn.Module) -> bool:
    # After a call with output_hidden_states transformers leaves hooks that record them only in such calls, and version
    # 5.0 leaves the class's own forward as an attribute of the module.
    hooks = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", None) != _RECORDING_HOOKS]
    forward = getattr(vars(module).get("forward", module.forward), "__func__", None)
    return not (hooks or module._forward_pre_hooks) and forward is type(module).forward


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _describe_attention(module: nn.Module, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> Attention:
    config = module.config
    window_in = config if type(module).__name__ in _WINDOW_IN_CONFIG else module
    window = getattr(window_in, "sliding_window", None)
    if not getattr(module, "use_rope", True):
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    return Attention(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=module.head_dim,
        scaling=module.scaling,
        keys=keys,
        values=values,
        cos=cos,
        sin=sin,
        window=window,
        q_norm=_norm(module.q_norm) if hasattr(module, "q_norm") else None,
        k_norm=_norm(module.k_norm) if hasattr(module, "k_norm") else None,
    )


def _weight(linear: nn.Linear | QuantizedLinear) -> Weight:
    return PackedRows(linear.weight, linear.row_format.name) if type(linear) is QuantizedLinear else linear.weight


def _projections(module: nn.Module) -> tuple[nn.Linear | QuantizedLinear, ...]:
    return (module.qkv_proj,) if hasattr(module, "qkv_proj") else (module.q_proj, module.k_proj, module.v_proj)


def _attention_block(layer: nn.Module, attention: Attention, next_norm: Norm | None) -> Block:
    norm, out, projections = _norm(layer.input_layernorm), layer.self_attn.o_proj, _projections(layer.self_attn)
    weights, biases = tuple(map(_weight, projections)), tuple(p.bias for p in projections)
    out_weight = _weight(out)

    def block(x: Tensor, delta: Tensor | None, position: Tensor) -> tuple[Tensor, Tensor | None]:
        qkv, x = ops.linear(x, weights, biases, norm=norm, delta=delta)
        heads = ops.attention(qkv, attention, position)
        return ops.add_linear(heads, out_weight, out.bias, x, norm=next_norm)

    return block


def _mlp_block(layer: nn.Module, y_sum: Tensor) -> tuple[Block, Norm | None]:
    """The block, and the normalisation of its input if the block does not do it.

    ``y_sum`` (float32, at least ``[H + 1]``) is for this block alone: the sparse kernel's output and counter.
    """
    norm, mlp = _norm(layer.post_attention_layernorm), layer.mlp
    dense_weights = _dense_weights(mlp)
    if dense_weights is not None:
        weights, activation = dense_weights
        down = mlp.down_proj

        def dense(x: Tensor, _: None, position: Tensor) -> tuple[Tensor, None]:
            h = ops.gate_up(x, *weights, activation, norm)
            return ops.add_linear(h, down.weight, down.bias, x)

        return dense, None

    add = _sparse_step(mlp, norm, y_sum)
    if add is not None:

        def sparse(x: Tensor, _: None, position: Tensor) -> tuple[Tensor, Tensor]:
            add(x)
            return x, y_sum[: len(x)]

        return sparse, None

    def module(x: Tensor, row: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return x, mlp(row[None, None])[0, 0]

    return module, norm


def _sparse_step(mlp: nn.Module, norm: Norm, y_sum: Tensor) -> Callable[[Tensor], None] | None:
    """What adds the output of a patched MLP, or of one with packed rows, for x to ``y_sum``; None if no op serves."""
    if not _is_plain(mlp) or deterministic():
        return None
    columns, op = False, sparse_mlp_step
    if isinstance(mlp, CatsMLP):
        settings = mlp.forward_settings
        if settings.tracking or not isinstance(mlp.activation(), str):
            return None
        kind = KINDS[settings.projections]
        operands, mask = kind.operands(mlp._modules), kind.mask(mlp._buffers, settings.activation)
        if columns := issubclass(kind, ColumnsOfGate):
            op = sparse_mlp_columns_step
    else:
        operands = _packed_operands(mlp)
        mask = torch.zeros((), device=y_sum.device), None, _activation(mlp)  # nothing is below the threshold
    if operands is None or mask[-1] is None:
        return None
    weights, (gate_bias, up_bias, down_bias), *formats = operands
    formats = formats[0] if formats else ()
    if formats:
        op = sparse_mlp_packed_step
    if down_bias is not None or not step_supported(weights, norm.weight, y_sum, formats or None, columns=columns):
        return None  # the sum has no bias
    return lambda x: op(x, norm.weight, norm.eps, *weights, *formats, y_sum, *mask, gate_bias, up_bias)


def _activation(mlp: nn.Module) -> str | None:
    """The name of what an unpatched gated MLP computes; None if it has none, or a hook has to see it."""
    own = next((getattr(mlp, name) for name in ACTIVATION_NAMES if hasattr(mlp, name)), None)
    return None if isinstance(own, nn.Module) and not _is_plain(own) else recognise_activation(own)


def _packed_operands(mlp: nn.Module) -> PackedOperands | None:
    """Of an unpatched gated MLP, if its projections hold a packed row for each neuron."""
    names = projection_names(mlp)
    if names is None or not all(type(getattr(mlp, name)) is QuantizedLinear for name in names):
        return None
    if any(getattr(mlp, name).input_rows != (name == "down_proj") for name in names):
        return None
    return KINDS[kind_of(merged=names == MERGED, packed=True)].operands(mlp._modules)


def _dense_weights(mlp: nn.Module) -> tuple[tuple[Tensor | None, ...], str] | None:
    """Gate and up weights, their biases and the activation of an unpatched gated MLP of bare linear layers.

    None for any other, which is called as the module it is.
    """
    if isinstance(mlp, PatchedMLP) or not _is_plain(mlp):
        return None
    merged = hasattr(mlp, "gate_up_proj")
    names = ("gate_up_proj", "down_proj") if merged else ("gate_proj", "up_proj", "down_proj")
    linears = [getattr(mlp, name, None) for name in names]
    if not all(type(linear) is nn.Linear and _is_plain(linear) for linear in linears):
        return None
    activation = _activation(mlp)
    if activation is None or linears[-1].weight.stride(-1) != 1:
        return None
    if not merged:
        gate, up, _ = linears
        return (gate.weight, up.weight, gate.bias, up.bias), activation
    weights = linears[0].weight.chunk(2)
    biases = (None, None) if linears[0].bias is None else linears[0].bias.chunk(2)
    return (*weights, *biases), activation
