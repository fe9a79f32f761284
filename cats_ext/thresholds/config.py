"""CatsConfig: the thresholds of one model, and what they were made from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cats_ext.thresholds.allocation import LossTable
from cats_ext.thresholds.files import CONFIG_FILE, FORMAT_VERSION, load_config_files, pack_files, save_config_files
from cats_ext.thresholds.fit import MLPShape, check_mlp_weights, check_sample, difference
from cats_ext.thresholds.rules import (
    RULES,
    Split,
    budget_of,
    bytes_share,
    check_bool,
    check_choice,
    check_count,
    check_sparsity,
    check_tensor,
    check_usable,
    check_weights,
    has_down_threshold,
    has_input_threshold,
    sparsity_split,
)
from cats_ext.thresholds.statistics import LARGEST, LayerStatistics, thresholds_of

_PLAIN_FIELDS = (
    *("rule", "sparsity", "gate_power", "last_gate_power", "importance", "sparse_prefill", "model_type", "calibration"),
)
_ABSENT = (("experts", None), ("input_sparsity", 0.0))  # of a layer's entries in the file


@dataclass(frozen=True)
class LayerConfig:
    """One gated MLP: its shape and activation, and the shares of its neurons that the thresholds were set to skip."""

    hidden_size: int
    intermediate_size: int
    activation: str
    up_sparsity: float  # of the rows of up_proj
    down_sparsity: float  # of the rows of down_proj, laid out by neuron
    experts: int | None = None  # number of experts in the module, each of this shape, with common thresholds
    input_sparsity: float = 0.0  # of the columns of gate_proj, laid out by input

    @property
    def split(self) -> Split:
        return Split(self.up_sparsity, self.down_sparsity, self.input_sparsity)

    @property
    def bytes_share(self) -> float:
        """Share of the dense MLP's weight bytes that one token reads."""
        return bytes_share(*self.split)

    def validate(self, name: str) -> None:
        """Raise TypeError or ValueError, which name the layer, unless every entry is in its range."""
        for key, least in (("hidden_size", 1), ("intermediate_size", 1), ("experts", 1)):
            value = getattr(self, key)
            if key != "experts" or value is not None:
                check_count(f"layers[{name!r}].{key}", value, least, 2**31)
        if not isinstance(self.activation, str):
            raise TypeError(f"layers[{name!r}].activation must be a name, got {self.activation!r:.50}")
        for key in ("up_sparsity", "down_sparsity", "input_sparsity"):
            check_sparsity(f"layers[{name!r}].{key}", getattr(self, key))

    def to_dict(self) -> dict[str, Any]:
        """Without the entries that few layers have, where they say nothing."""
        return {key: value for key, value in asdict(self).items() if (key, value) not in _ABSENT}

    @classmethod
    def from_dict(cls, name: str, entry: Any) -> LayerConfig:
        known, optional = [f.name for f in fields(cls)], dict(_ABSENT).keys()
        if not isinstance(entry, dict) or not {*known} - optional <= entry.keys() <= {*known}:
            raise TypeError(f"layers[{name!r}] must be an object with {', '.join(known)}, got {entry!r:.80}")
        return cls(**entry)


