"""Writes the tables of docs/quantization.md from bench/results; tests/docs checks that they are current.

python bench tables.quantization
"""

from __future__ import annotations

from bench.tables.pages import Page, ratio, read, source, table

FILE, LAYERS, DECODE = "quality/quantized.csv", "h100/packed.csv", "h200/decode_packed.csv"
PEERS = ("bf16", "int8", "int4pack")
WEIGHTS = {"int4_g128": "int4", "int4_g128+int8_g128": "int4, down int8", "int8_g128": "int8", "fp8_e4m3": "fp8"}


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


def layers() -> str:
    data = [row for row in read(LAYERS) if row["tokens"] == "1"]
    peers = [next(row for row in data if row["path"] == path and not float(row["sparsity"])) for path in PEERS]
    rows = [[row["variant"], f"{float(row['us']):.1f} us", "", "", ""] for row in peers]
    for name, title in WEIGHTS.items():
        cells = [f"{float(row['us']):.1f} us" for row in data if row["path"] == name]
        rows.append([f"`sparse_mlp_packed`, {title}", *cells])
    header = ["one MLP, 4096x14336, one token", "dense or 0 %", "50 %", "70 %", "90 %"]
    return f"{data[0]['device']}: {source(LAYERS, data[0])}.\n\n{table(header, rows)}"


def decode() -> str:
    data = read(DECODE)
    (peer,) = (f"{float(row['tokens_per_s']):.0f}" for row in data if row["mode"] == "gpt-fast")
    rows = []
    for row in sorted(data, key=lambda row: (row["weights"], row["mode"] == "captured", float(row["reached"] or 0))):
        speed, reached = f"{float(row['tokens_per_s']):.0f}", float(row["reached"] or 0)
        if abs(reached - float(row["sparsity"])) > 0.07:
            continue  # random weights: the text drifts from what was calibrated on, and the count from what was timed
        title = "gpt-fast" if row["mode"] == "gpt-fast" else "`DecodeEngine`"
        skipped = f"{reached:.0%}" if reached else "dense"
        rows.append([f"{title}, {row['weights'].partition('_')[0]}", skipped, speed, ratio(speed, peer)])
    header = ["Mistral-7B's shape, one sequence", "neurons skipped", "tokens/s", "of gpt-fast int4"]
    return f"{data[0]['device']}: {source(DECODE, data[0])}.\n\n{table(header, rows)}"


PAGE = Page("docs/quantization.md", {"quality": quality, "layers": layers, "decode": decode})

if __name__ == "__main__":
    PAGE.write()
