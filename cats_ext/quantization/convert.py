"""convert_quantized: a checkpoint that another library quantised becomes a model with packed rows."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cats_ext._progress import progress_bar
from cats_ext.patching.detection import projection_names
from cats_ext.quantization.config import QuantizationConfig
from cats_ext.quantization.foreign import METHODS, Scheme, Unpack, one_of
from cats_ext.quantization.layout import Rows
from cats_ext.quantization.torchao import TorchaoScheme
from cats_ext.rows import Fields, RowFormat, quantize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Files = Mapping[str, safe_open]  # where each tensor is, by its name
MAX_ERROR = 0.05  # less than normally distributed weights lose in int4
KEPT_ERROR = 2.0**-9  # of a layer that is kept, by float16 scales and zero points: bfloat16 weights lose as much
SAMPLED_ROWS = 512  # of a down projection, which tell whether it loses more: rounding all of it takes long


@torch.inference_mode(False)
@torch.no_grad()
def convert_quantized(
    directory: str | os.PathLike,
    *,
    down: str | None = None,
    group_size: int | None = None,
    zero_points: bool = QuantizationConfig.zero_points,
    max_error: float = MAX_ERROR,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Load a causal language model that AWQ, GPTQ, compressed-tensors or torchao quantised, with packed rows.

    The library that wrote it is not needed. Gate, up and the layers of attention keep their integers, scales and zero
    points: the model computes with exactly the weights of the file, but for those of torchao's scales and zero points
    that are no float16 values and are rounded to them. The down projection, whose groups run over neurons in the
    file, is rounded again, to rows with groups along H. Layers that are dense in the file stay so.
    The model is saved, loaded, calibrated and patched like one that :func:`cats_ext.quantize` made.

    Args:
        directory: with config.json and safetensors files, or a name on the Hugging Face hub. AWQ: version gemm. GPTQ:
            4 or 8 bits, without act-order. compressed-tensors: pack-quantized with 4 or 8 bits, and float-quantized
            with a scale an output or a tensor. torchao: int4, int8 and intx weight-only, not pickled. Activations are
            not quantised. Groups of 32, 64 or 128, of torchao also larger ones.
        down: the format of all down projections, as for :func:`cats_ext.quantize`. By default int4 for those that
            lose at most ``max_error`` in it, and int8 for the others.
        group_size, zero_points: of the down projection, as for :func:`cats_ext.quantize`.
        max_error: the largest ``|W' - W| / |W|`` (Frobenius norms) of a down projection in int4, by 512 of its rows.
            Normally distributed weights lose about 0.1, which is as much as their first rounding did, and 0.006 in
            int8.
        dtype: of what stays dense, by default that of the checkpoint.
        device: of the model.
        progress: show a bar on standard error.

    Returns:
        The model, in eval mode, and that error of each down projection by its name, and of each other layer that was
        not kept exactly.

    Raises:
        OSError: a file cannot be read.
        ValueError: an argument is out of its range, or the checkpoint is none of these, has no safetensors files, or
            does not fit its model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(max_error, bool) or not isinstance(max_error, int | float) or not 0 <= max_error < math.inf:
        raise ValueError(f"max_error must be a number from 0, got {max_error!r:.50}")
    tried = [down] if down is not None else ["int4", "int8"]
    wanted = [QuantizationConfig(group_size=group_size, zero_points=zero_points, down=each) for each in tried]
    config = AutoConfig.from_pretrained(directory)
    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        raise ValueError(f"{directory} cannot be converted: its config.json has no quantization_config")
    with _naming(f"{directory} with its quantization_config"):
        method = one_of("quant_method", entry.get("quant_method"), METHODS)
        scheme = (TorchaoScheme if method == "torchao" else Scheme).parse(entry)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    with _opened(directory) as files:
        with _naming(directory):
            layers = scheme.layers(files)
        linears = _linears(skeleton, layers, files)
        downs = _downs(skeleton, linears)
        state = {name: files[name].get_tensor(name) for name in _dense(linears, scheme, files)}
        rows: Rows = {}
        errors: dict[str, float] = {}
        with progress_bar("converting", len(linears), progress) as advance:
            for name, linear in linears.items():
                with _naming(name):
                    beside = {key for key in scheme.tensors_of(name) if key in files}
                    tensors = {key.removeprefix(f"{name}."): files[key].get_tensor(key).to(device) for key in beside}
                    form, fields = layers[name](tensors, linear.out_features, linear.in_features)
                    if name in downs:
                        form, packed, error = _rounded(_weight(form, fields).t(), wanted, max_error)
                    else:
                        packed, error = _kept(form, fields)
                    if name in downs or error:
                        errors[name] = error
                state[f"{name}.weight"] = packed.cpu()
                rows[name] = {"format": form.name, "input_rows": name in downs}
                advance()
    config.quantization_config = {"quant_method": QuantizationConfig.quant_method, "rows": rows}
    return _load(type(skeleton), directory, config, state, dtype).to(device), errors


def _linears(skeleton: PreTrainedModel, layers: Mapping[str, Unpack], files: Files) -> dict[str, nn.Linear]:
    """The model's layers that are quantised in the checkpoint, in the model's order."""
    linears = {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear) and name in layers}
    for name in sorted(layers.keys() - linears.keys()):
        raise ValueError(f"{name} cannot be converted: {type(skeleton).__name__} has no linear layer of that name")
    tied = skeleton.get_output_embeddings() if skeleton.config.get_text_config().tie_word_embeddings else None
    for name, linear in linears.items():
        with _naming(name):
            if linear is tied:
                raise ValueError("it is tied to the embedding")
            bias = f"{name}.bias"
            if linear.bias is None and bias in files and files[bias].get_tensor(bias).any():
                raise ValueError("it has a bias in the checkpoint, but not in the model")
    return linears


def _downs(skeleton: PreTrainedModel, linears: Mapping[str, nn.Linear]) -> set[str]:
    """The names of the down projections among ``linears``."""
    downs = set()
    for name, module in skeleton.named_modules():
        projections = [f"{name}.{child}" for child in projection_names(module) or ()]
        dense = [projection for projection in projections if projection not in linears]
        if projections and not dense:
            downs.add(projections[-1])
        elif len(dense) < len(projections):
            raise ValueError(
                f"{name} cannot be converted: {dense[0]} is dense, but its other projections are quantised"
            )
    if not downs:
        raise ValueError(f"{type(skeleton).__name__} cannot be converted: no gated MLP of it is quantised")
    return downs


def _dense(linears: Mapping[str, nn.Linear], scheme: Scheme | TorchaoScheme, files: Files) -> list[str]:
    """The tensors that are taken as they are. AutoGPTQ wrote biases of zeros for layers that have none."""
    used = {tensor for name in linears for tensor in scheme.tensors_of(name)}
    used |= {f"{name}.bias" for name, linear in linears.items() if linear.bias is None}
    return [name for name in files if name not in used]


def _weight(form: RowFormat, fields: Fields) -> Tensor:
    q, scales, zeros = fields
    return form.decode(q.unflatten(1, (scales.shape[1], -1)), scales, zeros).flatten(1)


def _kept(form: RowFormat, fields: Fields) -> tuple[Tensor, float]:
    """The rows of ``fields``, and the error of rounding its scales and zero points to what rows store."""
    dtype = torch.float32 if form.type == "fp8" else torch.float16
    stored = Fields(fields.q, *(None if t is None else t.to(dtype) for t in fields[1:]))
    packed = form.pack(*stored)
    if all(a is None or bool((a == b).all()) for a, b in zip(stored[1:], fields[1:], strict=True)):
        return packed, 0.0
    error = _relative(_weight(form, stored), _weight(form, fields))
    if not error <= KEPT_ERROR:  # also NaN
        raise ValueError(f"its scales and zero points must lose at most {KEPT_ERROR:g} in float16, got {error:g}")
    return packed, error


def _rounded(weight: Tensor, wanted: list[QuantizationConfig], max_error: float) -> tuple[RowFormat, Tensor, float]:
    """``weight`` ``[I, H]`` in the first wanted format with a small enough error, or in the last one; and the error."""
    *tried, form = (config.format_of("down", weight.shape[1]) for config in wanted)
    sample = weight[:: -(-len(weight) // SAMPLED_ROWS)]
    form = next((each for each in tried if _round(sample, each)[1] <= max_error), form)
    return form, *_round(weight, form)


def _round(weight: Tensor, form: RowFormat) -> tuple[Tensor, float]:
    packed = quantize_rows(weight, form)
    return packed, _relative(form.unpack(packed, weight.shape[1]), weight)


def _relative(made: Tensor, weight: Tensor) -> float:
    return float((made - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _load(
    kind: type[PreTrainedModel],
    directory: str | os.PathLike,
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype | str,
) -> PreTrainedModel:
    from transformers import GenerationConfig

    model, found = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"{directory} cannot be converted: it has no tensor {name}")
    if unused := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{directory} has {len(unused)} tensors that {kind.__name__} has no use for, such as {unused[0]}",
            UserWarning,
            stacklevel=4,
        )
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except OSError:  # it has none
            pass
    return model


@contextmanager
def _opened(directory: str | os.PathLike) -> Iterator[Files]:
    """The safetensors files of a checkpoint, which are read on demand."""
    from transformers.utils.hub import cached_file

    def found(name: str) -> str | None:
        return cached_file(directory, name, _raise_exceptions_for_missing_entries=False)

    if index := found("model.safetensors.index.json"):
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    elif found("model.safetensors"):
        names = ["model.safetensors"]
    else:
        raise ValueError(f"{directory} cannot be converted: it has no safetensors files, and pickled ones are not read")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(cached_file(directory, name), "pt")) for name in names]
        yield {tensor: file for file in files for tensor in file.keys()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put what it is about before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted: {error}") from error
