"""``cats env``: what this installation is."""

from __future__ import annotations

from cats_ext import env as environment
from cats_ext.cli import options
from cats_ext.cli.common import print_json


def env(json: options.Json = False) -> None:
    """Versions, devices, and which kernels are compiled in and loaded. Goes into every bug report.

    Examples:

    $ cats env

    $ cats env --json
    """
    report = environment.collect()
    if json:
        print_json(report)
    else:
        print(environment.describe(report))
