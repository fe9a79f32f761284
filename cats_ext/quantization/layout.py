"""Which layers of a model hold packed rows, as an entry of a checkpoint's ``config.json`` says it, and back.

Layers that are alike in all decoder layers have one entry: ``model.layers.*.mlp.down_proj``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from cats_ext.quantization.run import quantized_linears
from cats_ext.rows import QuantizedLinear, RowFormat

Rows = dict[str, dict[str, Any]]


def describe(model: nn.Module) -> Rows:
    """``{"format": ..., "input_rows": ...}`` by name of the layers, a star in place of numbers where all are alike."""
    entries = {
        name: {"format": linear.row_format.name, "input_rows": linear.input_rows}
        for name, linear in quantized_linears(model).items()
    }
    alike = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            alike[pattern_of(name)].append(entries.get(name))
    rows: Rows = {}
    for name, entry in entries.items():
        pattern = pattern_of(name)
        rows[pattern if all(other == entry for other in alike[pattern]) else name] = entry
    return rows


def check_rows(rows: Any) -> None:
    """Raise ValueError unless ``rows`` is such an entry."""
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"rows in quantization_config must be an object with an entry a layer, got {rows!r:.80}")
    for name, entry in rows.items():
        if not isinstance(entry, dict) or entry.keys() != {"format", "input_rows"}:
            raise ValueError(f"rows[{name!r:.80}] must be an object with format and input_rows, got {entry!r:.80}")
        if not isinstance(entry["format"], str) or not isinstance(entry["input_rows"], bool):
            raise ValueError(f"rows[{name!r:.80}] must have a name and true or false, got {entry!r:.80}")
        RowFormat.parse(entry["format"])


def prepare(model: nn.Module, rows: Rows) -> None:
    """Replace the linear layers of ``model`` that ``rows`` names by empty ones of packed rows, on their device.

    Args:
        model: a model of the checkpoint's kind, with or without its head, or with another one.

    Raises:
        ValueError: ``rows`` names a layer that the model does not have, or rows have no whole number of groups.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unused = set(rows)
    for name, linear in linears.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        key = next((key for n in names for key in (n, pattern_of(n)) if key in rows), None)
        if key is None:
            continue
        unused.discard(key)
        form, has_bias = RowFormat.parse(rows[key]["format"]), linear.bias is not None
        try:
            made = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                form,
                input_rows=rows[key]["input_rows"],
                bias=has_bias,
                dtype=linear.bias.dtype if has_bias else None,
                device=linear.weight.device,
            )
        except ValueError as error:
            raise ValueError(f"the checkpoint's rows of {name} do not fit the model: {error}") from error
        model.set_submodule(name, made)
    in_base = sorted(key for key in unused if key.startswith(prefix) or prefix == ".")
    if in_base:
        raise ValueError(f"the checkpoint has packed rows for {in_base[0]}, which its model does not have")


def pattern_of(name: str) -> str:
    """``name`` with a star in place of each number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
