"""Writes the numbers of README.md from the files in bench/results; tests/docs checks that it is current.

python bench tables.readme
"""

from __future__ import annotations

from bench.tables.pages import Page, link, ratio, read, table

MODEL, SPARSITY = "mistral-7b", 0.5


def decode_row() -> list[str]:
    name = "h100/decode.csv"
    rates = {
        float(row["sparsity"]): f"{float(row['tokens_per_s']):.1f}"
        for row in read(name)
        if (row["model"], row["mode"], row["prompt"]) == (MODEL, "captured", "64")
    }
    what = f"Mistral-7B's shape on an H100, bf16, one sequence, {SPARSITY:.0%} of the neurons skipped: tokens/s"
    return [f"{what} ({link(name)})", rates[0.0], rates[SPARSITY], ratio(rates[SPARSITY], rates[0.0])]


def cpu_row() -> list[str]:
    name = "cpu-epyc-zen3/mlp_cpu.csv"
    data = [row for row in read(name) if row["dtype"] == "bf16"]
    dense = f"{min(float(row['ms']) for row in data if row['path'] == 'dense'):.2f}"
    (sparse,) = (row for row in data if row["path"] == "sparse_mlp" and float(row["sparsity"]) == SPARSITY)
    time = f"{float(sparse['ms']):.2f}"
    what = f"one of its MLPs on {sparse['threads']} cores of a Zen 3, bf16, one token, {SPARSITY:.0%} skipped: ms"
    return [f"{what} ({link(name)})", dense, time, ratio(dense, time)]


def quality_row() -> list[str]:
    name = "quality/tasks.csv"
    (row,) = (r for r in read(name) if (r["name"], r["task"]) == ("two_threshold 50%", "mean"))
    dense, sparse, error = (f"{100 * float(row[key]):.1f}" for key in ("dense", "sparse", "difference_se"))
    what = "SmolLM2-135M-Instruct with the default thresholds, eight tasks: % right"
    return [f"{what} ({link(name)})", dense, sparse, f"{float(sparse) - float(dense):+.1f} ± {error}"]


def tables() -> str:
    header = ["two thirds of the MLP weights read", "dense", "CATS", ""]
    picture = "![tokens a second against sparsity](bench/results/h100/decode_engine.png)"
    return f"{table(header, [decode_row(), cpu_row(), quality_row()])}\n\n{picture}"


PAGE = Page("README.md", {"results": tables})

if __name__ == "__main__":
    PAGE.write()
