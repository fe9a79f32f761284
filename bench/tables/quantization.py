"""Writes the tables of docs/quantization.md from bench/results; tests/docs checks that they are current.

python bench tables.quantization
"""

from __future__ import annotations

from bench.tables.pages import Page, ratio, read, source, source_by_tokens, table

FILE, LAYERS = "quality/quantized.csv", ("h200/packed.csv", "h100/packed.csv")
TASKS, ALONE = (
    "quality/quantized_tasks.csv",
    {"lambada": "LAMBADA", "arithmetic": "arithmetic", "next_line": "next line"},
)
DECODE, TOKENS, PROMPTS = "h200/decode_packed.csv", "h200/packed_tokens.csv", "h200/prompts.csv"
CPU = "cpu-epyc-zen4/mlp_rows.csv"
PATHS = {"kernel": "the kernel at 50%", "product": "products with the rows", "unpacked": "unpacked"}
MODELS = {"mistral-7b": "Mistral-7B", "llama-3-8b": "Llama-3-8B"}
PEERS = ("bf16", "int8", "int4pack")
WEIGHTS = {"int4_g128": "int4", "int4_g128+int8_g128": "int4, down int8", "int8_g128": "int8", "fp8_e4m3": "fp8"}


def quality() -> str:
    data = read(FILE)
    parts = [source(FILE, data[-1]) + ". KL is the divergence from the dense model."]
    for model in dict.fromkeys(row["model"] for row in data):
        rows = [row for row in data if row["model"] == model]
        (dense,) = (row for row in rows if row["name"] == "as it is")
        header = ["MLP weights", "size (16 bits if dense)", "C4 perplexity", "KL"]
        header += [f"with CATS, {float(dense['sparsity']):.0%}", "KL"]
        parts.append(f"{model}, {int(dense['tokens']):,} tokens, {dense['device']}:")
        parts.append(table(header, [_quality_row(row, dense) for row in rows]))
    return "\n\n".join(parts)


def _quality_row(row: dict[str, str], dense: dict[str, str]) -> list[str]:
    formats = f": {row['formats'].replace(' ', ', ')}" if row["formats"] else ""
    cells = [row["name"] + formats, f"{int(row['mlp_bytes']) / 1e6:.1f} MB"]
    for kind in ("", "cats_"):
        if not row[f"{kind}ppl"]:
            cells += ["", ""]
            continue
        ratio = f" ({float(row[f'{kind}ppl']) / float(dense[f'{kind}ppl']):.3f}x)" if row is not dense else ""
        kl = float(row[f"{kind}kl"])
        cells += [f"{float(row[f'{kind}ppl']):.2f}{ratio}", f"{kl:.4f}" if kl else ""]
    return cells


def tasks() -> str:
    data = read(TASKS)
    dense = {
        (row["model"], row["task"]): row for row in data if row["name"] == "as it is" and not float(row["sparsity"])
    }
    parts = [
        source(TASKS, data[0]) + ", the reported half of the items. Differences in points, with their standard errors, "
        "are to the model as it is, dense."
    ]
    for model in dict.fromkeys(row["model"] for row in data):
        runs: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        for row in data:
            if row["model"] == model:
                runs.setdefault((row["name"], f"{float(row['sparsity']):.0%}"), {})[row["task"]] = row
        rows = []
        for (name, sparsity), found in runs.items():
            cells = [name, sparsity if float(sparsity.rstrip("%")) else "dense"]
            for task in ("mean", *ALONE):
                row = found[task]
                of_dense = row is dense[model, task]
                change, error = (
                    f"{100 * float(row[key]):{sign}.1f}" for key, sign in (("difference", "+"), ("difference_se", ""))
                )
                cells.append(f"{100 * float(row['sparse']):.1f}" + ("" if of_dense else f" ({change} ± {error})"))
            rows.append(cells)
        parts.append(f"{model}:")
        parts.append(table(["MLP weights", "neurons skipped", "eight tasks, mean", *ALONE.values()], rows))
    return "\n\n".join(parts)


def layers() -> str:
    return "\n\n".join(map(_layers, LAYERS))


def _layers(file: str) -> str:
    data = [row for row in read(file) if row["tokens"] == "1"]
    peers = [next(row for row in data if row["path"] == path and not float(row["sparsity"])) for path in PEERS]
    rows = [[row["variant"], f"{float(row['us']):.1f} us", "", "", ""] for row in peers]
    for name, title in WEIGHTS.items():
        cells = [f"{float(row['us']):.1f} us" for row in data if row["path"] == name]
        if cells:
            rows.append([f"`sparse_mlp_packed`, {title}", *cells])
        two = [f"{float(row['us']):.1f} us" for row in data if row["path"] == f"{name} two"]
        if two:  # the bytes of one threshold at 50 %
            rows.append([f"`sparse_mlp_packed`, {title}, 40 % of up and 60 % of down rows", "", *two, "", ""])
    header = ["one MLP, 4096x14336, one token", "dense or 0 %", "50 %", "70 %", "90 %"]
    return f"{data[0]['device']}: {source(file, data[0])}.\n\n{table(header, rows)}"


