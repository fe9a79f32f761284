"""Writes the tables of docs/finetuning.md from bench/results; tests/docs checks that they are current.

python bench tables.finetuning
"""

from __future__ import annotations

from statistics import mean

from bench.tables.pages import Page, link, read, source, table


def _by_name(rows: list[dict[str, str]]) -> dict[str, dict[int, dict[str, str]]]:
    """Rows of the mean over tasks, by variant and step."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for row in rows:
        if row["task"] == "mean":
            found.setdefault(row["name"], {})[int(row["step"])] = row
    return found


def quality() -> str:
    data = read("finetune/quality.csv")
    found = _by_name(data)
    steps = sorted(found["dense"])
    rows = []
    for name, mine in found.items():
        last = max(mine)
        cells = [f"{float(mine[0]['bytes']):.1%}" if mine[0]["bytes"] else "100.0%"]
        cells += [f"{100 * float(mine[step]['accuracy']):.1f}" if step in mine else "" for step in steps]
        difference = f"{100 * float(mine[last]['from_dense']):+.1f} ± {100 * float(mine[last]['from_dense_se']):.1f}"
        rows.append([name, *cells, "" if name == "dense" else f"{difference} at {last}"])
    header = ["eight tasks, %", "MLP weights read", *(f"{step} steps" for step in steps), "from dense, same steps"]
    return f"{source('finetune/quality.csv', data[0])}, {data[0]['device']}.\n\n{table(header, rows)}"


def text() -> str:
    found = _by_name(read("finetune/quality.csv"))
    steps = sorted(found["dense"])
    rows = [
        [name, *(f"{float(mine[step]['c4_ppl']):.1f}" if step in mine else "" for step in steps)]
        for name, mine in found.items()
    ]
    return table(["C4 perplexity", *(f"{step} steps" for step in steps)], rows)


def sparsity() -> str:
    layers = read("finetune/layers.csv")
    rows = []
    for name in dict.fromkeys(row["name"] for row in layers):
        mine = [row for row in layers if row["name"] == name]
        last = max(int(row["step"]) for row in mine)
        cells = [str(last)]
        for key in ("up", "down"):
            before, after = ([float(row[key]) for row in mine if int(row["step"]) == step] for step in (0, last))
            furthest = max((b - a for a, b in zip(before, after, strict=True)), key=abs)
            target = mean(float(row[f"{key}_target"]) for row in mine)
            cells += [f"{target:.1%}" if target else "", f"{sum(before) / len(before):.1%}"]
            cells += [f"{sum(after) / len(after):.1%}", f"{100 * furthest:+.1f}"]
        rows.append([name, *cells])
    columns = ("target", "before", "after", "largest change of a layer")
    return table(["", "steps", *(f"{key} {column}" for key in ("up", "down") for column in columns)], rows)


def tuned() -> str:
    data = read("finetune/tuned.csv")
    rows = []
    for name in dict.fromkeys(row["name"] for row in data if row["when"] == "recalibrated"):
        when = {row["when"]: row for row in data if row["name"] == name}
        cells = [f"{float(when[w]['held_out_ppl']):.2f}" for w in ("before", "after", "recalibrated")]
        cells += [f"{float(when[w]['bytes_share']):.1%}" for w in ("before", "after", "recalibrated")]
        rows.append([name, *cells])
    columns = ("before", "after", "recalibrated")
    return table(["", *(f"{what}, {c}" for what in ("perplexity", "weights read") for c in columns)], rows)


def training() -> str:
    data = read("h100/training.csv")
    keys = ("shape", "tuning", "sequences", "length", "commit")
    rows = []
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in data):
        kinds = {row["kind"]: row for row in data if tuple(row[key] for key in keys) == case}
        dense, patched = kinds["dense"], kinds["patched"]
        shape, tuning, sequences, length, commit = case
        rows.append(
            [
                f"{shape}, {'LoRA' if tuning == 'lora' else 'all weights'}, {sequences} x {length} tokens",
                f"{float(dense['step_ms']):.1f}",
                f"{float(patched['step_ms']):.1f} ({float(patched['step_ratio']):.3f}x)",
                f"{int(dense['peak_bytes']) / 1e9:.2f}",
                f"{int(patched['peak_bytes']) / 1e9:.2f} ({float(patched['peak_ratio']):.3f}x)",
                commit,
            ]
        )
    header = ["bf16", "dense, ms", "patched, ms", "dense, GB", "patched, GB", "commit"]
    facts = ", ".join((f"torch {data[0]['torch']}", data[0]["date"], data[0]["device"]))
    return f"{link('h100/training.csv')}, {facts}.\n\n{table(header, rows)}"


PAGE = Page("docs/finetuning.md", {make.__name__: make for make in (quality, text, sparsity, tuned, training)})

if __name__ == "__main__":
    PAGE.write()
