"""Writes the tables of docs/quality.md from bench/results/quality; tests/test_readme.py checks that they are current.

python bench/quality_tables.py
"""

from __future__ import annotations

from pathlib import Path

from readme_tables import BEGIN, END, read, source, table

PAGE = Path(__file__).parent.parent / "docs" / "quality.md"


def rules() -> str:
    text, tasks = read("quality/text.csv"), read("quality/tasks.csv")
    names = [name for name in dict.fromkeys(row["name"] for row in tasks) if name != "dense"]
    dense = {row["task"]: float(row["sparse"]) for row in tasks if row["name"] == "dense"}
    first = {row["text"]: float(row["dense_ppl"]) for row in text}
    rows = [["dense", "100.0%", f"{first['wikitext']:.2f}", f"{first['c4']:.2f}", "0", *_accuracies(dense)]]
    for name in names:
        mine = {row["text"]: row for row in text if row["name"] == name}
        found = {row["task"]: row for row in tasks if row["name"] == name}
        wikitext, c4 = mine["wikitext"], mine["c4"]
        ratio = float(wikitext["ppl"]) / float(wikitext["dense_ppl"])
        mean = found["mean"]
        cells = [
            f"{float(wikitext['bytes']):.1%}",
            f"{float(wikitext['ppl']):.2f} ({ratio:.3f}x)",
            f"{float(c4['ppl']):.2f}",
            f"{float(wikitext['kl']):.3f}",
            f"{100 * float(mean['sparse']):.1f} ({100 * float(mean['difference']):+.1f} ± "
            f"{100 * float(mean['difference_se']):.1f})",
            f"{100 * float(found['lambada']['sparse']):.1f}",
        ]
        rows.append([name, *cells])
    header = [
        "",
        "MLP weights read",
        "WikiText-2 perplexity",
        "C4 perplexity",
        "KL, nats",
        "eight tasks, %",
        "LAMBADA, %",
    ]
    return f"{source('quality/text.csv', text[0])}; `tasks.csv` beside it.\n\n{table(header, rows)}"


def _accuracies(dense: dict[str, float]) -> list[str]:
    return [f"{100 * dense['mean']:.1f}", f"{100 * dense['lambada']:.1f}"]


def budgets() -> str:
    data = read("quality/text_cpu.csv")
    rows = []
    for row in data:
        ratio = float(row["ppl"]) / float(row["dense_ppl"])
        rows.append([row["name"], f"{float(row['bytes']):.1%}", f"{float(row['ppl']):.2f} ({ratio:.3f}x)"])
        rows[-1].append(f"{float(row['kl']):.3f}")
    header = ["", "MLP weights read", "WikiText-2 perplexity", "KL, nats"]
    return f"{source('quality/text_cpu.csv', data[0])}, on two CPU cores.\n\n{table(header, rows)}"


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
    ("two", "wikitext"): "no gate weights, 40 / 60 %",
    ("two", "mixed"): "no gate weights, 40 / 60 %",
    ("two rms1", "wikitext"): "power 1, 40 / 60 %",
    ("two rms1", "mixed"): "power 1, 40 / 60 %",
    ("rms.125", "wikitext"): "power 1/8, 40 / 60 %",
    ("rms.125", "mixed"): "power 1/8, 40 / 60 %",
    ("rms.1 37.5/62.5", "wikitext"): "power 0.1, 37.5 / 62.5 %",
    ("rms.1 37.5/62.5", "mixed"): "power 0.1, 37.5 / 62.5 %",
    ("rms.125 37.5/62.5", "mixed"): "power 1/8, 37.5 / 62.5 %: the default",
    ("rms.15 37.5/62.5", "wikitext"): "power 0.15, 37.5 / 62.5 %",
    ("rms.15 37.5/62.5", "mixed"): "power 0.15, 37.5 / 62.5 %",
    ("rms.125 35/65", "mixed"): "power 1/8, 35 / 65 %",
    ("u.125 37.5/62.5", "mixed"): "by rms(u) alone, power 1/8, 37.5 / 62.5 %",
    ("norm.25 37.5/62.5", "mixed"): "by norm(Wd) alone, power 1/4, 37.5 / 62.5 %",
    ("fisher.125", "mixed"): "by gradients, power 1/8, 40 / 60 %",
    ("search within .05", "mixed"): "no gate weights, searched within 0.05 of 40 / 60 %",
    ("search within .1", "mixed"): "no gate weights, searched within 0.1 of 40 / 60 %",
    ("fisher.125 search within .1", "mixed"): "by gradients, power 1/8, searched within 0.1",
}


