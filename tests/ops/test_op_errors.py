"""Every check of the ops fires with the argument's name and value, in the kernels and while tracing."""

from __future__ import annotations

import pytest
import torch

from cats_ext.native.library import LIBRARIES
from cats_ext.ops import definitions

pytestmark = pytest.mark.skipif(not LIBRARIES["_C"].loaded, reason="the checks are in the compiled library")

M, H, I = 2, 6, 4  # noqa: E741
WEIGHTS = ("w_gate", "w_up", "w_down_t")

# The kernels run on "cpu" and "cuda"; tensors on "meta" take the path of torch.compile's tracing; "reference" is what
# devices without a compiled kernel get. All ask csrc/checks.h.
WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta", "reference"]


def sparse_arguments(device: str) -> dict:
    return dict(
        x=torch.ones(M, H, device=device),
        w_gate=torch.ones(I, H, device=device),
        w_up=torch.ones(I, H, device=device),
        w_down_t=torch.ones(I, H, device=device),
        counts=torch.zeros(3, dtype=torch.int64, device=device),
        threshold=torch.zeros((), device=device),
        down_threshold=torch.zeros(I, device=device),
        activation="silu",
        gate_bias=torch.ones(I, device=device),
        up_bias=torch.ones(I, device=device),
        down_bias=torch.ones(H, device=device),
    )


ROW_BYTES = 32 + 128  # of H columns, padded to 128, in int8_g32


def packed_arguments(device: str) -> dict:
    """H is no multiple of the group size, which the kernels need not ask for: the columns are padded."""
    weights = {name: torch.zeros(I, ROW_BYTES, dtype=torch.uint8, device=device) for name in WEIGHTS}
    return sparse_arguments(device) | weights | {f"{name}_format": "int8_g32" for name in ("gate", "up", "down")}


def columns_arguments(device: str) -> dict:
    return without(sparse_arguments(device), "w_gate") | dict(
        w_gate_t=torch.ones(H, I, device=device),
        input_threshold=torch.zeros((), device=device),
        counts=torch.zeros(4, dtype=torch.int64, device=device),
    )


def gated_arguments(device: str) -> dict:
    return dict(
        grad_h=torch.ones(M, I, device=device),
        gate=torch.ones(M, I, device=device),
        up=torch.ones(M, I, device=device),
        counts=torch.zeros(3, dtype=torch.int64, device=device),
        threshold=torch.zeros((), device=device),
        down_threshold=torch.zeros(I, device=device),
        activation="silu",
    )


def without(arguments: dict, *names: str) -> dict:
    return {name: value for name, value in arguments.items() if name not in names}


def double(t):
    return t.double()


