"""CatsConfig: the thresholds of one model, and what they were made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cats_ext.thresholds.allocation import LossTable
from cats_ext.thresholds.files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    THRESHOLDS_FILE,
    load_config_files,
    save_config_files,
)
from cats_ext.thresholds.rules import (
    RULES,
    budget_of,
    bytes_share,
    check_bool,
    check_choice,
    check_sparsity,
    check_weights,
    sparsity_split,
)
from cats_ext.thresholds.statistics import LayerStatistics

_PLAIN_FIELDS = (
    *("rule", "sparsity", "gate_power", "last_gate_power", "importance", "sparse_prefill", "model_type", "calibration"),
)


class MLPShape(Protocol):
    """What a config needs of a model's gated MLP; ``patching.detection.GatedMLP`` has it."""

    name: str
    activation: str
    experts: int | None

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...


@dataclass(frozen=True)
class LayerConfig:
    """One gated MLP: its shape and activation, and the shares of its neurons that the thresholds were set to skip."""

    hidden_size: int
    intermediate_size: int
    activation: str
    up_sparsity: float  # of the rows of up_proj
    down_sparsity: float  # of the rows of down_proj, laid out by neuron
    experts: int | None = None  # number of experts in the module, each of this shape, with common thresholds

    @property
    def bytes_share(self) -> float:
        """Share of the dense MLP's weight bytes that one token reads."""
        return bytes_share(self.up_sparsity, self.down_sparsity)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "experts" or value is not None}


