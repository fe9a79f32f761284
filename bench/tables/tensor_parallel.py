"""Writes the tables on tensor parallelism of docs/serving.md from bench/results; tests/docs checks it.

python bench tables.tensor_parallel
"""

from __future__ import annotations

from bench.tables.pages import Page, read, source, table

FILE, SUMS_FILE = "cpu/balance.csv", "cpu/partial_sums.csv"
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


PAGE = Page("docs/serving.md", {"balance": balance, "partial-sums": partial_sums})

if __name__ == "__main__":
    PAGE.write()
