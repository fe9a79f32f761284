"""Writes the tables of docs/serving.md from bench/results; tests/docs checks that they are current.

python bench tables.serving
"""

from __future__ import annotations

from bench.lib.models import CONFIGS
from bench.serving.scaling import layer_of, predictions
from bench.tables.pages import Page, link, ratio, read, source, table

VLLM, VLLM_AWQ, TOKENS = "h200/serving.csv", "h200/serving_awq.csv", "h200/serving_tokens.csv"
READ_LIMIT = "h200/exact.csv"
PARALLEL, VLLM_PARALLEL = "h200/tensor_parallel.csv", "h200/serving_two_gpus.csv"
FILE, SUMS_FILE = "cpu/balance.csv", "cpu/partial_sums.csv"


def vllm() -> str:
    """A step of the dense model and with CATS, and the first token of 1,024."""
    data = read(VLLM)
    sparsities = list(dict.fromkeys(row["sparsity"] for row in data))

    def cell(row: dict[str, str]) -> str:
        dense, shown = (f"{float(row[key]):.2f}" for key in ("dense_ms", "sparse_ms"))
        speedup = f"{float(row['sparse_speedup']):.2f}x" if row["phase"] == "first_token" else ratio(dense, shown)
        return f"{shown} ms, {speedup}"

    rows = []
    for phase, sequences in dict.fromkeys((row["phase"], row["sequences"]) for row in data):
        of_size = {row["sparsity"]: row for row in data if (row["phase"], row["sequences"]) == (phase, sequences)}
        line = []
        for sparsity in sparsities:
            row = of_size.get(sparsity)
            line += [f"{float(row['dense_ms']):.2f} ms"] if row else [""]
            line += [cell(row)] if row else [""]
        rows.append([sequences if phase == "decode" else "first token of 1,024", *line])
    head = ["sequences"]
    for sparsity in sparsities:
        head += ["dense", f"CATS, {float(sparsity):.0%}"]
    first = data[0]
    others = {row["commit"] for row in data if row["phase"] == "first_token"} - {first["commit"]}
    first_token = f"; the first token commit {', '.join(sorted(others))}" if others else ""
    return (
        f"{first['device']}, vLLM {first['vllm']}, {first['model']}, bf16: {source(VLLM, first)}{first_token}.\n\n"
        f"{table(head, rows)}\n\n{_saved_bytes(data)}"
    )


def _saved_bytes(data: list[dict[str, str]]) -> str:
    """What one sequence would gain from the bytes alone, and two: a row is skipped if both skip its neuron."""
    gb_per_s, config = float(read(READ_LIMIT)[0]["read_limit_gb_per_s"]), CONFIGS[data[0]["model"]]()
    up_and_down = 2 * config.hidden_size * config.intermediate_size * config.num_hidden_layers * 2 / 1e6  # MB
    gains: dict[int, list[str]] = {1: [], 2: []}
    for row in data:
        if row["phase"] == "decode" and (sequences := int(row["sequences"])) in gains:
            dense = float(row["dense_ms"])
            saved = float(row["sparsity"]) ** sequences * up_and_down / gb_per_s
            gains[sequences].append(f"{dense / (dense - saved):.2f}x")
    return (
        f"If MLPs saved just the time of the bytes that they skip, at the {gb_per_s:,.0f} GB/s that such a device "
        f"reads ({link(READ_LIMIT)}), one sequence would gain {', '.join(gains[1])}, and two with independent masks "
        f"{', '.join(gains[2])}."
    )