@dataclass(eq=False)  # tensors have no truth value
class CatsConfig:
    """Thresholds by MLP name, their target sparsity, and how they were calibrated.

    A neuron is kept if ``|act(g)| >= threshold`` and, given a down threshold, ``|act(g) u| >= down_threshold``. Given
    an input threshold, ``g`` is computed from the inputs with ``|x| >= input_threshold``.

    Attributes:
        thresholds: float32 ``[]`` or ``[I]`` by module name.
        down_thresholds: likewise; empty for the plain rule.
        input_thresholds: float32 ``[]`` by module name; empty for all rules but ``three_threshold``.
        layers: shape, activation and targets by module name, in the model's order. With ``model_type`` they are the
            fingerprint that tells a config for another model.
        rule, sparsity, gate_power, last_gate_power, importance: as given to :func:`cats_ext.calibrate`.
        sparse_prefill: False computes every input of more than one position a sequence densely: prompts, and the
            verification of drafted tokens. The prompt then loses no quality; generated text may still differ.
        calibration: tokens, windows, sequence_length, seed and package version of the calibration.
        statistics: what calibration counted, by module name; thresholds for any other sparsity follow from it
            (:meth:`at_sparsity`). Empty in a config made by hand.
        losses: of each layer at each sparsity, if calibration searched an allocation; None if all layers are alike.
        weights: a sample of the weights that the thresholds were made for, by module name, by which a config for other
            weights is refused; ``dataclasses.replace(config, weights={})`` fits them all.
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
    input_thresholds: dict[str, Tensor] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, LayerStatistics] = field(default_factory=dict, repr=False)
    losses: LossTable | None = field(default=None, repr=False)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

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
            down_sparsity: as there; None for the rule's default split, or for the allocation over layers that
                calibration found.

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

    def with_targets(self, targets: dict[str, tuple[float, ...]], sparsity: float) -> CatsConfig:
        """As :meth:`at_sparsity`, with a split of each layer's own.

        Args:
            targets: by layer name the shares to skip of up, of down and, if inputs are tested, of the gate's columns.
            sparsity: the new config's entry ``sparsity``.

        Returns:
            The new config.

        Raises:
            ValueError: the config has no statistics of a layer.
        """
        missing = [name for name in self.layers if name not in self.statistics]
        if missing:
            raise ValueError(f"config has no calibration statistics for {missing[0]}: calibrate the model again")
        splits = {name: Split(*targets[name]) for name in self.layers}
        layers = {
            name: replace(layer, **{f"{matrix}_sparsity": share for matrix, share in splits[name]._asdict().items()})
            for name, layer in self.layers.items()
        }
        return replace(self, **thresholds_of(self.statistics, splits), layers=layers, sparsity=sparsity)

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the config is complete and every threshold is usable."""
        check_sparsity("sparsity", self.sparsity)
        check_choice("rule", self.rule, RULES)
        check_weights(self.rule, self.gate_power, self.last_gate_power, self.importance)
        check_bool("sparse_prefill", self.sparse_prefill)
        if not self.layers:
            raise ValueError("layers must name at least one MLP, got none")
        if not isinstance(self.model_type, str | None) or not isinstance(self.calibration, dict):
            raise TypeError(
                f"model_type must be a name or None and calibration a dict, got {self.model_type!r:.50} and "
                f"{self.calibration!r:.50}"
            )
        for name, layer in self.layers.items():
            layer.validate(name)
            if layer.input_sparsity and not has_input_threshold(self.rule):
                raise ValueError(
                    f"layers[{name!r}].input_sparsity must be 0 for rule {self.rule!r}, got {layer.input_sparsity}"
                )
        for field_name, wanted in (
            ("thresholds", True),
            ("down_thresholds", has_down_threshold(self.rule)),
            ("input_thresholds", has_input_threshold(self.rule)),
        ):
            thresholds: dict[str, Tensor] = getattr(self, field_name)
            expected = self.layers if wanted else {}
            if thresholds.keys() != expected.keys():
                raise ValueError(
                    f"{field_name} must have one entry per layer for rule {self.rule!r}: "
                    + difference(expected, thresholds, "layers", field_name)
                )
            for name, threshold in thresholds.items():
                per_neuron = field_name != "input_thresholds" and not self.layers[name].experts
                shapes = [(), (self.layers[name].intermediate_size,)] if per_neuron else [()]
                check_tensor(f"{field_name}[{name!r}]", threshold, (torch.float32,), shapes)
                check_usable(f"{field_name}[{name!r}]", threshold)
        if self.weights and self.weights.keys() != self.layers.keys():
            raise ValueError(
                "weights must have one entry per layer: " + difference(self.layers, self.weights, "layers", "weights")
            )
        for name, statistics in self.statistics.items():
            if name in self.layers:
                statistics.check_shapes(name, self.thresholds[name], self.down_thresholds.get(name))
        for name, sample in self.weights.items():
            check_sample(f"weights[{name!r}]", sample)

    def for_part(self, model: nn.Module, mlps: Sequence[MLPShape]) -> CatsConfig:
        """This config with the names that its MLPs have in ``model``, where they differ by the base model's prefix.

        transformers loads the same checkpoint with and without a head: ``model.layers.0.mlp`` of a causal language
        model is ``layers.0.mlp`` of its base model.
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names = {mlp.name for mlp in mlps}
        for rename in (lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
            if names != self.layers.keys() and {rename(name) for name in self.layers} == names:
                parts = ("thresholds", "down_thresholds", "input_thresholds", "layers", "statistics", "weights")
                return replace(
                    self, **{part: {rename(name): v for name, v in getattr(self, part).items()} for part in parts}
                )
        return self

    def check_fits(self, model: nn.Module, mlps: Sequence[MLPShape]) -> None:
        """Raise ValueError unless the config was made for a model of this kind and, if it has them, these weights."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type != self.model_type:
            raise ValueError(f"config is for a model of type {self.model_type!r}, got one of type {model_type!r}")
        names = [mlp.name for mlp in mlps]
        if set(names) != self.layers.keys():
            raise ValueError(
                f"config has {len(self.layers)} MLPs and the model {len(names)}: "
                + difference(self.layers, names, "the config", "the model")
            )
        for mlp in mlps:
            layer = self.layers[mlp.name]
            for attribute in ("hidden_size", "intermediate_size", "activation", "experts"):
                want, have = getattr(layer, attribute), getattr(mlp, attribute)
                if want != have:
                    raise ValueError(f"config has {attribute} {want!r} for {mlp.name}, the model has {have!r}")
        for mlp in mlps:
            if mlp.name in self.weights:
                check_mlp_weights(mlp, self.weights[mlp.name])

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
        """Write ``cats_config.json`` and ``cats_thresholds.cats`` into a directory, made if missing.

        Both files are complete on disk before they replace earlier ones. After an error the earlier ones are back.

        Args:
            save_directory: made if missing; other files in it stay.

        Raises:
            TypeError, ValueError: the config is not valid.
            OSError: a file cannot be written.
        """
        save_config_files(Path(save_directory), self.to_files())

    def to_files(self) -> dict[str, bytes]:
        """The contents of the two files that :meth:`save_pretrained` writes, by name.

        Raises:
            TypeError, ValueError: the config is not valid.
        """
        self.validate()
        tensors = {f"{name}.threshold": t.cpu().contiguous() for name, t in self.thresholds.items()}
        tensors |= {f"{name}.down_threshold": t.cpu().contiguous() for name, t in self.down_thresholds.items()}
        tensors |= {f"{name}.input_threshold": t.cpu().contiguous() for name, t in self.input_thresholds.items()}
        tensors |= {f"{name}.weights": t.cpu().contiguous() for name, t in self.weights.items()}
        numbers: dict[str, dict[str, int]] = {}  # what the counts of each layer stand for
        for name, statistics in self.statistics.items():
            parts, numbers[name] = statistics.pack()
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        if self.losses is not None:
            tensors |= {f"search.{key}": tensor for key, tensor in self.losses.pack().items()}
        return pack_files(self.to_dict() | {"statistics": numbers}, tensors)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> CatsConfig:
        """Read what :meth:`save_pretrained` wrote.

        Files of format version 2 have no sample of the weights: a warning says that they cannot be told from those for
        another model of the same shape.

        Args:
            directory: also one of a CATS checkpoint.

        Returns:
            The config, validated.

        Raises:
            FileNotFoundError: the directory or one of the two files is missing.
            ValueError: a file is not what was written (format, hash), or its contents are not valid.
        """
        with torch.device("cpu"):  # not "meta", under which transformers loads a model
            document, tensors = load_config_files(Path(directory))
        path, version = Path(directory) / CONFIG_FILE, document["format_version"]
        if version < FORMAT_VERSION:
            warnings.warn(
                f"{path} is of format version {version}, which does not say for which weights its thresholds are: only "
                "the names and shapes of layers are compared with the model's; save it again once it is in use",
                UserWarning,
                stacklevel=2,
            )
        try:
            with torch.device("cpu"):
                return cls._from_parts(document, tensors)
        except (KeyError, TypeError, ValueError) as error:
            what = f"missing entry {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} is not a valid CATS config: {what}") from error

    @classmethod
    def _from_parts(cls, document: dict[str, Any], tensors: dict[str, Tensor]) -> CatsConfig:
        document = {"last_gate_power": document["gate_power"], **document}  # earlier files had one power
        check_choice("rule", document["rule"], RULES)
        for key in ("layers", "statistics"):
            if not isinstance(document[key], dict):
                raise TypeError(f"{key} must be an object, got {document[key]!r:.50}")
        layers = {name: LayerConfig.from_dict(name, entry) for name, entry in document["layers"].items()}
        for name, layer in layers.items():
            layer.validate(name)
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*layers, "search")}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        thresholds, down_thresholds, input_thresholds, weights = (
            {name: parts[name].pop(key) for name in layers if key in parts[name]}
            for key in ("threshold", "down_threshold", "input_threshold", "weights")
        )
        if document["format_version"] < FORMAT_VERSION:  # infinite where a neuron has no weight
            for values in (thresholds, down_thresholds):
                values |= {n: t.clamp(max=LARGEST) for n, t in values.items() if t.dim() and t.dtype == torch.float32}
        statistics, last = {}, next(reversed(layers), None)
        for name, numbers in document["statistics"].items():
            if name not in layers:
                raise ValueError(f"statistics has an entry for no layer: {name!r:.80}")
            statistics[name] = LayerStatistics.unpack(parts[name], numbers, layers[name].intermediate_size)
            power = document["last_gate_power" if name == last else "gate_power"]
            statistics[name].check_rule(name, document["rule"], power != 0, layers[name].experts is None)
        search = parts.pop("search")
        losses = LossTable.unpack(search, len(layers)) if search else None
        unknown = [f"{name}.{key}" for name, left in (*parts.items(), ("search", search)) for key in left]
        if unknown:
            raise ValueError(f"there are tensors for no layer: {', '.join(sorted(unknown)[:3])}")
        return cls(
            thresholds=thresholds,
            down_thresholds=down_thresholds,
            input_thresholds=input_thresholds,
            layers=layers,
            statistics=statistics,
            losses=losses,
            weights=weights,
            **{key: document[key] for key in _PLAIN_FIELDS},
        )