def cpu() -> str:
    data = read(CPU)
    dense = min(float(row["ms"]) for row in data if row["path"] == "dense")
    ms = {(row["path"], float(row["sparsity"])): f"{float(row['ms']):.2f}" for row in data if row["path"] != "dense"}
    sparsities = list(dict.fromkeys(sparsity for _, sparsity in ms))
    rows = [["dense, bf16", f"{dense:.2f} ms"] + [""] * (len(sparsities) - 1)]
    for path in dict.fromkeys(path for path, _ in ms):
        title = "`sparse_mlp`, bf16" if path == "sparse_mlp" else f"`sparse_mlp_packed`, {path}"
        cells = [
            f"{ms[path, s]} ms" + ("" if path == "sparse_mlp" else f", {ratio(ms['sparse_mlp', s], ms[path, s])}")
            for s in sparsities
        ]
        rows.append([title, *cells])
    first = data[0]
    header = ["one MLP, 4096x14336, one token", *("dense or 0 %" if not s else f"{s:.0%}" for s in sparsities)]
    about = f"{first['device']} (Zen 4), {first['threads']} threads, kernels {first['kernels']}, read limit "
    about += f"{float(first['read_limit_gb_per_s']):.0f} GB/s: {source(CPU, first)}. Ratios are to bf16 rows."
    return f"{about}\n\n{table(header, rows)}"


def decode() -> str:
    data = read(DECODE)
    (peer,) = (f"{float(row['tokens_per_s']):.0f}" for row in data if row["mode"] == "gpt-fast")
    rows = []
    names = list(MODELS)
    dense = {
        (row["model"], row["weights"]): f"{float(row['tokens_per_s']):.0f}"
        for row in data
        if row["mode"] == "captured" and not float(row["sparsity"])
    }
    for row in sorted(
        data,
        key=lambda row: (
            names.index(row["model"]), row["weights"], row["mode"] == "captured", float(row["reached"] or 0)
        ),
    ):  # fmt: skip
        speed, reached = f"{float(row['tokens_per_s']):.0f}", float(row["reached"] or 0)
        if abs(reached - float(row["sparsity"])) > 0.07:
            continue  # random weights: the text drifts from what was calibrated on, and the count from what was timed
        title = "gpt-fast" if row["mode"] == "gpt-fast" else "`DecodeEngine`"
        skipped = f"{reached:.0%}" if reached else "dense"
        compared = ratio(speed, peer) if row["model"] == names[0] else ""
        own = ratio(speed, dense[row["model"], row["weights"]]) if reached else ""
        title = f"{MODELS[row['model']]}, {title}, {row['weights'].partition('_')[0]}"
        rows.append([title, skipped, speed, own, compared])
    header = ["shape, one sequence", "neurons skipped", "tokens/s", "of dense", "of gpt-fast int4"]
    other = next(row["commit"] for row in data if row["weights"] == "bf16")
    about = f"{data[0]['device']}: {source(DECODE, data[0])}; bf16 in another run, commit {other}."
    return f"{about}\n\n{table(header, rows)}"


def prompts() -> str:
    data = read(TOKENS)
    times = {(row["format"], row["path"], int(row["tokens"])): f"{float(row['us']):.0f}" for row in data}
    formats = list(dict.fromkeys(row["format"] for row in data))
    rows = []
    for tokens in dict.fromkeys(int(row["tokens"]) for row in data):
        cells = []
        for name in formats:
            cells.append(f"{times[name, 'dense', tokens]} us")
            for path in PATHS:
                us = times.get((name, path, tokens))
                cells.append(f"{us} us, {ratio(times[name, 'dense', tokens], us)}" if us else "")
        rows.append([f"{tokens:,}", *cells])
    first = data[0]
    header = ["tokens"]
    for kind in (name.partition("_")[0] for name in formats):
        header += ["dense, bf16, eager", *(f"{kind}, {title}" for title in PATHS.values())]
    about = f"{first['device']}, one MLP, {first['hidden_size']}x{first['intermediate_size']}"
    about += f": {source_by_tokens(TOKENS, data)}. Ratios are to the dense MLP before them, of the same run."
    return f"{about}\n\n{table(header, rows)}"


def models_prompts() -> str:
    data = read(PROMPTS)
    times = {(row["prompt"], row["weights"]): f"{float(row['ms']):.2f}" for row in data}
    weights = [name for name in dict.fromkeys(row["weights"] for row in data) if name != "dense"]
    rows = []
    for prompt in dict.fromkeys(row["prompt"] for row in data):
        dense = times[prompt, "dense"]
        cells = [f"{times[prompt, name]} ms, {ratio(dense, times[prompt, name])}" for name in weights]
        rows.append([f"{int(prompt):,}", f"{dense} ms", *cells])
    header = ["tokens of the prompt", "bf16", *(name.partition("_")[0] for name in weights)]
    about = f"{data[0]['device']}, {data[0]['layers']} layers of {MODELS[data[0]['model']]}'s shape, all linear layers"
    return f"{about}: {source(PROMPTS, data[0])}. Ratios are to bf16.\n\n{table(header, rows)}"


PAGE = Page(
    "docs/quantization.md",
    {
        "quality": quality,
        "tasks": tasks,
        "layers": layers,
        "cpu": cpu,
        "decode": decode,
        "models-prompts": models_prompts,
        "prompts": prompts,
    },
)

if __name__ == "__main__":
    PAGE.write()
