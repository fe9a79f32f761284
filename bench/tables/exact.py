"""Writes the tables of docs/exact.md from bench/results; tests/docs checks that they are current.

python bench tables.exact
"""

from __future__ import annotations

from collections.abc import Callable

from bench.tables.pages import Page, ratio, read, source, source_by_tokens, table

LAYERS, MODELS = "h200/exact.csv", "h200/decode_exact.csv"
TITLES = {
    "gemma-3n-e4b": "Gemma 3n E4B",
    "gemma-3n-e2b": "Gemma 3n E2B",
    "gemma-3n-e4b-7": "Gemma 3n E4B, 7 layers, two of them sparse",
    "gated-relu": "gated ReLU",
    "relu2": "squared ReLU without a gate",
    "llama-2-7b-relu": "Llama-2-7B with ReLU",
}
DENSE = "dense"  # with which the names of dense paths begin
PATHS = {  # the fastest of these; several times of one line are ways of running the same
    "zeros skipped": ("activated_mlp", "activated_mlp, compiled", "sparse_mlp"),
    "zeros skipped, in one call": ("exact_mlp",),
    "dense, in the patched model's layout": ("dense, down transposed",),
    "CATS of SiLU": ("sparse_mlp, CATS of SiLU",),
}
MODES = {"compiled": "`generate`, compiled", "captured": "`DecodeEngine`"}


def layers() -> str:
    data = read(LAYERS)
    tokens = sorted({int(row["tokens"]) for row in data})
    rows = []
    for name in dict.fromkeys(row["layer"] for row in data):
        of_layer = [row for row in data if row["layer"] == name]
        first = of_layer[0]

        def fastest(count: int, serves: Callable[[str], bool]) -> str | None:
            times = [float(r["us"]) for r in of_layer if int(r["tokens"]) == count and serves(r["path"])]  # noqa: B023
            return f"{min(times):.1f}" if times else None

        dense = {count: fastest(count, lambda path: path.startswith(DENSE)) for count in tokens}
        shape = f"{first['hidden_size']}x{first['intermediate_size']}, {float(first['sparsity']):.0%} zeros"
        rows.append([f"{TITLES[name]}, {shape}", "fastest dense", *(f"{us} us" if us else "" for us in dense.values())])
        for title, paths in PATHS.items():
            times = {count: fastest(count, lambda path: path in paths) for count in tokens}  # noqa: B023
            if any(times.values()):
                cells = (f"{us} us, {ratio(dense[count], us)}" if us else "" for count, us in times.items())
                rows.append(["", title, *cells])
    header = ["one MLP, bf16", "", *(f"{count} token{'s' if count > 1 else ''}" for count in tokens)]
    return f"{data[0]['device']}: {source_by_tokens(LAYERS, data)}.\n\n{table(header, rows)}"


def models() -> str:
    data = read(MODELS)
    rows = []
    for name, mode in dict.fromkeys((row["model"], row["mode"]) for row in data):
        dense, exact = (
            f"{float(row['tokens_per_s']):.1f}"
            for path in ("dense", "exact")
            for row in data
            if (row["model"], row["mode"], row["path"]) == (name, mode, path)
        )
        rows.append([f"{TITLES[name]}, {MODES[mode]}", dense, f"{exact}, {ratio(exact, dense)}"])
    header = ["tokens a second, bf16, one sequence, random weights", "dense", "`apply_exact`"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in data))
    return f"{data[0]['device']}: {source(MODELS, data[0] | {'commit': commits})}.\n\n{table(header, rows)}"


PAGE = Page("docs/exact.md", {"layers": layers, "models": models})

if __name__ == "__main__":
    PAGE.write()
