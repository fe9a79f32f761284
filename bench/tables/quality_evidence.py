"""Writes the tables of docs/quality-evidence.md from bench/results/quality; tests/docs checks that they are current.

python bench tables.quality_evidence
"""

from __future__ import annotations

from bench.tables.pages import Page, link, read, source, table
from bench.tables.quality_models import columns, compensation, peers

LARGE = "h200/calibration.csv"


def made(*names: str) -> str:
    """Where the numbers come from: the first file, and the torch, commits and dates of all."""
    rows = [row for name in names for row in read(name)]
    facts = [", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("torch", "commit", "date")]
    files = ", ".join(map(link, names))
    return f"{files}, torch {facts[0]}, commits {facts[1]}, {facts[2]}"


def accuracy(row: dict[str, str]) -> str:
    value, difference, error = (100 * float(row[key]) for key in ("sparse", "difference", "difference_se"))
    return f"{value:.1f} ({difference:+.1f} ± {error:.1f})"


def perplexity(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    value, ratio = float(row["ppl"]), float(row["ppl"]) / float(row["dense_ppl"])
    return f"{value:.2f} ({ratio:.3f}x)" if ratio < 10 else f"{value:,.0f}"


def measured() -> tuple[dict[tuple[str, str], dict[str, str]], dict[tuple[str, str], dict[str, str]]]:
    """Rows of text.csv by name and text, and of tasks.csv by name and task."""
    text, tasks = read("quality/text.csv"), read("quality/tasks.csv")
    return {(row["name"], row["text"]): row for row in text}, {(row["name"], row["task"]): row for row in tasks}


def rules() -> str:
    text, tasks = measured()
    first = {kind: next(row for (_, t), row in text.items() if t == kind) for kind in ("wikitext", "c4")}
    cells = [f"{float(first[kind]['dense_ppl']):.2f}" for kind in ("wikitext", "c4")]
    cells += [f"{100 * float(tasks['dense', task]['sparse']):.1f}" for task in ("mean", "lambada")]
    rows = [["dense", "100.0%", *cells[:2], "0", *cells[2:]]]
    for name in (name for name, kind in text if kind == "c4"):
        wikitext, c4 = (text[name, kind] for kind in ("wikitext", "c4"))
        cells = [f"{float(c4['bytes']):.1%}", perplexity(wikitext), perplexity(c4), f"{float(c4['kl']):.3f}"]
        cells += [accuracy(tasks[name, task]) if (name, task) in tasks else "" for task in ("mean", "lambada")]
        rows.append([NAMES.get(name, name), *cells])
    header = ["", "MLP weights read", "WikiText-2 perplexity", "C4 perplexity", "C4 KL, nats", "eight tasks, %"]
    return f"{made('quality/text.csv', 'quality/tasks.csv')}.\n\n{table([*header, 'LAMBADA, %'], rows)}"


def budgets() -> str:
    text, tasks = measured()
    rows = []
    for name in (name for name, kind in text if kind == "wikitext" and ("67.5%" in name or ", WikiText" in name)):
        row = text[name, "wikitext"]
        cells = ["WikiText-2" if ", WikiText" in name else "mixed", f"{float(row['bytes']):.1%}"]
        cells += [perplexity(row), f"{float(row['kl']):.3f}"]
        rows.append([NAMES.get(name.replace(", WikiText", ""), name), *cells])
        rows[-1] += [accuracy(tasks[name, task]) if (name, task) in tasks else "" for task in ("mean", "lambada")]
    header = ["", "calibrated on", "MLP weights read", "WikiText-2 perplexity", "KL, nats", "eight tasks, %"]
    return table([*header, "LAMBADA, %"], rows)


def reached() -> str:
    layers: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read("quality/layers.csv"):
        if row["rule"] and ", WikiText" not in row["name"]:
            layers.setdefault((row["name"], row["text"]), []).append(row)
    rows = []
    for name in (name for name, kind in layers if kind == "c4"):
        cells = []
        for kind in ("wikitext", "c4"):
            for k in ("up", "down"):
                gaps = [100 * (float(row[k]) - float(row[f"{k}_target"])) for row in layers[name, kind]]
                cells.append(f"{sum(gaps) / len(gaps):+.1f} ({max(map(abs, gaps)):.1f})")
        rows.append([NAMES.get(name, name), *cells])
    header = ["points from the target", *(f"{text}, {k}" for text in ("WikiText-2", "C4") for k in ("up", "down"))]
    return table(header, rows)


NAMES = {
    "plain 50%": "plain, 50 / 50 %: the paper's",
    "weighted 50%": "weighted, 50 / 50 %",
    "plain, 32 windows 50%": "plain, on 32 windows",
    "two_threshold weighted 50%": "two thresholds weighted by norms, power 1 in all layers, 40 / 60 %",
    "two_threshold weighted, 32 windows 50%": "the same, on 32 windows",
    "two_threshold norms 50%": "two thresholds by norms",
    "two_threshold, 8 windows 50%": "by gradients, all layers alike",
    "two_threshold search, 8 windows 50%": "by gradients, searched",
    "two_threshold 50%": "by gradients, all layers alike, on 32 windows: **the default**",
    "two_threshold search 50%": "by gradients, searched, on 32 windows",
    "two_threshold unweighted 50%": "two thresholds without gate weights, 40 / 60 %",
    "gradient search 50%": "by gradients, power 1/2 in all layers, searched freely but for the last layer",
    "gradient search and last layer 50%": "by gradients, power 1/2 in all layers, all searched freely",
    "ReLUfication": "ReLUfication, not tuned",
    "plain 67.5%": "plain",
    "weighted 67.5%": "weighted",
    "two_threshold 67.5%": "by gradients, all layers alike, on 32 windows: the default",
    "two_threshold search 67.5%": "by gradients, searched, on 32 windows",
    "two_threshold unweighted 67.5%": "two thresholds without gate weights",
    "gradient search 67.5%": "by gradients, power 1/2 in all layers, searched freely but for the last layer",
    "gradient search and last layer 67.5%": "by gradients, power 1/2 in all layers, all searched freely",
}

SWEEP = {
    "plain": "plain, 50 / 50 %",
    "weighted rms1": "weighted, norms, power 1",
    "weighted rms.5": "weighted, norms, power 0.5",
    "weighted fisher1": "weighted, gradients, power 1",
    "two .45": "two thresholds, 45 / 55 %",
    "two": "two thresholds, 40 / 60 %",
    "two .35": "two thresholds, 35 / 65 %",
    "two .3": "two thresholds, 30 / 70 %",
    "two rms.25": "the same, gate weighted by norms, power 0.25",
    "two rms.5": "the same, gate weighted by norms, power 0.5",
    "two rms1": "the same, gate weighted by norms, power 1",
    "two fisher.5 fisher": "the same, weighted by gradients, power 0.5",
    "two fisher1 fisher": "the same, weighted by gradients, power 1",
    "two alloc error": "the same, layers by output error",
    "two alloc relative": "the same, layers by relative output error",
    "two alloc kl": "the same, layers by measured KL",
    "two alloc fisher": "the same, layers by gradients (as the package's search, spread 1)",
    "two fisher.5 fisher alloc fisher": "weights and layers by gradients, power 0.5",
}


def sweep() -> str:
    data = {row["name"]: row for row in read("quality/sweep_rules.csv")}
    dense = data["dense"]
    rows = [["dense", "", f"{float(dense['c4_ppl']):.2f}", "", f"{float(dense['lambada']):.1f}"]]
    for name, words in SWEEP.items():
        row = data[name]
        ratio = float(row["wikitext_ppl"]) / float(dense["wikitext_ppl"])
        cells = [f"{ratio:.3f}x", f"{float(row['c4_ppl']):.2f}", f"{float(row['c4_kl']):.3f}"]
        rows.append([words, *cells, f"{float(row['lambada']):.1f}"])
    return table(["", "WikiText-2 perplexity", "C4 perplexity", "C4 KL, nats", "LAMBADA, %"], rows)


CHOICE = {
    ("plain", "mixed"): "plain, 50 / 50 %",
    ("two", "wikitext"): "no gate weights, 40 / 60 %",
    ("two", "mixed"): "no gate weights, 40 / 60 %",
    ("two 37.5/62.5", "mixed"): "no gate weights, 37.5 / 62.5 %",
    ("two 35/65", "mixed"): "no gate weights, 35 / 65 %",
    ("two rms1", "wikitext"): "power 1, 40 / 60 %",
    ("two rms1", "mixed"): "power 1, 40 / 60 %",
    ("rms.125", "mixed"): "power 1/8, 40 / 60 %",
    ("rms.125 37.5/62.5", "mixed"): "power 1/8, 37.5 / 62.5 %",
    ("rms.125 35/65", "mixed"): "power 1/8, 35 / 65 %",
    ("rms.1 37.5/62.5", "mixed"): "power 0.1, 37.5 / 62.5 %",
    ("rms.15 37.5/62.5", "mixed"): "power 0.15, 37.5 / 62.5 %",
    ("rms.125 37.5/62.5 skip4", "mixed"): "power 1/8, without the first four positions",
    ("rms.125 37.5/62.5 first 4 dense", "mixed"): "power 1/8, the first four positions dense",
    ("u.125 37.5/62.5", "mixed"): "by rms(u) alone, power 1/8, 37.5 / 62.5 %",
    ("norm.25 37.5/62.5", "mixed"): "by norm(Wd) alone, power 1/4, 37.5 / 62.5 %",
    ("fisher.125", "mixed"): "by gradients, power 1/8, 40 / 60 %",
    ("search within .1", "mixed"): "no gate weights, searched within 0.1",
    ("rms.125 search within .1", "mixed"): "power 1/8, searched within 0.1",
    ("fisher.125 search within .1", "mixed"): "by gradients, power 1/8, searched within 0.1",
}
LAST = {
    "rms.125 37.5/62.5": "by norms, power 1/8 in all layers",
    "rms.125 last dense": "by norms, power 1/8, last layer dense",
    "two rms1": "by norms, power 1 in all layers, 40 / 60 %",
    "rms1 last dense": "by norms, power 1, last layer dense",
    "rms1 last 20/40": "by norms, power 1, last layer 20 / 40 %",
    "rms1 last0": "by norms, power 1, in the last layer 0",
    "rms.5 last dense": "by norms, power 1/2, last layer dense",
    "fisher.5 last dense": "by gradients, power 1/2, last layer dense",
    "fisher.5 last dense search within .1": "the same, searched within 0.1",
}
TEXT_USED = {
    "8w 50%": "all alike, 8 windows",
    "8w free 50%": "searched, 8 windows",
    "32w 50%": "all alike, 32 windows, gradients of the first 8",
    "32wg 50%": "all alike, 32 windows, gradients of all",
    "32wg free 50%": "searched, 32 windows, gradients of all",
}
SEARCH = {
    "default": "all layers alike",
    "searched": "searched",
    "means but last": "all alike, means of what is dropped added, but in the last layer",
}


def last_words(name: str, rules: dict[tuple[str, str], str]) -> str:
    data = {(row["name"], row.get("text", "")): row for row in read(name)}
    dense = data["dense", ""]
    rows = [["dense", "", f"{float(dense['c4_ppl']):.2f}", "0"]]
    rows[0] += [f"{float(dense[task]):.1f}" for task in ("lambada", "words")]
    for (name, text), words in rules.items():
        row = data[name, text]
        ratio = float(row["wikitext_ppl"]) / float(dense["wikitext_ppl"])
        where = " (WikiText-2)" if text == "wikitext" else ""
        cells = [f"{ratio:.3f}x", f"{float(row['c4_ppl']):.2f}", f"{float(row['c4_kl']):.3f}"]
        for task in ("lambada", "words"):
            cells.append(f"{float(row[task]):.1f} ({float(row[f'{task}_difference']):+.1f} ± ")
            cells[-1] += f"{float(row[f'{task}_se']):.1f})"
        rows.append([words + where, *cells])
    header = ["two thresholds, gate weighted", "WikiText-2 perplexity", "C4 perplexity", "C4 KL, nats"]
    return table([*header, "LAMBADA, %", "repeated words, %"], rows)


def choice() -> str:
    return last_words("quality/sweep_choice.csv", CHOICE)


def last() -> str:
    return last_words("quality/sweep_last.csv", {(name, ""): words for name, words in LAST.items()})


def last_layer_alone() -> str:
    return last_words("quality/sweep_search.csv", {(name, ""): words for name, words in SEARCH.items()})


def text_used() -> str:
    return last_words("quality/selection.csv", {(name, ""): words for name, words in TEXT_USED.items()})


def generation() -> str:
    rows = [
        [
            NAMES.get(row["name"], row["name"]),
            f"{float(row['agreed_prefix_mean']):.1f}",
            f"{float(row['agreed_prefix_median']):.0f}",
            f"{float(row['first_16_identical']):.0%}",
            f"{float(row['repeated_4grams']):.1%}",
        ]
        for row in read("quality/generation.csv")
    ]
    header = ["", "agreeing tokens, mean", "median", "first 16 the same", "repeated 4-grams"]
    return table(header, rows)


def prefill() -> str:
    data = read("quality/prefill.csv")
    names = list(dict.fromkeys(row["name"] for row in data))
    ppl = {(row["name"], row["prompt"]): float(row["ppl"]) for row in data}
    rows = [[NAMES.get(name, name), f"{ppl[name, 'sparse']:.2f}", f"{ppl[name, 'dense']:.2f}"] for name in names]
    return table(["perplexity of what follows", "prompt sparse", "prompt dense"], rows)


def calibration() -> str:
    rows = []
    for row in read("quality/calibration.csv"):
        times = [f"{float(row[key]):.0f}" if row[key] else "" for key in ("seconds", "cpu_seconds")]
        name = NAMES[row["name"]].replace("**", "")
        rows.append([name, f"{int(row['tokens']):,}", *times, row["threads"], row["commit"]])
    header = ["", "tokens", "seconds", "CPU seconds", "threads", "commit"]
    parts = [link("quality/calibration.csv"), table(header, rows)]
    first, again = (row for row in read(LARGE) if row["allocation"] == "uniform")
    parts.append(
        f"Of Mistral-7B's shape, {int(first['tokens']):,} tokens, on one {first['device']}: "
        f"{float(first['seconds']):.0f} s the first time in a process, {float(again['seconds']):.0f} s after that, "
        f"with {float(again['beside_weights_gb']):.1f} GB beside the weights' {float(again['weights_gb']):.1f} GB "
        f"({source(LARGE, first)})."
    )
    return "\n\n".join(parts)


def telemetry() -> str:
    on = next(row for row in read("quality/telemetry.csv") if row["counting"] == "on")
    overhead = float(on["overhead"])
    verdict = "No measurable cost" if overhead < 0.01 else "A cost"  # runs of one card differ by 1 %: NOTES.md
    return (
        f"{verdict}: {overhead:+.2%} of the op's time in a captured graph on an {on['device']} "
        f"({source('quality/telemetry.csv', on)})."
    )


PAGE = Page(
    "docs/quality-evidence.md",
    {
        "peers": peers,
        "columns": columns,
        "compensation": compensation,
        "rules": rules,
        "budgets": budgets,
        "calibration": calibration,
        "sweep": sweep,
        "choice": choice,
        "last": last,
        "text_used": text_used,
        "search": last_layer_alone,
        "reached": reached,
        "generation": generation,
        "prefill": prefill,
        "telemetry": telemetry,
    },
)

if __name__ == "__main__":
    PAGE.write()
