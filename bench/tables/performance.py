"""Writes the tables of docs/performance.md from the files in bench/results; tests/docs checks that they are current.

Every ratio is that of the two numbers shown, so that a reader can recompute it.

python bench tables.performance
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.tables.pages import Page, image, link, ratio, read, source, table

SPARSITIES = (0.5, 0.7, 0.9)
SKIPPED = [f"{s:.0%} skipped" for s in SPARSITIES]
MODES = {
    "captured": "`DecodeEngine`",
    "deferred": "`generate`, compiled, in `deferred_stop()`",
    "compiled": "`generate`, compiled",
}


def faster(times: Iterable[float], dense: float, form: str, unit: str) -> list[str]:
    """The dense time, then each of the others with its ratio to it."""
    first = format(dense, form)
    shown = [format(time, form) for time in times]
    return [f"{first} {unit}", *(f"{time} {unit}, {ratio(first, time)}" for time in shown)]


def spread(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


def gpu() -> str:
    name = "h100/mlp.csv"
    data = [row for row in read(name) if row["dtype"] == "bf16"]
    rows = []
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in data):
        group = [row for row in data if (row["shape"], row["tokens"]) == (shape, tokens)]
        dense = min(float(row["us"]) for row in group if row["path"] == "dense")
        size = f"{group[0]['hidden_size']}x{group[0]['intermediate_size']}"
        ours = {float(row["sparsity"]): float(row["us"]) for row in group if row["path"] == "sparse_mlp"}
        cells = faster([ours[s] for s in (0.0, *SPARSITIES)], dense, ".1f", "us")
        rows.append([f"{shape}, {size}, {tokens} token{'s' * (tokens != '1')}", *cells])
    header = ["one layer's MLP, bf16", "fastest dense", "0% skipped", *SKIPPED]
    about = f"{data[0]['device']}: {source(name, data[0])}. Medians of a CUDA graph over layers of distinct weights."
    return "\n\n".join((about, table(header, rows), image("h100/mlp.png", "time of a layer against sparsity")))


def decode() -> str:
    name = "h100/decode.csv"
    data = read(name)
    rows = []
    for mode, title in MODES.items():
        for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in data if row["mode"] == mode):
            group = [row for row in data if (row["model"], row["mode"], row["prompt"]) == (model, mode, prompt)]
            rates = {float(row["sparsity"]): f"{float(row['tokens_per_s']):.1f}" for row in group}
            cells = [f"{rates[s]}, {ratio(rates[s], rates[0.0])}" for s in SPARSITIES]
            rows.append([f"{model}, {title}, after {int(prompt):,} tokens", rates[0.0], *cells])
    header = ["tokens a second, whole models, bf16", "dense", *SKIPPED]
    sources = source(name, data[0] | {"commit": ", ".join(dict.fromkeys(row["commit"] for row in data))})
    about = (
        f"{data[0]['device']}: {sources}, by `python bench decode.speed`. Random weights of these shapes, one "
        "threshold a layer. Each rate is the median over all turns of its model."
    )
    picture = image("h100/decode.png", "tokens a second against sparsity")
    return f"{about}\n\n{table(header, rows)}\n\n{waiting(data)}\n\n{picture}"


def waiting(data: list[dict[str, str]]) -> str:
    """What to say of the modes in which the host's time varies: medians of all turns do not tell them apart."""
    sparse = [row for row in data if float(row["sparsity"])]
    paired = {mode: spread((float(r["speedup"]) for r in sparse if r["mode"] == mode), ".2f") for mode in MODES}
    eager = [row for row in data if row["mode"] == "eager"]
    eager_rates = spread((float(row["tokens_per_s"]) for row in eager), ".0f")
    eager_paired = spread((float(row["speedup"]) for row in eager if float(row["sparsity"])), ".2f")
    return (
        "`generate` waits for the host, whose speed drifts during a run. The column `speedup` of the file has what "
        "drifts less, the median of the ratios to the dense model in the same turn: for compiled `generate` "
        f"{paired['compiled']}, in `deferred_stop()` {paired['deferred']}. Not in the table, because all of it is the "
        f"host: eager `generate`, at {eager_rates} tokens a second dense or sparse, and {eager_paired} by turns."
    )