@dataclass(eq=False)  # tensors have no truth value
class CatsConfig:
    """Thresholds by MLP name, their target sparsity, and how they were calibrated.

    A neuron is kept if ``|act(g)| >= threshold`` and, given a down threshold, ``|act(g) u| >= down_threshold``.

    Attributes:
        thresholds: float32 ``[]`` or ``[I]`` by module name.
        down_thresholds: likewise; empty for the plain rule.
        layers: shape, activation and targets by module name, in the model's order. With ``model_type`` they are the
            fingerprint that tells a config for another model.
        rule, sparsity, gate_power, last_gate_power, importance: as given to :func:`cats_ext.calibrate`.
        sparse_prefill: False computes every input of more than one position a sequence densely: prompts, and the
            verification of drafted tokens. The prompt then loses no quality; generated text may still differ.
        calibration: tokens, windows, sequence_length, seed and package version of the calibration.
        statistics: what calibration counted, by module name; thresholds for any other sparsity follow from it
            (:meth:`at_sparsity`). Empty in a config made by hand.
        losses: of each layer at each sparsity, if calibration searched an allocation; None if all layers are alike.
    """

    quant_method: ClassVar[str] = "cats"  # how transformers finds the quantizer

    thresholds: dict[str, Tensor]
    layers: dict[str, LayerConfig]
    model_type: str | None
    sparsity: float
    rule: str = "plain"
    gate_power: float = 0.0
    last_gate_power: float = 0.0
    importance: str = "norm"
    sparse_prefill: bool = True
    down_thresholds: dict[str, Tensor] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, LayerStatistics] = field(default_factory=dict, repr=False)
    losses: LossTable | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.validate()

    @property
    def bytes_share(self) -> float:
        """Share of all MLP weight bytes that one token reads at the target sparsity."""
        sizes = [layer.hidden_size * layer.intermediate_size for layer in self.layers.values()]
        shares = [layer.bytes_share for layer in self.layers.values()]
        return sum(n * share for n, share in zip(sizes, shares, strict=True)) / sum(sizes)

    def at_sparsity(self, sparsity: float, *, down_sparsity: float | None = None) -> CatsConfig:
        """A config with the same calibration at another sparsity. The model is not run; this config is unchanged.

        Every threshold follows from the stored statistics, exactly as ``calibrate(..., sparsity=sparsity)`` on the same
        text would set it, or where an allocation was searched, as with the ``budget`` of the same bytes. Shapes of
        thresholds do not depend on the sparsity, so that those of a patched model can be overwritten in place.

        Args:
            sparsity: as in :func:`cats_ext.calibrate`, in [0, 1).
            down_sparsity: as there; None for the default split of the two-threshold rule, or for the allocation over
                layers that calibration found.

        Returns:
            The new config.

        Raises:
            TypeError, ValueError: an argument is out of its range, which ends at 0.99 for a searched allocation, or the
                config has no statistics.
        """
        split = sparsity_split(sparsity, self.rule, down_sparsity)
        if self.losses is None or down_sparsity is not None:
            return self.with_targets(dict.fromkeys(self.layers, split), sparsity)
        sizes = [layer.hidden_size * layer.intermediate_size for layer in self.layers.values()]
        targets = self.losses.targets(budget_of(sparsity), sizes, split)
        return self.with_targets(dict(zip(self.layers, targets, strict=True)), sparsity)

    def with_targets(self, targets: dict[str, tuple[float, float]], sparsity: float) -> CatsConfig:
        """As :meth:`at_sparsity`, with an up and a down sparsity of each layer's own.

        Args:
            targets: up and down sparsity by layer name.
            sparsity: the new config's entry ``sparsity``.

        Returns:
            The new config.

        Raises:
            ValueError: the config has no statistics of a layer.
        """
        missing = [name for name in self.layers if name not in self.statistics]
        if missing:
            raise ValueError(f"config has no calibration statistics for {missing[0]}: calibrate the model again")
        thresholds, down_thresholds = thresholds_of(self.statistics, targets)
        layers = {
            name: replace(layer, up_sparsity=targets[name][0], down_sparsity=targets[name][1])
            for name, layer in self.layers.items()
        }
        return replace(self, thresholds=thresholds, down_thresholds=down_thresholds, layers=layers, sparsity=sparsity)

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the config is complete and every threshold is usable."""
        check_sparsity("sparsity", self.sparsity)
        check_choice("rule", self.rule, RULES)
        check_weights(self.rule, self.gate_power, self.last_gate_power, self.importance)
        check_bool("sparse_prefill", self.sparse_prefill)
        if not self.layers:
            raise ValueError("layers must name at least one MLP, got none")
        for name, layer in self.layers.items():
            check_sparsity(f"layers[{name!r}].up_sparsity", layer.up_sparsity)
            check_sparsity(f"layers[{name!r}].down_sparsity", layer.down_sparsity)
        down_layers = self.layers if self.rule == "two_threshold" else {}
        for field_name, expected in (("thresholds", self.layers), ("down_thresholds", down_layers)):
            thresholds: dict[str, Tensor] = getattr(self, field_name)
            if thresholds.keys() != expected.keys():
                raise ValueError(
                    f"{field_name} must have one entry per layer for rule {self.rule!r}: "
                    + _difference(expected, thresholds, "layers", field_name)
                )
            for name, threshold in thresholds.items():
                _check_threshold(f"{field_name}[{name!r}]", threshold, self.layers[name])

    def for_part(self, model: nn.Module, mlps: Sequence[MLPShape]) -> CatsConfig:
        """This config with the names that its MLPs have in ``model``, where they differ by the base model's prefix.

        transformers loads the same checkpoint with and without a head: ``model.layers.0.mlp`` of a causal language
        model is ``layers.0.mlp`` of its base model.
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names = {mlp.name for mlp in mlps}
        for rename in (lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
            if names != self.layers.keys() and {rename(name) for name in self.layers} == names:
                parts = ("thresholds", "down_thresholds", "layers", "statistics")
                return replace(
                    self, **{part: {rename(name): v for name, v in getattr(self, part).items()} for part in parts}
                )
        return self

    def check_fits(self, model: nn.Module, mlps: Sequence[MLPShape]) -> None:
        """Raise ValueError unless the config was made for a model of this kind."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type != self.model_type:
            raise ValueError(f"config is for a model of type {self.model_type!r}, got one of type {model_type!r}")
        names = [mlp.name for mlp in mlps]
        if set(names) != self.layers.keys():
            raise ValueError(
                f"config has {len(self.layers)} MLPs and the model {len(names)}: "
                + _difference(self.layers, names, "the config", "the model")
            )
        for mlp in mlps:
            layer = self.layers[mlp.name]
            for attribute in ("hidden_size", "intermediate_size", "activation", "experts"):
                want, have = getattr(layer, attribute), getattr(mlp, attribute)
                if want != have:
                    raise ValueError(f"config has {attribute} {want!r} for {mlp.name}, the model has {have!r}")

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, ready for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            **{key: getattr(self, key) for key in _PLAIN_FIELDS},
            "bytes_share": self.bytes_share,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``cats_config.json`` and ``cats_thresholds.safetensors`` into a directory, made if missing.

        Both files are complete on disk before they replace earlier ones. After an error the earlier ones are back.

        Args:
            save_directory: made if missing; other files in it stay.

        Raises:
            TypeError, ValueError: the config is not valid.
            OSError: a file cannot be written.
        """
        self.validate()
        tensors = {f"{name}.threshold": t.cpu().contiguous() for name, t in self.thresholds.items()}
        tensors |= {f"{name}.down_threshold": t.cpu().contiguous() for name, t in self.down_thresholds.items()}
        numbers: dict[str, dict[str, int]] = {}  # what the counts of each layer stand for
        for name, statistics in self.statistics.items():
            parts, numbers[name] = statistics.pack()
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        if self.losses is not None:
            tensors |= {"search.options": self.losses.options, "search.losses": self.losses.losses}
            tensors["search.spread"] = torch.tensor(self.losses.spread, dtype=torch.float64)
        save_config_files(Path(save_directory), self.to_dict() | {"statistics": numbers}, tensors)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> CatsConfig:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            directory: also one of a CATS checkpoint.

        Returns:
            The config, validated.

        Raises:
            FileNotFoundError: the directory or one of the two files is missing.
            ValueError: a file is not what was written (format, hash), or its contents are not valid.
        """
        document, tensors = load_config_files(Path(directory))
        try:
            return cls._from_parts(document, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"missing entry {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{Path(directory) / CONFIG_FILE} is not a valid CATS config: {what}") from error

    @classmethod
    def _from_parts(cls, document: dict[str, Any], tensors: dict[str, Tensor]) -> CatsConfig:
        document = {"last_gate_power": document["gate_power"], **document}  # earlier files had one power
        layers = {name: LayerConfig(**entry) for name, entry in document["layers"].items()}
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*layers, *document["statistics"], "search")}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        thresholds, down_thresholds = (
            {name: parts[name].pop(key) for name in layers if key in parts[name]}
            for key in ("threshold", "down_threshold")
        )
        statistics = {name: LayerStatistics.unpack(parts[name], n) for name, n in document["statistics"].items()}
        search, losses = parts.pop("search"), None
        if search:
            losses = LossTable(search["options"], search["losses"], float(search.get("spread", 1.0)))
        config = cls(
            thresholds=thresholds,
            down_thresholds=down_thresholds,
            layers=layers,
            statistics=statistics,
            losses=losses,
            **{key: document[key] for key in _PLAIN_FIELDS},
        )
        unknown = [f"{name}.{key}" for name, left in parts.items() for key in left]
        if unknown:
            raise ValueError(f"{THRESHOLDS_FILE} has entries for no layer: {', '.join(sorted(unknown))}")
        return config


def thresholds_of(
    statistics: dict[str, LayerStatistics], targets: dict[str, tuple[float, float]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Thresholds and down thresholds by name, for the up and down sparsity in ``targets``."""
    both = {name: statistics[name].thresholds(*target) for name, target in targets.items()}
    down_thresholds = {name: down for name, (_, down) in both.items() if down is not None}
    return {name: threshold for name, (threshold, _) in both.items()}, down_thresholds


def _check_threshold(name: str, threshold: Tensor, layer: LayerConfig) -> None:
    if not isinstance(threshold, Tensor) or threshold.dtype != torch.float32:
        kind = threshold.dtype if isinstance(threshold, Tensor) else type(threshold).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {kind}")
    shapes = [()] if layer.experts else [(), (layer.intermediate_size,)]
    if threshold.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {expected}, got {list(threshold.shape)}")
    bad = threshold[~(threshold >= 0)]  # the negation catches NaN
    if len(bad):
        raise ValueError(f"{name} must be >= 0, got {float(bad[0])}")


def _difference(left: Iterable[str], right: Iterable[str], left_name: str, right_name: str) -> str:
    """The names that only one side has, three of each at most."""
    parts = []
    for only, other, label in ((left, right, left_name), (right, left, right_name)):
        names = [name for name in only if name not in set(other)]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"only in {label}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)
