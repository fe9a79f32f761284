"""sparse_mlp and sparse_mlp_packed on random cases against the fp64 reference: shapes, dtypes, formats, strides, rules
and masks that nobody picked.

CATS_RANDOM_CASES=10000 runs that many on a GPU, CATS_RANDOM_SEED=1 other ones, there and on the CPU. Case n of a seed
is the same whatever runs before it, so that a failure's repr is enough to run it alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, TOLERANCE
from support.packed_rows import random_rows
from torch import Tensor

from cats_ext import ops
from cats_ext.ops import reference
from cats_ext.rows import FORMATS

CASES = {"cpu": 150, "cuda": int(os.environ.get("CATS_RANDOM_CASES", 400))}
SEED = int(os.environ.get("CATS_RANDOM_SEED", 0))
BATCH = 250  # cases between two synchronisations
# What is allowed to sums over int4 rows on the tensor cores, beside the rounding of the result: a part of the norm of
# what is summed up. Their errors have a root mean square of 2^-20 of it; the largest that was seen is 2^-15.9. Those of
# int8 and fp8 rows are 2^-23 and 2^-19.9, and need no allowance (bench/results/h200/packed_rounding.log). Most likely
# bits of subnormal operands are lost where products are aligned.
INT4_SUMS = 2.0**-15
MARGIN = 1e-5  # no value is nearer to its threshold, relative to 1 + threshold, so that rounding changes no mask
KINDS = ["zero", "scalar", "scalar", "vector", "vector", "infinite"]


@dataclass(frozen=True)
class RandomCase:
    seed: int
    dtype: torch.dtype
    tokens: int
    hidden: int
    intermediate: int
    padding: tuple[int, int]  # elements before and after each row of the weights
    merged: bool  # gate and up are halves of one tensor
    threshold: str
    down_threshold: str | None
    sparsity: float
    activation: str
    biases: tuple[bool, bool, bool]
    counted: bool
    deterministic: bool
    formats: tuple[str, ...] = ()  # of packed rows: of gate, up and down


def random_case(n: int) -> RandomCase:
    seed = SEED * 1_000_003 + n
    r = random.Random(seed)
    # Odd lengths, lengths of whole 16-byte copies, and a few long enough for several warps a row.
    hidden = r.choice(
        [r.randint(1, 200), 8 * r.randint(1, 80), 8 * r.randint(1, 80), r.choice([1024, 2048, 3584, 4096])]
    )
    if hidden >= 1024:
        intermediate = r.randint(1, 150)
    else:  # beyond some thousand, a GPU's teams have several batches each
        intermediate = r.choice([r.randint(1, 400)] * 4 + [r.randint(1000, 6000)])
    return RandomCase(
        seed,
        dtype=r.choice(DTYPES),
        tokens=r.choice([1, 1, 2, 3, 4, r.randint(1, 16), r.randint(5, 16)]),
        hidden=hidden,
        intermediate=intermediate,
        padding=r.choice([(0, 0), (0, 0), (0, 8), (8, 24), (r.randint(0, 9), r.randint(0, 9))]),
        merged=r.random() < 0.2,
        threshold=r.choice(KINDS),
        down_threshold=r.choice([None, None, *KINDS]),
        sparsity=r.choice([0.05, 0.5, 0.9, r.random()]),
        activation=r.choice(ACTIVATIONS),
        biases=(r.random() < 0.3, r.random() < 0.3, r.random() < 0.3),
        counted=r.random() < 0.3,
        deterministic=r.random() < 0.2,
    )


def packed_case(n: int) -> RandomCase:
    """As ``random_case``, on packed rows in one format or in three, of a width that their groups divide."""
    case = random_case(n)
    r = random.Random(-1 - case.seed)
    formats = [r.choice(list(FORMATS))] * 3 if r.random() < 0.6 else r.choices(list(FORMATS), k=3)
    group = max(1, *(FORMATS[name].group_size for name in formats))
    padding = tuple(16 * (n // 8) for n in case.padding)
    return replace(case, formats=tuple(formats), hidden=-(-case.hidden // group) * group, padding=padding)


def midway(low: Tensor, high: Tensor) -> Tensor:
    """Thresholds between values that are far enough from each other; 0, which keeps all, where they are not."""
    middle = (low + high) / 2
    return torch.where((high - low) > 2 * MARGIN * (1 + middle), middle, 0).float()


def make_threshold(kind: str, values: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """A threshold on absolute ``values`` ``[M, I]``, chosen without a synchronisation."""
    if kind in ("zero", "infinite"):
        return torch.full((), float("inf") if kind == "infinite" else 0.0, device=values.device)
    if kind == "scalar":
        # the widest of the gaps near the quantile
        by_size = torch.cat([values.new_zeros(1), values.flatten().sort().values])
        middle = int(sparsity * (len(by_size) - 2))
        near = by_size[max(0, middle - 8) : middle + 10]
        at = (near[1:] - near[:-1]).argmax().view(1)
        return midway(near[at], near[at + 1]).squeeze(0)
    # for each neuron between two of its tokens, or below or above all of them
    by_size = torch.cat([values.new_zeros(1, values.shape[1]), values.sort(0).values])
    by_size = torch.cat([by_size, 2 * by_size[-1:]])
    at = torch.rand(1, values.shape[1], generator=generator, device=values.device) * len(values) + sparsity
    at = at.long().clamp(0, len(values))
    return midway(by_size.gather(0, at), by_size.gather(0, at + 1)).squeeze(0)


def excess(actual: Tensor, expected: Tensor, rtol: float, atol: float, of_sums: Tensor | float = 0.0) -> Tensor:
    """The largest error as a multiple of what is allowed; infinite if anything is NaN."""
    error = (actual.double() - expected).abs() / (atol + rtol * expected.abs() + of_sums)
    return error.amax().nan_to_num(nan=float("inf"))


def run(case: RandomCase, device: str) -> Tensor:
    """How many times the allowed error the op's result is off; infinite for wrong counts or results that vary."""
    generator = torch.Generator(device).manual_seed(case.seed)
    hidden, intermediate = case.hidden, case.intermediate

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(case.dtype)

    def weight(rows: int, scale: float, row_format: str) -> Tensor:
        before, after = case.padding
        if not row_format:
            return normal(rows, before + hidden + after, scale=scale)[:, before : before + hidden]
        packed = random_rows(FORMATS[row_format], rows, hidden, scale, generator)
        return torch.nn.functional.pad(packed, (before, after), value=0x7E)[:, before : before + packed.shape[1]]

    x = normal(case.tokens, hidden)
    gate_format, up_format, down_format = case.formats or ("", "", "")
    if case.merged and gate_format == up_format:
        w_gate, w_up = weight(2 * intermediate, hidden**-0.5, gate_format).chunk(2)
    else:
        w_gate, w_up = (weight(intermediate, hidden**-0.5, name) for name in (gate_format, up_format))
    weights = (w_gate, w_up, weight(intermediate, intermediate**-0.5, down_format))
    stand_for = [FORMATS[f].unpack(w, hidden) for f, w in zip(case.formats, weights, strict=False)] or weights
    sizes = (intermediate, intermediate, hidden)
    biases = [normal(size, scale=0.3) if bias else None for size, bias in zip(sizes, case.biases, strict=True)]

    exact = [None if t is None else t.double() for t in (x, *stand_for, *biases)]
    g = torch.nn.functional.linear(exact[0], exact[1], exact[4])
    u = torch.nn.functional.linear(exact[0], exact[2], exact[5])
    v = reference.ACTIVATIONS[case.activation](g)
    h = v * u
    threshold = make_threshold(case.threshold, v.abs(), case.sparsity, generator)
    down_threshold = None
    if case.down_threshold:
        down_threshold = make_threshold(case.down_threshold, h.abs(), (1 + case.sparsity) / 2, generator)
    rule = (threshold, down_threshold, case.activation)
    expected = reference.sparse_mlp_ref(*exact[:4], *rule, *exact[4:], compute_dtype=torch.float64)

    rest = (*case.formats, *rule, *biases, case.deterministic)
    op, counted_op = (
        (ops.sparse_mlp_packed, ops.sparse_mlp_packed_counted)
        if case.formats
        else (ops.sparse_mlp, ops.sparse_mlp_counted)
    )
    if case.counted:
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        y = counted_op(x, *weights, counts, *rest)
        kept = reference.keep(v, threshold)
        kept_down = kept if down_threshold is None else kept & reference.keep(h, down_threshold)
        right = (counts == torch.stack([torch.full((), v.numel(), device=device), kept.sum(), kept_down.sum()])).all()
    else:
        y = op(x, *weights, *rest)
        right = (y == op(x, *weights, *rest)).all() if case.deterministic else y.new_ones((), dtype=torch.bool)
    of_sums = 0.0
    if device == "cuda" and on_tensor_cores(case) and any(name.startswith("int4") for name in case.formats):
        of_sums = INT4_SUMS * spread(exact, h, v, u, (threshold, down_threshold))
    return torch.where(right, excess(y, expected, **TOLERANCE[case.dtype], of_sums=of_sums), float("inf"))