DOUBLE, FLOAT, HALF = r"torch\.float64", r"torch\.float32", r"torch\.float16"
SPARSE = [  # argument, what is done to it, the message
    ("x", double, rf"x must be float32, float16 or bfloat16, got {DOUBLE}"),
    ("x", lambda t: t.long(), r"x must be float32, float16 or bfloat16, got torch\.int64"),
    ("x", lambda t: t[0, 0], r"x must have at least one dimension, got shape \[\]"),
    ("x", lambda t: t[:, 1:], r"x must have last dimension H = 6, got shape \[2, 5\]"),
    ("w_gate", lambda t: t[0], r"w_gate must have shape \[I, H\], got \[6\]"),
    ("w_gate", lambda t: t[:0], r"w_gate must have I > 0 and H > 0, got \[0, 6\]"),
    ("w_gate", lambda t: t[:, :0], r"w_gate must have I > 0 and H > 0, got \[4, 0\]"),
    ("w_gate", lambda t: t.half(), rf"w_gate must have x's dtype {FLOAT}, got {HALF}"),
    ("w_gate", lambda t: t.t().contiguous().t(), r"w_gate must have unit stride .*, got strides \[1, 4\]"),
    ("w_up", lambda t: t[1:], r"w_up must have shape \[4, 6\], got \[3, 6\]"),
    ("w_up", double, rf"w_up must have x's dtype {FLOAT}, got {DOUBLE}"),
    ("w_up", lambda t: t.t().contiguous().t(), r"w_up must have unit stride .*, got strides \[1, 4\]"),
    ("w_down_t", lambda t: t.t(), r"w_down_t must have shape \[4, 6\], got \[6, 4\]"),
    ("w_down_t", lambda t: t[None], r"w_down_t must have shape \[4, 6\], got \[1, 4, 6\]"),
    ("w_down_t", double, rf"w_down_t must have x's dtype {FLOAT}, got {DOUBLE}"),
    (
        "w_down_t",
        lambda t: t.t().contiguous().t(),
        r"w_down_t must have unit stride in its last dimension, got strides \[1, 4\]; "
        "lay down_proj.weight out with one contiguous row a neuron",
    ),
    ("threshold", double, rf"threshold must be float32, got {DOUBLE}"),
    ("threshold", lambda t: t.expand(3), r"threshold must have shape \[\] or \[4\], got \[3\]"),
    ("threshold", lambda t: t.expand(1, 4), r"threshold must have shape \[\] or \[4\], got \[1, 4\]"),
    ("down_threshold", lambda t: t.half(), rf"down_threshold must be float32, got {HALF}"),
    ("down_threshold", lambda t: t[:1], r"down_threshold must have shape \[\] or \[4\], got \[1\]"),
    ("activation", lambda _: "tanh", "activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
    ("activation", lambda _: "relu\0", r"activation must be one of silu, gelu, gelu_tanh, relu, got 'relu\?'"),
    ("gate_bias", lambda t: t[1:], r"gate_bias must have shape \[4\], got \[3\]"),
    ("gate_bias", double, rf"gate_bias must have x's dtype {FLOAT}, got {DOUBLE}"),
    ("up_bias", lambda t: t[None], r"up_bias must have shape \[4\], got \[1, 4\]"),
    ("up_bias", double, rf"up_bias must have x's dtype {FLOAT}, got {DOUBLE}"),
    ("down_bias", lambda t: t[:4], r"down_bias must have shape \[6\], got \[4\]"),
    ("down_bias", double, rf"down_bias must have x's dtype {FLOAT}, got {DOUBLE}"),
    ("counts", lambda t: t.int(), r"counts must be contiguous int64 of shape \[3\] on .*, got torch\.int32"),
    ("counts", lambda t: t[:2], r"counts must be contiguous int64 of shape \[3\] on .*, got .* of shape \[2\]"),
]
FORMATS = (
    "int4_g32, int4_g64, int4_g128, int4_g32_zp, int4_g64_zp, int4_g128_zp, int8_g32, int8_g64, int8_g128, fp8_e4m3"
)
PACKED = [
    *(row for row in SPARSE if row[0] not in WEIGHTS and "last dimension" not in row[2]),
    ("x", lambda t: t[:, :0], r"x must have last dimension H > 0, got shape \[2, 0\]"),
    ("w_gate", lambda t: t[0], r"w_gate must have shape \[I, bytes\], got \[160\]"),
    ("w_gate", lambda t: t[:0], r"w_gate must have I > 0 and H > 0, got \[0, 160\]"),
    *(
        row
        for name in WEIGHTS
        for row in (
            (name, lambda t: t.view(torch.int8), rf"{name} must be torch\.uint8, got torch\.int8"),
            (
                name,
                lambda t: t[:, 16:],
                rf"{name} must have shape \[4, 160\], the bytes of rows of 6 columns in int8_g32, got \[4, 144\]",
            ),
            (
                name,
                lambda t: torch.cat((t, t), 1).view(-1)[: I * 168].view(I, 168)[:, :160],
                rf"{name} must have rows that start at multiples of 16 bytes and unit stride in its last dimension, "
                r"got strides \[168, 1\]",
            ),
            (
                name,
                lambda t: t.t().contiguous().t(),
                rf"{name} must have rows that start at multiples of 16 bytes and unit stride .*, got strides \[1, 4\]",
            ),
        )
    ),
    ("w_up", lambda t: t[1:], r"w_up must have shape \[4, 160\], .*, got \[3, 160\]"),
    *(
        (name, lambda _, got=got: got, rf"{name} must be one of {FORMATS}, got '{got}'")
        for name in ("gate_format", "up_format", "down_format")
        for got in ("int8", "int8_g32_zp", "")
    ),
    ("up_format", lambda _: "int4_g32", r"w_up must have shape \[4, 128\], .* in int4_g32, got \[4, 160\]"),
]
COLUMNS = [
    *(row for row in SPARSE if row[0] not in ("w_gate", "counts")),
    ("w_gate_t", lambda t: t[0], r"w_gate_t must have shape \[H, I\], got \[4\]"),
    ("w_gate_t", lambda t: t[:, :0], r"w_gate_t must have I > 0 and H > 0, got \[6, 0\]"),
    ("w_gate_t", lambda t: t[:0], r"w_gate_t must have I > 0 and H > 0, got \[0, 4\]"),
    ("w_gate_t", lambda t: t.t().contiguous(), r"x must have last dimension H = 4, got shape \[2, 6\]"),
    ("w_gate_t", lambda t: t[:, 1:], r"w_up must have shape \[3, 6\], got \[4, 6\]"),
    ("w_gate_t", lambda t: t.half(), rf"w_gate_t must have x's dtype {FLOAT}, got {HALF}"),
    ("w_gate_t", lambda t: t.t().contiguous().t(), r"w_gate_t must have unit stride .*, got strides \[1, 6\]"),
    ("input_threshold", double, rf"input_threshold must be float32, got {DOUBLE}"),
    ("input_threshold", lambda t: t.expand(4), r"input_threshold must have shape \[\], got \[4\]"),
    ("input_threshold", lambda t: t.expand(6), r"input_threshold must have shape \[\], got \[6\]"),
    ("input_threshold", lambda t: t[None], r"input_threshold must have shape \[\], got \[1\]"),
    ("counts", lambda t: t.int(), r"counts must be contiguous int64 of shape \[4\] on .*, got torch\.int32"),
    ("counts", lambda t: t[:3], r"counts must be contiguous int64 of shape \[4\] on .*, got .* of shape \[3\]"),
]
GATED = [
    ("gate", lambda t: t.int(), r"gate must be float32, float16, bfloat16 or float64, got torch\.int32"),
    ("gate", lambda t: t[0, 0], r"gate must have at least one dimension, got shape \[\]"),
    ("up", double, rf"up must have gate's dtype {FLOAT}, got {DOUBLE}"),
    ("up", lambda t: t[:, 1:], r"up must have gate's shape \[2, 4\], got \[2, 3\]"),
    ("up", lambda t: t[0], r"up must have gate's shape \[2, 4\], got \[4\]"),
    ("threshold", double, rf"threshold must be float32, got {DOUBLE}"),
    ("threshold", lambda t: t.expand(3), r"threshold must have shape \[\] or \[4\], got \[3\]"),
    ("down_threshold", double, rf"down_threshold must be float32, got {DOUBLE}"),
    ("down_threshold", lambda t: t[1:], r"down_threshold must have shape \[\] or \[4\], got \[3\]"),
    ("activation", lambda _: "", "activation must be one of silu, gelu, gelu_tanh, relu, got ''"),
    ("counts", lambda t: t.int(), r"counts must be contiguous int64 of shape \[3\] on .*, got torch\.int32 of shape"),
    (
        "counts",
        lambda t: t[1:],
        r"counts must be contiguous int64 of shape \[3\] on .*, got torch\.int64 of shape \[2\]",
    ),
    ("grad_h", lambda t: t.half(), rf"grad_h must have gate's dtype {FLOAT}, got {HALF}"),
    ("grad_h", lambda t: t[:1], r"grad_h must have gate's shape \[2, 4\], got \[1, 4\]"),
]


def ids(table):
    return [f"{name}-{i}" for i, (name, *_) in enumerate(table)]


def fails(op: str, arguments: dict, message: str, where: str = "") -> None:
    call = definitions._formula(op) if where == "reference" else getattr(torch.ops.cats, op)
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call(**arguments)


def device_of(where: str) -> str:
    return "cpu" if where == "reference" else where


@pytest.mark.parametrize(("name", "change", "message"), SPARSE, ids=ids(SPARSE))
@pytest.mark.parametrize("where", WHERE)
def test_sparse_mlp(name, change, message, where):
    arguments = sparse_arguments(device_of(where))
    arguments[name] = change(arguments[name])
    fails("sparse_mlp_counted", arguments, "sparse_mlp: " + message, where)
    if name != "counts":
        del arguments["counts"]
        fails("sparse_mlp", arguments, "sparse_mlp: " + message, where)


@pytest.mark.parametrize(("name", "change", "message"), PACKED, ids=ids(PACKED))
@pytest.mark.parametrize("where", WHERE)
def test_sparse_mlp_packed(name, change, message, where):
    arguments = packed_arguments(device_of(where))
    arguments[name] = change(arguments[name])
    fails("sparse_mlp_packed_counted", arguments, "sparse_mlp_packed: " + message, where)
    if name != "counts":
        del arguments["counts"]
        fails("sparse_mlp_packed", arguments, "sparse_mlp_packed: " + message, where)


@pytest.mark.parametrize(("name", "change", "message"), COLUMNS, ids=ids(COLUMNS))
@pytest.mark.parametrize("where", WHERE)
def test_sparse_mlp_columns(name, change, message, where):
    arguments = columns_arguments(device_of(where))
    arguments[name] = change(arguments[name])
    fails("sparse_mlp_columns_counted", arguments, "sparse_mlp_columns: " + message, where)
    if name != "counts":
        del arguments["counts"]
        fails("sparse_mlp_columns", arguments, "sparse_mlp_columns: " + message, where)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_packed_rows_must_be_aligned(name, where):
    arguments = packed_arguments(where)
    unaligned = torch.zeros(I * ROW_BYTES + 8, dtype=torch.uint8, device=where)[8:].view(I, ROW_BYTES)
    arguments[name] = unaligned
    message = rf"sparse_mlp_packed: {name} must have rows that start at multiples of 16 bytes .*got strides \[160, 1\]"
    fails("sparse_mlp_packed_counted", arguments, message)


@pytest.mark.parametrize("where", WHERE)
def test_sparse_mlp_packed_step(where):
    arguments = packed_arguments(device_of(where))
    for name in ("counts", "down_bias"):
        del arguments[name]
    arguments["x"] = arguments["x"][0]
    arguments |= dict(norm_weight=torch.ones(H, device=device_of(where)), norm_eps=1e-5)
    arguments["y_sum"] = torch.zeros(H + 2, device=device_of(where))
    for name, value, message in (
        ("y_sum", arguments["y_sum"][:H], r"sparse_mlp_packed_step: y_sum must be .* of shape \[6\]"),
        ("w_down_t", arguments["w_up"][1:], r"sparse_mlp_packed: w_down_t must have shape \[4, 160\], .*"),
        ("gate_format", "int3", rf"sparse_mlp_packed: gate_format must be one of {FORMATS}, got 'int3'"),
    ):
        fails("sparse_mlp_packed_step", arguments | {name: value}, message, where)


@pytest.mark.parametrize(("name", "change", "message"), GATED, ids=ids(GATED))
@pytest.mark.parametrize("where", WHERE)
def test_gated_threshold(name, change, message, where):
    arguments = gated_arguments(device_of(where))
    arguments[name] = change(arguments[name])
    message = "gated_threshold: " + message
    if name != "counts":
        fails("gated_threshold_backward", without(arguments, "counts"), message, where)
    if name != "grad_h":
        fails("gated_threshold_counted", without(arguments, "grad_h"), message, where)
    if name not in ("grad_h", "counts"):
        fails("gated_threshold", without(arguments, "grad_h", "counts"), message, where)
        fails("gated_threshold_forward", without(arguments, "grad_h", "counts"), message, where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("name", "stride"), [("gate_bias", 2), ("up_bias", 2), ("down_bias", 0)])
def test_biases_must_be_contiguous(name, stride, where):
    arguments = sparse_arguments(device_of(where))
    arguments[name] = arguments[name].repeat(2)[:: max(stride, 1)] if stride else arguments[name][0].expand(H)
    fails("sparse_mlp_counted", arguments, f"sparse_mlp: {name} must be contiguous, got stride {stride}", where)


REQUIRED = {
    "sparse_mlp_counted": (sparse_arguments, ("x", "w_gate", "w_up", "w_down_t", "counts", "threshold")),
    "sparse_mlp_columns_counted": (columns_arguments, ("x", "w_gate_t", "counts", "input_threshold", "threshold")),
    "gated_threshold": (gated_arguments, ("gate", "up", "threshold")),
    "gated_threshold_counted": (gated_arguments, ("gate", "up", "counts", "threshold")),
    "gated_threshold_forward": (gated_arguments, ("gate", "up", "threshold")),
    "gated_threshold_backward": (gated_arguments, ("grad_h", "gate", "up", "threshold")),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, names) in REQUIRED.items() for name in names])
