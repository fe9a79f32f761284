"""What a captured step has fixed and what a filled cache depends on, read from the model before each call.

It is read at every call, so loops over modules and tensors are comprehensions or ``map`` of built-in functions. Modules
and weights are not kept between two calls, so that one that is replaced is freed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from cats_ext.patching.wrappers import FORWARD_HOOKS, FORWARD_PRE_HOOKS
from cats_ext.rows import RowFormat

_BASE = frozenset(vars(nn.Module()))  # the attributes of every module; settings are the others
_PLAIN = {bool, int, float, str, set, frozenset, torch.dtype, torch.device, type(None), RowFormat}
_THRESHOLDS = ("threshold", "down_threshold", "input_threshold")  # of patched modules, written in place by set_sparsity

_children, _parameters, _buffers = map(itemgetter, ("_modules", "_parameters", "_buffers"))
_hooks = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks")
_place = Tensor.data_ptr, Tensor.stride, attrgetter("dtype", "shape")


class Fingerprint:
    """Reads the state of ``model``, and remembers which attributes its modules have."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sizes: list[int] = []  # attributes of each module
        self._getters: list[tuple[int, Callable[[dict], tuple]]] = []  # index of a module, getter of its settings
        self._values: list[Any] = []  # all settings, as they are
        self._settings: list[Any] = []  # and as they are compared
        self._mutable: list[int] = []  # indices of settings that can change without an assignment

    def read(self) -> tuple[tuple, list[int]]:
        """Read the model.

        Returns:
            state: what a captured step has fixed: the classes, hooks and settings of all modules, the places of all
                tensors, and torch's modes.
            versions: how often each weight and threshold has been written in place. The keys and values in a cache
                depend on them besides. Writes through ``.data`` do not count.
        """
        modules, attributes = _modules(self._model)
        slots = [t for group in map(_parameters, attributes) for t in group.values()]
        parameters = [t for t in slots if t is not None]
        # Which module a tensor belongs to: a bias that moves to another module leaves the list of tensors as it was.
        owners = [list(map(len, map(read, attributes))) for read in (_parameters, _buffers)]
        absent = [i for i, t in enumerate(slots) if t is None]
        buffers = [(n, t) for group in map(_buffers, attributes) if group for n, t in group.items() if t is not None]
        tensors = [*parameters, *(t for _, t in buffers)]
        places = [list(map(read, tensors)) for read in _place]
        hooks = [[(i, *group) for i, group in enumerate(map(get, attributes)) if group] for get in _hooks]
        hooks += list(FORWARD_PRE_HOOKS), list(FORWARD_HOOKS)
        settings = self._read_settings([*attributes, vars(self._model.config.get_text_config())])
        device = self._model.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        modes = autocast, torch.are_deterministic_algorithms_enabled()
        thresholds = [t for name, t in buffers if name in _THRESHOLDS]
        state = list(map(type, modules)), settings, hooks, places, owners, absent, modes
        return state, _versions([*parameters, *thresholds])

    def _read_settings(self, attributes: list[dict]) -> tuple[list, list, list]:
        if not self._assigned_nothing(attributes):
            self._sizes = list(map(len, attributes))
            names = [[name for name in a if name not in _BASE] for a in attributes]
            # One name twice, so that a single setting comes as a tuple too.
            self._getters = [(i, itemgetter(*n, n[0])) for i, n in enumerate(names) if n]
            self._values = [value for i, get in self._getters for value in get(attributes[i])]
            self._settings = [_setting(value) for value in self._values]
            self._mutable = [i for i, value in enumerate(self._values) if not _is_fixed(value)]
        return self._sizes, self._settings, [_setting(self._values[i]) for i in self._mutable]

    def _assigned_nothing(self, attributes: list[dict]) -> bool:
        """Whether all settings are the same objects as at the last call."""
        if list(map(len, attributes)) != self._sizes:
            return False
        try:
            values = [get(attributes[i]) for i, get in self._getters]
        except KeyError:
            return False
        return all(map(is_, chain.from_iterable(values), self._values))


def version(t: Tensor) -> int:
    """How often ``t`` has been written in place; 0 for a tensor made in inference mode, which has no count."""
    return 0 if t.is_inference() else t._version


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # one of them was made in inference mode
        return list(map(version, tensors))


def _modules(model: nn.Module) -> tuple[list[nn.Module], list[dict]]:
    """All modules and their attributes, level by level. ``model.modules()`` looks for repetitions: 3 times as long."""
    modules, attributes, level = [], [], [model]
    while level:
        modules += level
        level_attributes = list(map(vars, level))
        attributes += level_attributes
        level = [m for group in map(_children, level_attributes) if group for m in group.values() if m is not None]
    return modules, attributes


def _setting(value: object) -> object:
    """An attribute as it is compared: plain values and functions by ``==``, tensors by place, others by class."""
    kind = type(value)
    if kind in _PLAIN or callable(value):
        return value
    if issubclass(kind, list | tuple):
        return [_setting(v) for v in value]
    if issubclass(kind, dict):
        return [(key, _setting(v)) for key, v in value.items()]
    return [read(value) for read in _place] if issubclass(kind, Tensor) else kind


def _is_fixed(value: object) -> bool:
    """Whether a setting compares the same as long as it is the same object."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return not isinstance(value, list | dict | Tensor)
