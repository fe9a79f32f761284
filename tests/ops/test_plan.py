"""Which kernel serves which shape, for many GPUs, without one: csrc/cuda/plan.h through cats_ext.ops.plan."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from cats_ext.native.library import LIBRARIES
from cats_ext.ops.plan import DeviceLimits, device_limits, plan

pytestmark = pytest.mark.skipif(not LIBRARIES["_C"].loaded, reason="needs the compiled library _C")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
KIB = 1024
GPUS = {
    "A100": DeviceLimits(80, 108, 163 * KIB),
    "RTX 3090": DeviceLimits(86, 82, 99 * KIB),
    "RTX 4090": DeviceLimits(89, 128, 99 * KIB),
    "L40": DeviceLimits(89, 142, 99 * KIB),
    "H100": DeviceLimits(90, 132, 227 * KIB),
    "B200": DeviceLimits(100, 148, 227 * KIB),
    "RTX 5090": DeviceLimits(120, 170, 99 * KIB),
}
H100, A100, RTX_4090 = GPUS["H100"], GPUS["A100"], GPUS["RTX 4090"]
MODELS = [(576, 1536), (896, 4864), (2048, 8192), (3072, 8192), (3584, 18944), (4096, 11008), (4096, 14336)]
MODELS += [(5120, 13824), (8192, 28672), (12288, 33792)]
ANY = [(1, 1), (42, 33), (64, 2), (1000, 333), (4224, 7), (4256, 20), (16384, 100), (16392, 100), (40_000, 9)]


def shapes():
    picked = random.Random(0)
    some = [(picked.randrange(1, 17_000), picked.randrange(1, 40_000)) for _ in range(60)]
    some += [(32 * picked.randrange(1, 520), picked.randrange(1, 40_000)) for _ in range(120)]
    return [*MODELS, *ANY, *some]


def launches(hidden, intermediate, tokens, dtype, limits, **form):
    """The plans of all launches for so many tokens."""
    found = []
    while tokens:
        found.append(plan(hidden, intermediate, tokens, dtype, limits, **form))
        tokens -= found[-1].tokens
    return found


def covers(p, hidden, columns_per_chunk):
    """Whether the registers of the threads have room for the row."""
    chunks = -(-hidden // columns_per_chunk)
    if p.kernel == "pipelined":
        return p.team_warps * min(p.chunks * 32, p.segment_chunks) >= chunks
    if p.kernel == "small":
        return p.chunks * 32 >= chunks
    if p.kernel == "batched":
        return 11 * p.column_groups * 32 >= hidden and p.row_stride >= 2 * hidden
    return p.kernel == "generic"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_shape_has_a_plan_within_the_limits(gpu):
    limits = GPUS[gpu]
    for (hidden, intermediate), dtype, tokens in product(shapes(), DTYPES, (1, 2, 3, 4, 5, 8, 9, 15)):
        for p in launches(hidden, intermediate, tokens, dtype, limits):
            case = (hidden, intermediate, dtype, tokens, p)
            assert p.supported and p.reason, case
            assert 1 <= p.tokens <= 8, case
            assert p.shared_bytes <= limits.shared_bytes - KIB, case  # 1 KiB is for what the kernels declare
            assert covers(p, hidden, 4 if dtype == F32 else 8), case
            assert 1 <= p.ctas <= limits.multiprocessors * (8 if p.kernel == "generic" else 1), case
            assert p.ctas <= intermediate, case
            assert 32 <= p.threads <= 1024, case
            assert p.bulk_copy == (limits.compute_capability >= 90 and p.kernel in ("pipelined", "batched")), case
            if p.kernel == "pipelined":
                assert p.tokens <= 2 and p.threads == 32 * p.teams * p.team_warps, case
                assert 1 <= p.slots <= 16 and p.slots * p.rows_per_batch <= 32, case
                assert p.first_batches * p.rows_per_batch <= 32, case  # one lane prefetches one row
            if p.kernel == "small":
                assert p.tokens == 1 and p.ctas * 8 * p.rows_per_batch >= intermediate, case
            if p.kernel == "batched":
                assert 2 <= p.tokens <= 8 and p.token_padding == {2: 2, 3: 4, 4: 4}.get(p.tokens, 8), case
                assert p.row_stride % 32 == 16, case  # an odd multiple of 16: ldmatrix reads 8 rows from all banks


@pytest.mark.parametrize("gpu", GPUS)
def test_groups_add_up(gpu):
    """Every launch takes as many tokens as the first, except the last ones."""
    for (hidden, intermediate), dtype, tokens in product(shapes()[::4], DTYPES, range(1, 25)):
        taken = [p.tokens for p in launches(hidden, intermediate, tokens, dtype, GPUS[gpu])]
        assert sum(taken) == tokens
        assert taken == sorted(taken, reverse=True)
        full = taken[0] if taken[0] in (1, 2, 4, 8) else 8
        assert set(taken[: tokens // full]) <= {full}


@pytest.mark.parametrize("gpu", GPUS)
def test_a_step_needs_the_pipelined_kernel(gpu):
    for (hidden, intermediate), dtype, aligned in product(shapes(), DTYPES, (True, False)):
        one = plan(hidden, intermediate, 1, dtype, GPUS[gpu], aligned=aligned)
        step = plan(hidden, intermediate, 1, dtype, GPUS[gpu], step=True, aligned=aligned)
        assert step.supported == (one.kernel == "pipelined"), (hidden, intermediate, dtype, one, step)
        if step.supported:
            assert (step.teams, step.team_warps, step.chunks) == (one.teams, one.team_warps, one.chunks)
            assert step.slots in (2, 3)


def test_no_step_of_more_tokens_or_with_deterministic_sums():
    assert not plan(4096, 14336, 2, BF16, H100, step=True).supported
    assert not plan(4096, 14336, 1, BF16, H100, step=True, deterministic=True).supported


def test_no_plan_without_a_layer_or_for_float64():
    assert not plan(4096, 14336, 0, BF16, H100).supported
    assert not plan(0, 14336, 1, BF16, H100).supported
    assert not plan(4096, 14336, 1, torch.float64, H100).supported
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, got torch.int8"):
        plan(4096, 14336, 1, torch.int8, H100)


# What serves the shapes that everything was measured with. A change here is a change of speed: measure it.
PINNED = [
    # Mistral-7B, one token: 16 warps of 16 KiB of columns. A team of 4 warps has them in 4 chunks a lane.
    (4096, 14336, 1, BF16, H100, dict(kernel="pipelined", teams=4, team_warps=4, chunks=4, rows_per_batch=2, slots=2)),
    (4096, 11008, 1, F16, H100, dict(kernel="pipelined", teams=4, team_warps=4, chunks=4, first_batches=8, ctas=132)),
    # Two tokens take twice the registers of the pipelined kernel, so its teams are twice as large.
    (5120, 13824, 2, BF16, H100, dict(kernel="pipelined", tokens=2, teams=1, team_warps=8, chunks=3)),
    (4096, 14336, 2, BF16, A100, dict(kernel="pipelined", teams=2, team_warps=8, chunks=2, rows_per_batch=2)),
    (2048, 8192, 2, BF16, H100, dict(kernel="pipelined", tokens=2)),
    # fp32 chunks hold half the columns.
    (4096, 14336, 1, F32, H100, dict(kernel="pipelined", teams=2, team_warps=8, chunks=4)),
    # Less shared memory: single rows, so that two slots a team fit.
    (4096, 14336, 1, BF16, RTX_4090, dict(kernel="pipelined", teams=4, rows_per_batch=1, slots=2, bulk_copy=0)),
    (4096, 14336, 1, BF16, GPUS["RTX 5090"], dict(kernel="pipelined", rows_per_batch=1, bulk_copy=1)),
    (4096, 14336, 1, BF16, A100, dict(kernel="pipelined", teams=4, rows_per_batch=2, bulk_copy=0, ctas=108)),
    # Rows beyond 8,192 columns need the 255 registers of 8 warps.
    (12288, 33792, 1, BF16, H100, dict(kernel="pipelined", teams=1, team_warps=8, chunks=6, threads=256)),
    # Two to eight tokens on the tensor cores: 4,096 columns are 12 groups of 32 for each of 11 worker warps.
    (4096, 14336, 2, BF16, H100, dict(kernel="batched", tokens=2, token_padding=2, column_groups=12, slots=3)),
    (4096, 14336, 3, BF16, H100, dict(kernel="batched", tokens=3, token_padding=4, column_groups=12, slots=3)),
    (4096, 14336, 8, BF16, H100, dict(kernel="batched", tokens=8, token_padding=8, threads=384)),
    (4096, 14336, 20, BF16, H100, dict(kernel="batched", tokens=8)),
    # Two slots of 8 rows of 8 KiB do not fit 99 KiB, 5,120 columns no registers, and fp32 no tensor cores: two at once.
    (4096, 14336, 8, BF16, RTX_4090, dict(kernel="pipelined", tokens=2)),
    (5120, 13824, 8, BF16, H100, dict(kernel="pipelined", tokens=2)),
    (4096, 14336, 8, F32, H100, dict(kernel="pipelined", tokens=2)),
    # SmolLM2-135M: at most two neurons a warp, all rows at once. On a GPU of 84 multiprocessors there are too many.
    (576, 1536, 1, BF16, H100, dict(kernel="small", chunks=3, rows_per_batch=2, threads=256)),
    (576, 1536, 1, BF16, GPUS["RTX 3090"], dict(kernel="pipelined", team_warps=1, chunks=3)),
    (576, 1536, 2, BF16, H100, dict(kernel="pipelined", tokens=2)),
    # No whole number of 16-byte chunks, and rows too long for the registers.
    (4100, 14336, 3, BF16, H100, dict(kernel="generic", tokens=3, ctas=8 * 132)),
    (16392, 100, 1, BF16, H100, dict(kernel="generic", ctas=100)),
]


@pytest.mark.parametrize(("hidden", "intermediate", "tokens", "dtype", "limits", "expected"), PINNED)
def test_well_known_shapes(hidden, intermediate, tokens, dtype, limits, expected):
    got = plan(hidden, intermediate, tokens, dtype, limits)
    assert {name: getattr(got, name) for name in expected} == expected, got.reason


def test_a_step_fills_a_third_slot_where_there_is_room():
    step = plan(4096, 14336, 1, BF16, H100, step=True)
    assert (step.slots, step.first_batches) == (3, 6)
    assert plan(4096, 14336, 1, BF16, A100, step=True).slots == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(aligned=False), "multiple of 16 bytes"),
        (dict(hidden=4100), "whole number of 16-byte chunks"),
        (dict(intermediate=2**24), "24 bits"),
        (dict(hidden=20_000), "too long"),
    ],
)
def test_reasons_for_the_generic_kernel(change, reason):
    shape = dict(hidden=4096, intermediate=14336, aligned=True) | change
    got = plan(shape["hidden"], shape["intermediate"], 1, BF16, H100, aligned=shape["aligned"])
    assert got.kernel == "generic" and reason in got.reason


def test_deterministic_generic_sums_have_a_place_for_every_cta():
    assert plan(42, 5000, 1, F32, H100).ctas == 8 * 132
    assert plan(42, 5000, 1, F32, H100, deterministic=True).ctas == 132


@pytest.mark.parametrize("gpu", GPUS)
def test_the_exact_form(gpu):
    """The pipelined kernel for one and two tokens of 16-bit rows, whatever their size; as without it otherwise."""
    for hidden, intermediate in shapes():
        for tokens, dtype in product((1, 2, 3, 8), DTYPES):
            got = plan(hidden, intermediate, tokens, dtype, GPUS[gpu], exact=True)
            if dtype == F32 or hidden % 8 or got.kernel == "generic":
                assert got.kernel == "generic" and got.tokens == tokens
                continue
            assert got.kernel == "pipelined" and got.tokens <= 2 and covers(got, hidden, 8)
            same = plan(hidden, intermediate, got.tokens, dtype, GPUS[gpu])
            assert same.kernel in ("small", "batched") or got == same
    assert plan(16384, 4096, 1, BF16, H100, exact=True).kernel == "pipelined"
    assert "16-bit" in plan(4096, 4096, 1, F32, H100, exact=True).reason


@pytest.mark.gpu
def test_limits_of_this_gpu():
    limits = device_limits(torch.device("cuda"))
    assert limits.compute_capability >= 80 and limits.multiprocessors > 0 and limits.shared_bytes >= 99 * KIB


PACKED = [("int4_g128",) * 3, ("int4_g64_zp",) * 3, ("int4_g128", "int4_g128", "int8_g128"), ("int8_g128",) * 3]
PACKED += [("fp8_e4m3",) * 3, ("int4_g32",) * 3, ("int4_g128", "int8_g128", "int4_g128")]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_shape_of_packed_rows_has_a_plan_within_the_limits(gpu):
    limits = GPUS[gpu]
    for (hidden, intermediate), formats, dtype in product(shapes()[::2], PACKED, DTYPES):
        for tokens, deterministic in product((1, 2, 3, 4, 5, 9), (False, True)):
            for p in launches(
                hidden, intermediate, tokens, dtype, limits, formats=formats, deterministic=deterministic
            ):
                case = (hidden, intermediate, formats, dtype, tokens, p)
                assert p.supported and p.kernel in ("packed", "generic"), case
                assert p.shared_bytes <= limits.shared_bytes - KIB, case
                if p.kernel == "generic":
                    continue
                assert limits.compute_capability >= 90 and dtype != F32 and hidden % 8 == 0, case
                assert "g32" not in formats[0] and formats[0] == formats[1] and p.bulk_copy, case
                assert 1 <= p.tokens <= 4 and 1 <= p.ctas <= limits.multiprocessors, case
                assert 8 * p.column_groups * 128 >= hidden and p.threads == 384, case
                assert p.row_stride % 128 == 16, case  # ldmatrix reads 8 rows from all banks
                assert p.ring_rows in (8, 16) and 2 <= p.slots <= 16, case
                if "g64" in formats[0]:  # two scales for a block of 128 columns have no room with more
                    assert p.tokens * p.column_groups <= 8, case


@pytest.mark.parametrize("formats", PACKED)
def test_a_step_of_packed_rows_needs_the_kernel_for_them(formats):
    for hidden, intermediate in shapes():
        one = plan(hidden, intermediate, 1, BF16, H100, formats=formats)
        step = plan(hidden, intermediate, 1, BF16, H100, formats=formats, step=True)
        assert step.supported == (one.kernel == "packed"), (hidden, intermediate, one, step)


def test_packed_rows_of_mistral_7b():
    for tokens, taken in ((1, 1), (2, 2), (3, 3), (4, 4), (16, 4)):
        p = plan(4096, 14336, tokens, BF16, H100, formats=("int4_g128",) * 3)
        assert (p.kernel, p.tokens, p.column_groups, p.ring_rows, p.slots) == ("packed", taken, 4, 16, 4)
        assert (p.threads, p.first_batches) == (384, 3)  # 132 CTAs have 4.5 MB in a batch each
    p = plan(4096, 14336, 1, BF16, H100, formats=("int8_g128",) * 3)
    assert (p.kernel, p.ring_rows, p.slots, p.first_batches) == ("packed", 16, 3, 2)
    assert plan(1024, 2816, 1, BF16, H100, formats=("int4_g128",) * 3).first_batches == 7
    with pytest.raises(ValueError, match=r"formats must be three names of packed row formats, got .*int3"):
        plan(4096, 14336, 1, BF16, H100, formats=("int3",) * 3)