def first_token() -> str:
    name = "h100/first_token.csv"
    data = read(name)
    data = [row for row in data if row["commit"] == data[0]["commit"]]
    rows = []
    for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in data):
        group = [row for row in data if (row["model"], row["prompt"]) == (model, prompt)]
        cells = {float(row["sparsity"]): f"{float(row['of_dense_median']):.3f}" for row in group}
        rows.append([f"{model}, prompt of {int(prompt):,} tokens", *(cells[s] for s in SPARSITIES)])
    about = (
        f"{data[0]['device']}: {source(name, data[0])}. The time to the first token as a share of the dense model's in "
        f"the same turn, median of {data[0]['turns']} turns. Prompts run densely with a mask."
    )
    return f"{about}\n\n{table(['time to the first token, dense = 1', *SKIPPED], rows)}"


def memory() -> str:
    name, patching = "h100/decode.csv", "h100/patching.csv"
    data = [row for row in read(name) if row["prompt"] == "1024"]
    titles = MODES | {"eager": "`generate`"}
    rows = []
    for model, mode in dict.fromkeys((row["model"], row["mode"]) for row in data):
        group = [row for row in data if (row["model"], row["mode"]) == (model, mode)]
        dense, half = (next(r for r in group if float(r["sparsity"]) == s) for s in (0.0, 0.5))
        cells = [f"{int(row[key]) / 1e9:.2f}" for key in ("bytes_at_rest", "bytes_peak") for row in (dense, half)]
        rows.append([f"{model}, {titles[mode]}", *cells])
    header = ["GB, after 1,024 tokens", "at rest, dense", "at rest, sparse", "peak, dense", "peak, sparse"]
    patched = read(patching)
    seconds, peak = max(float(r["seconds"]) for r in patched), max(int(r["peak_extra_bytes"]) for r in patched) / 1e6
    share = max(float(row["added_share"]) for row in patched)
    about = (
        f"{link(name)}; cuBLAS's workspace, 34 MB, is in some of the rows only. Patching a whole model of these shapes "
        f"takes {seconds:.2f} s and {peak:.0f} MB meanwhile, and adds {share:.3%} to its memory "
        f"({source(patching, patched[0])})."
    )
    return f"{about}\n\n{table(header, rows)}"


BUDGETS = ("0.6667", "0.55")
RULES = {"two_threshold": "default", "three_threshold": "`three_threshold`"}


def columns() -> str:
    """The default rule and the one with a threshold of inputs, at equal bytes: one MLP, and a whole model."""
    name, decoded = "h200/columns.csv", "h200/decode.csv"
    data, rows = read(name), []
    for shape in dict.fromkeys(row["shape"] for row in data):
        group = {(row["path"], row["budget"]): row for row in data if row["shape"] == shape}
        dense = group["dense", "1.0"]
        paths = ("sparse_mlp", "sparse_mlp_columns")
        times = [float(group[path, budget]["us"]) for budget in BUDGETS for path in paths]
        size = f"{dense['hidden_size']}x{dense['intermediate_size']}"
        rows.append([f"an MLP, {size}", *faster(times, float(dense["us"]), ".1f", "us")])
    header = ["one token, bf16", "dense", *(f"{rule}, {float(b):.0%}" for b in BUDGETS for rule in RULES.values())]
    rates, dense_rate, found = read(decoded), "", {}
    for row in (row for row in rates if row["mode"] == "captured"):
        rate, rule = f"{float(row['tokens_per_s']):.1f}", row["rule"]
        if not rule:
            dense_rate = rate  # of the rows that follow: the same run
        else:
            found.setdefault(rule, [dense_rate]).append((float(row["sparsity"]), f"{rate}, {ratio(rate, dense_rate)}"))
    for rule, (dense_rate, *of_rule) in found.items():
        cells = [dict(of_rule)[s] if rule == other else "" for s in (0.5, 0.675) for other in RULES]
        rows.append([f"{rates[0]['model']}, `DecodeEngine`, tokens a second", dense_rate, *cells])
    commits = {"commit": ", ".join(dict.fromkeys(row["commit"] for row in rates))}
    about = f"{data[0]['device']}: {source(name, data[0])}; {source(decoded, rates[0] | commits)}."
    return f"{about}\n\n{table(header, rows)}"