def on_tensor_cores(case: RandomCase) -> bool:
    return case.dtype != torch.float32 and not any("g32" in name for name in case.formats)


def spread(exact: list[Tensor | None], h: Tensor, v: Tensor, u: Tensor, thresholds: tuple) -> Tensor:
    """The norm of the terms that are summed up for each output, ``[M, H]``, of which a sum's error is a part.

    An error of a gate's sum reaches the output with the neuron's up value, and the other way round.
    """
    x, w_gate, w_up, w_down, *_ = exact
    of_gate, of_up = ((x.square() @ w.square().t()).sqrt() for w in (w_gate, w_up))
    of_h = h.abs() + u.abs() * of_gate + v.abs() * of_up
    kept = reference.masked(v, u, *thresholds) != 0
    return ((of_h.square() * kept) @ w_down.square()).sqrt()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draw", [random_case, packed_case])
def test_random_cases(draw, device):
    failed = []
    for first in range(0, CASES[device], BATCH):
        cases = [draw(n) for n in range(first, min(first + BATCH, CASES[device]))]
        errors = torch.stack([run(case, device) for case in cases]).tolist()
        failed += [
            f"{error:.3g} times the tolerance: {case}" for case, error in zip(cases, errors, strict=True) if error > 1
        ]
    assert not failed, "\n".join([f"{len(failed)} of {CASES[device]} cases", *failed[:10]])


def test_a_difference_is_seen():
    """What is measured tells a right from a wrong mask, from a wrong element, and from NaN."""
    y = torch.tensor([1.0, -2.0, 0.0])
    tolerance = TOLERANCE[torch.float32]
    assert excess(y, y.double(), **tolerance) == 0
    assert excess(y + torch.tensor([0, 1e-3, 0]), y.double(), **tolerance) > 10
    assert excess(y.clone().fill_(float("nan")), y.double(), **tolerance) == float("inf")


def test_thresholds_part_the_values():
    """Every kind that is drawn skips some neurons and keeps some, clear of all values."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 300, generator=generator).double().abs()
    for kind in ("scalar", "vector"):
        threshold = make_threshold(kind, values, 0.5, generator)
        share = float(reference.keep(values, threshold).double().mean())
        assert 0.2 < share < 0.8
        assert ((values - threshold).abs().amin(0) > MARGIN / 2).all()