def two_gpus() -> str:
    """The steps of an engine over two GPUs."""
    data = [row for row in read(VLLM_PARALLEL) if row["phase"] == "decode"]
    first, dense = data[0], [float(row["dense_ms"]) for row in data]
    gains: dict[str, list[str]] = {}
    for row in data:
        gained = ratio(f"{float(row['dense_ms']):.2f}", f"{float(row['sparse_ms']):.2f}")
        gains.setdefault(row["sequences"], []).append(f"{gained} at {float(row['sparsity']):.0%}")
    one, two = (" and ".join(gains[count]) for count in ("1", "2"))
    (many,) = gains["16"]
    return (
        f"Over two GPUs {first['layers']} layers of Llama-3-70B's shape take {min(dense):.2f} to {max(dense):.2f} ms a "
        f"step dense, and with CATS one sequence is {one} as fast, 16 sequences {many}. Two sequences were {two} as "
        f"fast with the kernel; rows as long as these take it for one sequence only since then. {first['device']}, "
        f"vLLM {first['vllm']}: {source(VLLM_PARALLEL, first)}."
    )


def awq() -> str:
    """The ratios of AWQ's int4 to dense."""
    data = [row for row in read(VLLM_AWQ) if row["phase"] == "decode" and row["awq_ms"]]
    found = {int(row["sequences"]): ratio(row["dense_ms"], row["awq_ms"]) for row in data}
    small = [found[count] for count in sorted(found) if count <= 32]
    large = [found[count] for count in sorted(found) if count > 32]
    return (
        f"vLLM's own int4 (AWQ, without sparsity) is {min(small)} to {max(small)} as fast as the dense model for 1 to "
        f"32 sequences, and {min(large)} to {max(large)} for 64 to 256: {source(VLLM_AWQ, data[0])}."
    )


def tokens() -> str:
    """One MLP by the kernel and by masked products."""
    data = read(TOKENS)
    kernels = list(dict.fromkeys(row["sparsity"] for row in data if row["path"] == "kernel"))

    def us(count: str, path: str, sparsity: str) -> str:
        (found,) = (r["us"] for r in data if (r["tokens"], r["path"], r["sparsity"]) == (count, path, sparsity))
        return f"{float(found):.1f}"

    rows = []
    for count in dict.fromkeys(row["tokens"] for row in data):
        dense = us(count, "dense", "0")
        times = [us(count, "kernel", sparsity) for sparsity in kernels] + [us(count, "masked", kernels[0])]
        rows.append([count, f"{dense} us", *(f"{time} us, {ratio(dense, time)}" for time in times)])
    first = data[0]
    head = ["tokens", "dense", *(f"kernel, {float(sparsity):.0%}" for sparsity in kernels), "masked products"]
    return (
        f"{first['device']}, {first['hidden_size']}x{first['intermediate_size']}, bf16: {source(TOKENS, first)}.\n\n"
        f"{table(head, rows)}"
    )


def transformers() -> str:
    data = read(PARALLEL)
    dense = {
        (row["ranks"], row["compiled"]): f"{float(row['step_us']):.0f}" for row in data if not float(row["sparsity"])
    }
    rows = [
        [
            row["ranks"],
            "compiled" if int(row["compiled"]) else "as it is",
            f"{float(row['sparsity']):.0%}",
            f"{float(row['step_us']):.0f} us",
            ratio(dense[row["ranks"], row["compiled"]], f"{float(row['step_us']):.0f}"),
            f"{float(row['without_all_reduce_us']):.0f} us" if row["without_all_reduce_us"] else "",
            f"{float(row['busiest_to_mean']):.3f}",
        ]
        for row in data
    ]
    first = data[0]
    layer = layer_of(first)
    gains: dict[str, list[str]] = {}
    for row in data:
        if float(row["sparsity"]) and row["ranks"] == first["ranks"]:
            saved = 2 * float(row["sparsity"]) * layer.matrix / (int(row["ranks"]) * layer.rate) * int(row["layers"])
            step = float(dense[row["ranks"], row["compiled"]])
            gains.setdefault(row["compiled"], []).append(f"{step / (step - saved):.2f}x")
    about = (
        f"{first['device']}, {first['layers']} layers of {first['shape']}, bf16, an all-reduce by itself "
        f"{float(first['all_reduce_us']):.1f} us: {source(PARALLEL, first)}."
    )
    head = ["GPUs", "forward", "sparsity", "step", "to dense", "step without all-reduces", "busiest to mean"]
    limits = (
        f"If MLPs saved just the time of the bytes that they skip, the step of {first['ranks']} GPUs would gain "
        f"{' and '.join(gains['0'])} as it is, and {' and '.join(gains['1'])} compiled."
    )
    return f"{about}\n\n{table(head, rows)}\n\n{limits}"


