"""An extension of griffe: a default like ``CalibrationSettings.rule`` is shown as that field's value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe


class SettingsDefaults(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                if isinstance(parameter.default, griffe.ExprAttribute):
                    owner, _, field = parameter.default.canonical_path.rpartition(".")
                    if owner.startswith(f"{pkg.name}.") and field in loader.modules_collection[owner].members:
                        parameter.default = loader.modules_collection[owner].members[field].value


def _functions(module: griffe.Module) -> Iterator[griffe.Function]:
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_function:
            yield member
        elif member.is_module:
            yield from _functions(member)