@pytest.mark.parametrize("where", WHERE)
def test_none_is_no_tensor(op, name, where):
    arguments = REQUIRED[op][0](device_of(where))
    if op.startswith("gated"):
        others = {"grad_h": "gated_threshold_backward", "counts": "gated_threshold_counted"}
        arguments = without(arguments, *(name for name, of_op in others.items() if of_op != op))
    arguments[name] = None
    fails(
        op,
        arguments,
        rf"{op.partition('_counted')[0].removesuffix('_forward').removesuffix('_backward')}: "
        rf"{name} must be a tensor, got None$",
        where,
    )


@pytest.mark.parametrize("where", WHERE[:2])
def test_memory_that_was_freed(where):
    """As FSDP does between uses. An optional argument without memory must not count as absent."""
    for op, make, absent in (
        ("sparse_mlp_counted", sparse_arguments, ""),
        ("sparse_mlp_columns_counted", columns_arguments, ""),
        ("gated_threshold_counted", gated_arguments, "grad_h"),
        ("gated_threshold_backward", gated_arguments, "counts"),
    ):
        for name, value in without(make(where), absent).items():
            if isinstance(value, torch.Tensor):
                arguments = without(make(where), absent)
                arguments[name] = value.clone()
                arguments[name].untyped_storage().resize_(0)
                message = rf"{op.rpartition('_')[0]}: {name} must have memory, its storage has 0 bytes$"
                fails(op, arguments, message)