def on_paper() -> str:
    """The ratio to dense for other numbers of ranks, if an all-reduce takes as long as that of two GPUs, or longer."""
    data = [row for row in read(PARALLEL) if row["compiled"] == "0"]
    measured = float(data[0]["all_reduce_us"])
    rows = []
    for ranks in (2, 4, 8):
        cells = []
        for times in (1, 2, 4):
            if ranks == 2 and times > 1:
                cells.append("")
                continue
            latencies = {ranks: times * measured} if ranks > 2 else {}
            found = [row for row in predictions(data, latencies) if row["ranks"] == ranks and row["sparsity"]]
            cells.append(", ".join(f"{row['speedup']:.2f}x" for row in found))
        rows.append([str(ranks), *cells])
    sparsities = " and ".join(f"{float(row['sparsity']):.0%}" for row in data if float(row["sparsity"]))
    head = ["GPUs", *(f"{measured * times:.0f} us an all-reduce" for times in (1, 2, 4))]
    about = f"To dense at {sparsities}, with c = {layer_of(data[0]).rest_us:.0f} us: {source(PARALLEL, data[0])}."
    return f"{about}\n\n{table(head, rows)}"


RULES = {"plain": "plain", "two_threshold": "two thresholds"}


def balance() -> str:
    data = read(FILE)
    orders: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in data:
        cells = orders.setdefault((row["rule"], row["sparsity"]), {})
        cells[row["ranks"], row["order"]] = 100 * (float(row["token_time"]) - 1)
    ranks = list(dict.fromkeys(row["ranks"] for row in data))
    rows = [
        [
            f"{RULES[rule]}, {float(sparsity):.0%}",
            *(f"{cells[n, 'contiguous']:.1f}%, {cells[n, 'balanced']:.1f}%" for n in ranks),
        ]
        for (rule, sparsity), cells in orders.items()
    ]
    gain = max(cells[n, "contiguous"] - cells[n, "balanced"] for cells in orders.values() for n in ranks)
    first = data[0]
    about = (
        f"{source(FILE, first)}: {first['model']}, {int(first['tokens']):,} tokens, {first['neurons']} neurons, "
        f"each cell with the neurons as they are, and permuted. The largest gain is {gain:.1f} points."
    )
    return f"{about}\n\n{table(['rule, sparsity', *(f'{n} ranks' for n in ranks)], rows)}"


SUMS = {
    "rounded": "CATS, sums in bfloat16",
    "float32": "CATS, sums in float32",
    "dense": "dense, sums in bfloat16",
}


def partial_sums() -> str:
    data = read(SUMS_FILE)
    cells: dict[str, list[str]] = {}
    for row in data:
        cells.setdefault(row["sums"], []).append(f"{float(row['mlp_error']):.2%}, {float(row['kl']):.4f}")
    ranks = list(dict.fromkeys(row["ranks"] for row in data))
    first = data[0]
    about = (
        f"{source(SUMS_FILE, first)}: {first['model']} in bfloat16, sparsity {float(first['sparsity']):.0%} or dense, "
        f"{first['tokens']} tokens, each cell with the mean error of an MLP's output and the divergence."
    )
    head = ["", *(f"{n} rank{'s' * (n != '1')}" for n in ranks)]
    return f"{about}\n\n{table(head, [[SUMS[name], *found] for name, found in cells.items()])}"


PAGE = Page(
    "docs/serving.md",
    {
        "vllm": vllm,
        "awq": awq,
        "tokens": tokens,
        "two-gpus": two_gpus,
        "transformers": transformers,
        "partial-sums": partial_sums,
        "balance": balance,
        "on-paper": on_paper,
    },
)

if __name__ == "__main__":
    PAGE.write()
