"""Writes the table of docs/quantization.md from bench/results; tests/docs checks that it is current.

python bench tables.quantization
"""

from __future__ import annotations

from bench.tables.pages import Page, read, source, table

FILE = "quality/quantized.csv"


def quality() -> str:
    data = read(FILE)
    (dense,) = (row for row in data if not row["formats"])

    def cells(row: dict[str, str], column: str) -> str:
        ratio = f" ({float(row[column]) / float(dense[column]):.3f}x)" if row is not dense else ""
        return f"{float(row[column]):.2f}{ratio}"

    rows = [
        [
            row["name"] if row is dense else f"{row['name']}: {row['formats'].replace(' ', ', ')}",
            f"{int(row['mlp_bytes']) / 1e6:.1f} MB",
            cells(row, "ppl"),
            cells(row, "cats_ppl"),
        ]
        for row in data
    ]
    header = ["MLP weights", "size (16 bits if dense)", "C4 perplexity", f"with CATS, {float(dense['sparsity']):.0%}"]
    about = f"{dense['model']}, {int(dense['tokens']):,} tokens, {dense['device']}"
    return f"{source(FILE, data[-1])}. {about}.\n\n{table(header, rows)}"


PAGE = Page("docs/quantization.md", {"quality": quality})

if __name__ == "__main__":
    PAGE.write()