KINDS = {
    "sparse": (lambda t: t.to_sparse(), "torch.sparse_coo"),
    "rows": (lambda t: t.to_sparse_csr(), "torch.sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "nested tensor"),
    "mkldnn": (lambda t: t.to_mkldnn(), "torch._mkldnn"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised torch.qint8"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["sparse_mlp", "sparse_mlp_columns", "gated_threshold", "gated_threshold_forward"])
def test_other_kinds_of_tensors(op, kind):
    change, name = KINDS[kind]
    make = {"sparse_mlp": sparse_arguments, "sparse_mlp_columns": columns_arguments}.get(op, gated_arguments)
    arguments = without(make("cpu"), "grad_h", "counts")
    first, second = list(arguments)[:2]
    for argument in (first, second):
        fails(
            op,
            arguments | {argument: change(arguments[argument])},
            f"{op}: {argument} must be a dense tensor, got {name}$",
        )


def test_dtypes_without_kernels_have_their_names():
    arguments = sparse_arguments("cpu") | {"threshold": torch.empty((), dtype=torch.uint4)}
    fails("sparse_mlp_counted", arguments, r"sparse_mlp: threshold must be float32, got torch\.uint4$")


def test_out_of_memory_is_a_sentence():
    arguments = sparse_arguments("cpu") | {"x": torch.ones(1, H).expand(2**44, H)}
    message = (
        rf"sparse_mlp: cannot allocate the output .* for x of shape \[{2**44}, 6\] and dtype {FLOAT} on cpu: out of mem"
    )
    fails("sparse_mlp_counted", arguments, message)
    gate = torch.ones(1, I).expand(2**44, I)
    message = "gated_threshold: cannot allocate the output"
    fails("gated_threshold_forward", {"gate": gate, "up": gate, "threshold": torch.tensor(0.0)}, message)


# A mixed call goes to the kernel of the "stronger" device, so the other one is what the message calls wrong.
OTHER = [("meta", "cpu"), pytest.param("cuda", "cpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("where", "other"), OTHER)
@pytest.mark.parametrize("name", [name for name in sparse_arguments("cpu") if name not in ("x", "activation")])
def test_sparse_mlp_on_mixed_devices(name, where, other):
    arguments = sparse_arguments(where)
    arguments[name] = torch.ones_like(arguments[name], device=other)
    fails("sparse_mlp_counted", arguments, rf"sparse_mlp: {name} must be .*on .*{where}.*, got .*{other}")


@pytest.mark.parametrize(("where", "other"), OTHER)
@pytest.mark.parametrize("name", ["w_gate_t", "w_down_t", "counts", "input_threshold", "threshold", "gate_bias"])
def test_sparse_mlp_columns_on_mixed_devices(name, where, other):
    arguments = columns_arguments(where)
    arguments[name] = torch.ones_like(arguments[name], device=other)
    message = rf"sparse_mlp_columns: {name} must be .*on .*{where}.*, got .*{other}"
    fails("sparse_mlp_columns_counted", arguments, message)


@pytest.mark.parametrize(("where", "other"), OTHER)
@pytest.mark.parametrize("name", WEIGHTS)
def test_sparse_mlp_packed_on_mixed_devices(name, where, other):
    arguments = packed_arguments(where)
    arguments[name] = torch.zeros_like(arguments[name], device=other)
    message = rf"sparse_mlp_packed: {name} must be on x's device {where}.*, got {other}"
    fails("sparse_mlp_packed_counted", arguments, message)


@pytest.mark.parametrize(("where", "other"), OTHER)
@pytest.mark.parametrize("name", ["grad_h", "up", "counts", "threshold", "down_threshold"])
def test_gated_threshold_on_mixed_devices(name, where, other):
    op = "gated_threshold_counted" if name == "counts" else "gated_threshold_backward"
    arguments = without(gated_arguments(where), "grad_h" if name == "counts" else "counts")
    arguments[name] = torch.ones_like(arguments[name], device=other)
    if name == "counts":
        fails(op, arguments, rf"gated_threshold: counts must be .* on .*{where}.*, got torch\.int64 .* on {other}")
        return
    fails(op, arguments, rf"gated_threshold: {name} must be on .*{where}.*, got {other}")