def choice() -> str:
    data = {(row["name"], row["text"]): row for row in read("quality/sweep_choice.csv")}
    dense = data["dense", ""]
    rows = [["dense", "", "", f"{float(dense['c4_ppl']):.2f}"]]
    rows[0] += [f"{float(dense[name]):.1f}" for name in ("lambada", "words")]
    for (name, text), words in CHOICE.items():
        row = data[name, text]
        ratio = float(row["wikitext_ppl"]) / float(dense["wikitext_ppl"])
        cells = ["WikiText-2" if text == "wikitext" else "mixed", f"{ratio:.3f}x", f"{float(row['c4_ppl']):.2f}"]
        for task in ("lambada", "words"):
            cells.append(f"{float(row[task]):.1f} ({float(row[f'{task}_difference']):+.1f} ± ")
            cells[-1] += f"{float(row[f'{task}_se']):.1f})"
        rows.append([words, *cells])
    header = ["two thresholds, gate weighted", "calibrated on", "WikiText-2 perplexity", "C4 perplexity"]
    return table([*header, "LAMBADA, %", "repeated words, %"], rows)


def mixed() -> str:
    text, tasks = read("quality/text_mixed.csv"), read("quality/tasks_mixed.csv")
    accuracy = {(row["name"], row["task"]): row for row in tasks}
    ppl = {(row["name"], row["text"]): row for row in text}
    rows = []
    for name in (name for name in dict.fromkeys(row["name"] for row in tasks) if name != "dense"):
        cells = []
        for kind in ("wikitext", "c4"):
            row = ppl.get((name, kind))
            cells.append(f"{float(row['ppl']):.2f} ({float(row['ppl']) / float(row['dense_ppl']):.3f}x)" if row else "")
        mean = accuracy[name, "mean"]
        cells.append(f"{100 * float(mean['sparse']):.1f} ({100 * float(mean['difference']):+.1f} ± ")
        cells[-1] += f"{100 * float(mean['difference_se']):.1f})"
        rows.append([name, *cells, f"{100 * float(accuracy[name, 'lambada']['sparse']):.1f}"])
    header = ["", "WikiText-2 perplexity", "C4 perplexity", "eight tasks, %", "LAMBADA, %"]
    return f"{source('quality/tasks_mixed.csv', tasks[0])}; `text_mixed.csv` beside it.\n\n{table(header, rows)}"


def generation() -> str:
    rows = [
        [
            row["name"],
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
    rows = [[name, f"{ppl[name, 'sparse']:.2f}", f"{ppl[name, 'dense']:.2f}"] for name in names]
    return table(["perplexity of what follows", "prompt sparse", "prompt dense"], rows)


def telemetry() -> str:
    on = next(row for row in read("quality/telemetry.csv") if row["counting"] == "on")
    return (
        f"Counting costs {float(on['overhead']):+.2%} of the op's time in a captured graph on an {on['device']} "
        f"({source('quality/telemetry.csv', on)})."
    )


def render(page: str) -> str:
    """``page`` with every table between its markers as the result files have it."""
    for name, draw in (
        ("rules", rules),
        ("budgets", budgets),
        ("sweep", sweep),
        ("choice", choice),
        ("mixed", mixed),
        ("generation", generation),
        ("prefill", prefill),
        ("telemetry", telemetry),
    ):
        begin, end = (mark.replace("results:", f"{name}:") for mark in (BEGIN, END))
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{draw().replace('(bench/', '(../bench/')}\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
