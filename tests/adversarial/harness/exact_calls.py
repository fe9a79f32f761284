"""Right calls of ``torch.ops.cats.exact_mlp`` from a seed, and what they give in fp64."""

from __future__ import annotations

import random
from typing import Any

from support.exact_cases import FORMS, Arguments, make
from support.op_cases import DTYPES
from torch import Tensor

MAY_BE_MISSING = ("w_up", "gate_bias", "up_bias", "down_bias")


def arguments(r: random.Random) -> dict[str, Any]:
    """Of one call, by name."""
    hidden = r.choice([1, r.randint(1, 120), 8 * r.randint(1, 30), r.choice([1024, 2048])])
    call = make(
        r.choice(list(FORMS)),
        tokens=r.choice([0, 1, 1, 2, r.randint(1, 20)]),
        hidden=hidden,
        intermediate=r.randint(1, 40) if hidden > 500 else r.choice([1, r.randint(1, 150), 8 * r.randint(1, 20)]),
        dtype=r.choice(DTYPES),
        bias=r.random() < 0.3,
        cut=r.choice([0, 0, -1.25, 1]),
        padding=r.choice([0, 0, 8, r.randint(1, 9)]),
        seed=r.randint(0, 10**6),
    )
    x = call.named["x"]
    call.named["x"] = r.choice([x, x[None], x[0] if len(x) else x])
    return call.named | {"deterministic": r.random() < 0.5}


def expected(given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """The output in fp64, and how far a right one may be from it."""
    call = Arguments({name: t.cpu() if isinstance(t, Tensor) else t for name, t in given.items()})
    return call.expected(), call.tolerance(given["x"].dtype)
