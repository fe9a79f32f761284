"""Who is told when a model is patched or quantised: the integrations, of which patching then need not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cats_ext.thresholds.config import CatsConfig


@dataclass(frozen=True)
class PatchListener:
    """Functions that are called with the model, out of its wrappers.

    Attributes:
        check: before patching or calibration; raises ``ValueError`` to refuse the model.
        patched: after all MLPs have been made sparse. If it raises, the model is made dense again.
        quantized: after weights have been replaced by packed rows. If it raises, the dense ones are put back.
        removing: before MLPs are made dense, and also where ``patched`` or ``quantized`` has not come to its end. After
            an interrupt it is called again.
    """

    check: Callable[[nn.Module], None]
    patched: Callable[[nn.Module, CatsConfig], None]
    quantized: Callable[[nn.Module], None]
    removing: Callable[[nn.Module], None]


_listeners: list[PatchListener] = []


def add_listener(listener: PatchListener) -> None:
    """Tell ``listener`` of every model that is patched from now on."""
    _listeners.append(listener)


def check(model: nn.Module) -> None:
    for listener in _listeners:
        listener.check(model)


def patched(model: nn.Module, config: CatsConfig) -> None:
    for listener in _listeners:
        listener.patched(model, config)


def quantized(model: nn.Module) -> None:
    for listener in _listeners:
        listener.quantized(model)


def removing(model: nn.Module) -> None:
    for listener in _listeners:
        listener.removing(model)