def host() -> str:
    name = "h100/host.csv"
    data = read(name)
    rows = []
    for mlp in dict.fromkeys(row["mlp"] for row in data):
        times = {row["way"]: float(row["host_us"]) for row in data if row["mlp"] == mlp}
        rows.append([mlp, f"{times['dense']:.1f} us", f"{times['patched']:.1f} us"])
    return f"{source(name, data[0])}.\n\n{table(['time of the host, eager call of an MLP', 'dense', 'patched'], rows)}"


def cpu() -> str:
    name = "cpu-epyc-zen3/mlp_cpu.csv"
    data = read(name)
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in data):
        group = [row for row in data if row["dtype"] == dtype]
        dense = min(float(row["ms"]) for row in group if row["path"] == "dense")
        ours = {float(row["sparsity"]): float(row["ms"]) for row in group if row["path"] == "sparse_mlp"}
        cells = faster([ours[s] for s in (0.0, *SPARSITIES)], dense, ".2f", "ms")
        rows.append([f"mistral-7b, 4096x14336, {dtype}", *cells])
    header = ["one token, one layer's MLP", "fastest dense", "0% skipped", *SKIPPED]
    first = data[0]
    return f"{first['device']} (Zen 3), {first['threads']} threads: {source(name, first)}.\n\n{table(header, rows)}"


def experts() -> str:
    """One token through a block of experts, against the fastest implementation of transformers."""
    cases = [
        ("h100/experts.csv", "mixtral-8x7b", "graph", "H100, in a graph"),
        ("h100/experts.csv", "mixtral-8x7b", "eager", "H100, launched from Python"),
        ("h100/experts.csv", "qwen3-30b-a3b", "graph", "H100, in a graph"),
        ("h100/experts.csv", "qwen3-30b-a3b", "eager", "H100, launched from Python"),
        ("cpu-epyc-zen3/experts.csv", "small", "eager", "two cores of a Zen 3"),
    ]
    rows = []
    for name, shape, mode, where in cases:
        group = [
            r for r in read(name) if (r["shape"], r["mode"], r["dtype"], r["tokens"]) == (shape, mode, "bf16", "1")
        ]
        dense = min(float(row["us"]) for row in group if not row["path"].startswith("patched"))
        ours = {row["path"].removeprefix("patched "): float(row["us"]) for row in group}
        size = "H {hidden_size}, I {intermediate_size}, {experts_per_token} of {experts} experts".format(**group[0])
        cells = faster([ours[f"{s:.0%}"] for s in (0.0, *SPARSITIES)], dense, ".0f", "us")
        rows.append([f"{shape}, {size}, {where}", *cells])
    names = dict.fromkeys(name for name, *_ in cases)
    about = f"{'; '.join(source(name, read(name)[0]) for name in names)}. Whole models have not been timed."
    return f"{about}\n\n{table(['one token, bf16, a block of experts', 'transformers', '0% skipped', *SKIPPED], rows)}"


PAGE = Page(
    "docs/performance.md",
    {
        "decode": decode,
        "gpu": gpu,
        "columns": columns,
        "cpu": cpu,
        "experts": experts,
        "first-token": first_token,
        "memory": memory,
        "host": host,
    },
)

if __name__ == "__main__":
    PAGE.write()
