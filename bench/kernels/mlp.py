"""A few tokens through a gated MLP on a GPU: cats_ext against dense PyTorch, "optimal", and published Triton kernels.

    python bench kernels.mlp --peer-path ../CATS ../TEAL --output bench/results/h100/mlp.csv
    python bench tables.mlp_figure bench/results/h100/mlp.csv bench/results/h100/mlp.png

Every path is captured in a CUDA graph over layers of distinct weights, several times the L2 in all; paths take turns,
medians are reported, and speedups are against the fastest dense path of the same run. Thresholds are exact quantiles of
|act(gate)| for the x in use. Ours is what users call, functional.sparse_mlp: the kernel, or beyond as many tokens as it
is taken for, the dense masked path. "optimal" is the paper's: a dense MLP of only as many neurons as are kept, without
selecting them; once with the gate projection whole, as CATS needs it, and once reduced like the others.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.peers import Peer, compile_in_parallel, load_peers
from bench.lib import machine
from bench.lib.command import command
from bench.lib.graphs import Captured, Run
from bench.lib.layers import Layer, dense, kth_threshold
from bench.lib.read_limit import gpu_read_limit
from bench.lib.results import ResultFile
from bench.lib.shapes import DTYPES, SHAPES, parse_shape
from bench.lib.timing import replay_seconds
from cats_ext import functional

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SPARSITY = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
TWO_THRESHOLD = (0.4, 0.6)  # neurons skipped before up, and before down: as many bytes as one threshold at 50 %


@dataclass
class Variant:
    """One line of the result file: ``replay`` runs all layers once."""

    path: str
    name: str
    sparsity: float  # share of neurons skipped by the average token
    share_read: float  # of the layer's weights, that it has to read
    replay: Run
    dtype: str = ""  # where it is not that of the run


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def dense_variants(layers: list[Layer], x: Tensor, compile_mode: str | None) -> list[Variant]:
    def over(mlp: Callable[..., Tensor]) -> Run:
        return lambda: [mlp(x, w.gate, w.up, w.down) for w in layers]

    runs = {
        "dense": over(dense),
        "dense, down transposed": lambda: [dense(x, w.gate, w.up, w.down_t.t()) for w in layers],
    }
    if compile_mode:
        compiled = torch.compile(dense, mode=None if compile_mode == "default" else compile_mode, dynamic=False)
        runs[f"dense, torch.compile {compile_mode}"] = over(compiled)
    return [Variant("dense", name, 0.0, 1.0, Captured(run)) for name, run in runs.items()]


def sparse_variants(layers: list[Layer], x: Tensor, sparsities: list[float]) -> list[Variant]:
    """Ours, one threshold at each sparsity and two at TWO_THRESHOLD."""
    on_kernel = functional.kernel_fits(x, x.shape[-1])
    intermediate = layers[0].gate.shape[0]

    def variant(path: str, name: str, sparsity: float, thresholds: list[tuple[Tensor, Tensor | None]]) -> Variant:
        rows = 0  # read by some token: of up, and of down
        for w, (threshold, down_threshold) in zip(layers, thresholds, strict=True):
            kept = w.value >= threshold
            kept_down = kept if down_threshold is None else kept & (w.h >= down_threshold)
            rows += int(kept.any(0).sum() + kept_down.any(0).sum())
        share = (1 + rows / (len(layers) * intermediate)) / 3 if on_kernel else 1.0

        def run() -> list[Tensor]:
            pairs = zip(layers, thresholds, strict=True)
            return [functional.sparse_mlp(x, w.gate, w.up, w.down_t, *pair) for w, pair in pairs]

        return Variant(path, name + ("" if on_kernel else ", dense path"), sparsity, share, Captured(run))

    variants = []
    for s in sparsities:
        thresholds = [(w.threshold(s), None) for w in layers]
        variants.append(variant("sparse_mlp", f"sparse_mlp {s:.0%}", s, thresholds))
    first, second = TWO_THRESHOLD
    thresholds = []
    for w in layers:
        threshold = w.threshold(first)
        thresholds.append((threshold, kth_threshold(w.h * (w.value >= threshold), second)))
    name = f"two thresholds {first:.0%}, {second:.0%}"
    return [*variants, variant("two_threshold", name, (first + second) / 2, thresholds)]


def optimal_variants(layers: list[Layer], x: Tensor, sparsity: float) -> list[Variant]:
    """A dense MLP of as many neurons as are kept, the first ones. [:k] of down is copied: a view has long rows."""
    intermediate = layers[0].gate.shape[0]
    k = intermediate - round(sparsity * intermediate)
    downs = [w.down[:, :k].contiguous() for w in layers]

    def reduced_gate() -> None:
        for w, down in zip(layers, downs, strict=True):
            dense(x, w.gate[:k], w.up[:k], down)

    def whole_gate() -> None:
        for w, down in zip(layers, downs, strict=True):
            F.linear(F.silu(F.linear(x, w.gate))[:, :k] * F.linear(x, w.up[:k]), down)

    name, share = f"optimal {sparsity:.0%}", k / intermediate
    return [
        Variant("optimal_whole_gate", f"{name}, whole gate", sparsity, (1 + 2 * share) / 3, Captured(whole_gate)),
        Variant("optimal", name, sparsity, share, Captured(reduced_gate)),
    ]


def peer_variants(peer: Peer, layers: list[Layer], x: Tensor, sparsities: list[float]) -> list[Variant]:
    """Of one peer, at each sparsity, once its result is right; where it fails, a line says so and the rest is left."""
    intermediate, hidden = layers[0].gate.shape
    variants: list[Variant] = []
    case = f"{peer.path}, {hidden}x{intermediate}, {len(x)} token{'s' * (len(x) > 1)}"
    if refusal := peer.refusal(len(x), hidden, intermediate):
        print(f"{case}: left out, {refusal}", flush=True)
        return variants
    started = time.perf_counter()
    try:
        weights = [peer.weights(w.gate, w.up, w.down_t) for w in layers]
        for s in sparsities:
            calls, expected = peer.mlp(x, weights, s)
            peer.retune()
            # Masks are taken on rounded values: some neurons are on the other side, up to a tenth of the norm of y.
            error = max(relative_error(call(), y) for call, y in zip(calls, expected, strict=True))
            if not error < 0.2:
                raise RuntimeError(f"its result is wrong, relative error {error:.2g}")
            replay = Captured(lambda calls=calls: [call() for call in calls])
            share = peer.share_read(s, statistics.mean(w.rows_kept(s) for w in layers))
            dtype = DTYPE_NAMES[peer.dtype or x.dtype]
            variants.append(Variant(peer.path, f"{peer.path} {s:.0%}", s, share, replay, dtype))
    except Exception as error:
        where = f"from {sparsities[len(variants)]:.0%} on" if len(variants) < len(sparsities) else ""
        print(f"{case}: left out {where}: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"{case}: right at every sparsity; compiled, tuned and captured in {time.perf_counter() - started:.1f} s")
    return variants


@torch.inference_mode()
def bench(shape: str, dtype: str, tokens: int, peers: list[Peer], arguments: argparse.Namespace) -> Iterator[dict]:
    hidden, intermediate = parse_shape(shape)
    layer_bytes = 3 * hidden * intermediate * DTYPES[dtype].itemsize
    count = max(3, -(-arguments.working_set // layer_bytes))
    x = torch.randn(tokens, hidden, device="cuda").to(DTYPES[dtype])
    layers = [Layer.random(x, intermediate) for _ in range(count)]
    sparsities = arguments.sparsity if tokens == 1 else arguments.batched_sparsity
    mode = "max-autotune-no-cudagraphs" if tokens in arguments.max_autotune_tokens else "default"

    first = layers[0]
    y = functional.sparse_mlp(x, first.gate, first.up, first.down_t, torch.zeros((), device=x.device))
    error = relative_error(y, dense(x, first.gate, first.up, first.down))
    if not error < (1e-4 if dtype == "fp32" else 1e-2):
        raise RuntimeError(f"{shape} {dtype}: sparse_mlp at threshold 0 differs from the dense MLP by {error:.1e}")

    variants = dense_variants(layers, x, mode if arguments.compile else None)
    variants += sparse_variants(layers, x, sparsities)
    if tokens == 1:
        variants += [v for s in sparsities if s for v in optimal_variants(layers, x, s)]
    if tokens in arguments.peer_tokens:
        variants += [v for peer in peers for v in peer_variants(peer, layers, x, sparsities)]
    limit = gpu_read_limit()
    seconds = replay_seconds([v.replay for v in variants], arguments.repetitions)

    best_dense = min(t for v, t in zip(variants, seconds, strict=True) if v.path == "dense")
    for v, total in zip(variants, seconds, strict=True):
        us = total / count * 1e6
        gb_per_s = layer_bytes * v.share_read / us / 1e3
        yield {
            "shape": shape,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "dtype": v.dtype or dtype,
            "tokens": tokens,
            "path": v.path,
            "variant": v.name,
            "sparsity": v.sparsity,
            "us": round(us, 2),
            "share_read": round(v.share_read, 4),
            "gb_per_s": round(gb_per_s),
            "read_limit_gb_per_s": round(limit),
            "share_of_limit": round(gb_per_s / limit, 3),
            "speedup": round(best_dense / total, 3),
            "layers": count,
        }


def main() -> None:
    parser = command(__spec__, __doc__, output="CSV file")
    parser.add_argument("--shape", nargs="+", default=["mistral-7b", "llama-2-7b"], help=f"HxI or {', '.join(SHAPES)}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITY, help="for one token")
    parser.add_argument("--batched-sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.7, 0.9], help="for more")
    parser.add_argument("--peer-path", nargs="+", type=Path, default=[], help="checkouts of CATS, TEAL (peers.py)")
    parser.add_argument("--peer-tokens", nargs="+", type=int, default=[1], help="to time peers for; 10 to 20 s each")
    parser.add_argument("--working-set", type=int, default=1 << 30, help="bytes of weights to rotate through, at least")
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--max-autotune-tokens", nargs="*", type=int, default=[1], help="10 s each; else default mode")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    facts = machine.facts("cuda", arguments.commit)
    machine.print_facts(facts)
    peers = load_peers(arguments.peer_path)
    shapes = [parse_shape(shape) for shape in arguments.shape]
    peer_tokens = [m for m in arguments.peer_tokens if m in arguments.tokens]
    compile_in_parallel(peers, shapes, peer_tokens, [DTYPES[dtype] for dtype in arguments.dtype])
    results = ResultFile(arguments.output, facts)
    for shape, dtype, tokens in itertools.product(arguments.shape, arguments.dtype, arguments.tokens):
        started = time.perf_counter()
        for row in bench(shape, dtype, tokens, peers, arguments):
            results.add(row)
            print(
                f"{shape:14} {row['dtype']} {tokens:3} tokens  {row['variant']:46} {row['us']:9.2f} us "
                f"{row['gb_per_s']:6} GB/s {row['share_of_limit']:6.3f} of limit {row['speedup']:6.3f}x",
                flush=True,
            )
        print(f"{time.perf_counter() - started:.1f} s", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
