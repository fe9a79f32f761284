"""``cats env``: what this installation is."""

from __future__ import annotations

import sys

from cats_ext import env as environment
from cats_ext.cli.common import Json, one_sentence_errors, print_json


@one_sentence_errors
def env(json: Json = False) -> None:
    """Versions, devices, and which kernels are compiled in and loaded. Goes into every bug report.

    Examples:

    $ cats env

    $ cats env --json
    """
    report = environment.collect()
    if json:
        print_json(report)
    else:
        sys.stdout.write(environment.describe(report) + "\n")
