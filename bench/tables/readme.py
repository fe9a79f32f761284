"""Writes README.md's result tables from the files in bench/results; tests/docs checks that they are current.

python bench tables.readme
"""

from __future__ import annotations

from bench.tables.pages import Page, read, source, table


def image(name: str, text: str) -> str:
    return f"![{text}](bench/results/{name})"


def gpu() -> str:
    name = "h100/mlp.csv"
    data = [row for row in read(name) if row["dtype"] == "bf16"]
    rows = []
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in data):
        group = [row for row in data if (row["shape"], row["tokens"]) == (shape, tokens)]
        dense = min(float(row["us"]) for row in group if row["path"] == "dense")
        size = f"{group[0]['hidden_size']}x{group[0]['intermediate_size']}"
        ours = {float(row["sparsity"]): row for row in group if row["path"] == "sparse_mlp"}
        cells = [f"{float(ours[s]['us']):.0f} us, {float(ours[s]['speedup']):.2f}x" for s in (0.0, 0.5, 0.7, 0.9)]
        rows.append([f"{shape}, {size}, {tokens} token{'s' * (tokens != '1')}", f"{dense:.0f} us", *cells])
    header = ["GPU, bf16, one layer's MLP", "fastest dense", *(f"sparsity {s} %" for s in (0, 50, 70, 90))]
    about = f"{data[0]['device']}: {source(name, data[0])}."
    return "\n\n".join((about, table(header, rows), image("h100/mlp.png", "time of a layer against sparsity")))


def cpu() -> str:
    name = "cpu-epyc-zen3/mlp_cpu.csv"
    data = read(name)
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in data):
        group = [row for row in data if row["dtype"] == dtype]
        dense = min(float(row["ms"]) for row in group if row["path"] == "dense")
        cells = [
            f"{float(row['ms']):.1f} ms, {float(row['speedup']):.2f}x" for row in group if row["path"] == "sparse_mlp"
        ]
        rows.append([f"mistral-7b, 4096x14336, {dtype}", f"{dense:.1f} ms", *cells])
    header = ["CPU, one token, one layer's MLP", "fastest dense", *(f"sparsity {s} %" for s in (0, 50, 70, 90))]
    first = data[0]
    return f"{first['device']} (Zen 3), {first['threads']} threads: {source(name, first)}.\n\n{table(header, rows)}"


def patching() -> str:
    name = "h100/patching.csv"
    data = read(name)
    share = max(float(row["added_share"]) for row in data)
    peak = max(int(row["peak_extra_bytes"]) for row in data) / 1e6
    seconds = max(float(row["seconds"]) for row in data)
    return (
        f"Patching a whole model of these shapes takes {seconds:.2f} s and {peak:.0f} MB meanwhile, and adds "
        f"{share:.3%} to its memory ({source(name, data[0])})."
    )


def host() -> str:
    name = "h100/host.csv"
    times = {row["way"]: float(row["host_us"]) for row in read(name) if row["mlp"] == "separate projections"}
    return (
        f"An eager call of a patched MLP takes {times['patched']:.0f} us of the host's time, where the dense MLP takes "
        f"{times['dense']:.0f} us ({source(name, read(name)[0])})."
    )


def decode() -> str:
    name = "h100/decode.csv"
    data = read(name)
    modes = {
        "captured": "captured step (`DecodeEngine`)",
        "deferred": "`generate`, compiled, `deferred_stop()`",
        "compiled": "`generate`, compiled",
        "eager": "`generate`",
    }
    rows = []
    for mode, title in modes.items():
        for model, prompt in dict.fromkeys((row["model"], row["prompt"]) for row in data if row["mode"] == mode):
            times = {
                float(r["sparsity"]): r for r in data if (r["model"], r["mode"], r["prompt"]) == (model, mode, prompt)
            }
            cells = [f"{float(times[0.0]['tokens_per_s']):.0f}"]
            for s in (0.5, 0.7, 0.9):  # a run can have been cut short
                row = times.get(s)
                cells.append(f"{float(row['tokens_per_s']):.0f}, {float(row['speedup']):.2f}x" if row else "not run")
            rows.append([f"{model}, {title}, after {int(prompt):,} tokens", *cells])
    header = ["tokens a second, whole models, bf16", "dense", *(f"sparsity {s} %" for s in (50, 70, 90))]
    sources = source(name, data[0] | {"commit": ", ".join(dict.fromkeys(row["commit"] for row in data))})
    about = "Random weights of these shapes, the paper's rule."
    about += " `generate` [waits for the host](docs/transformers.md#one-graph-a-token), whose time varies:"
    about += " its ratios are to the dense model in turns."
    picture = image("h100/decode.png", "tokens a second against sparsity")
    return f"{data[0]['device']}: {sources}. {about}\n\n{table(header, rows)}\n\n{picture}"


def tables() -> str:
    return "\n\n".join((gpu(), decode(), cpu(), patching(), host()))


PAGE = Page("README.md", {"results": tables})

if __name__ == "__main__":
    PAGE.write()
