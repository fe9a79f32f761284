"""Writes the table of docs/comparison.md from the files in bench/results; tests/docs checks that it is current.

python bench tables.comparison
"""

from __future__ import annotations

from bench.tables.pages import Page, ratio, read, source, table

NAME = "h100/mlp.csv"
SPARSITIES = (0.5, 0.7, 0.9)
PATHS = {
    "sparse_mlp": ("cats_ext, one threshold", "neurons"),
    "cats_triton": ("CATS, the authors' Triton kernels", "neurons"),
    "teal_triton": ("TEAL, the authors' Triton kernels, fp16", "inputs of all three matrices"),
}


def kernels() -> str:
    data = [row for row in read(NAME) if (row["shape"], row["tokens"]) == ("mistral-7b", "1")]
    dense = f"{min(float(row['us']) for row in data if row['path'] == 'dense'):.1f}"
    rows = [["dense, fastest of PyTorch's ways", "nothing", f"{dense} us", *[""] * len(SPARSITIES)]]
    for path, (title, skipped) in PATHS.items():
        group = {float(row["sparsity"]): row for row in data if row["path"] == path}
        cells = []
        for sparsity in SPARSITIES:
            time, read_share = f"{float(group[sparsity]['us']):.1f}", float(group[sparsity]["share_read"])
            cells.append(f"{time} us, {ratio(dense, time)}, {read_share:.0%} read")
        rows.append([title, skipped, dense + " us", *cells])
    first = data[0]
    header = ["one MLP, 4096x14336, one token, bf16", "what is skipped", "dense", *(f"{s:.0%}" for s in SPARSITIES)]
    return f"{first['device']}: {source(NAME, first)}.\n\n{table(header, rows)}"


PAGE = Page("docs/comparison.md", {"kernels": kernels})

if __name__ == "__main__":
    PAGE.write()
