"""Tables of the comparison at equal bytes, of two models, for both pages about quality.

Of the package's own thresholds from package_*.csv, of other rules and methods from compare_*.csv, and of columns that
are skipped inside the MLPs from columns_*.csv.

Rows of tasks are those of the reported half; the other half was looked at when rules were chosen.
"""

from __future__ import annotations

from bench.lib.machine import ROOT
from bench.tables.pages import link, read, table

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
MEANS = ("mlp_share", "model_share", "c4_kl", "c4_ppl")  # over draws
TASKS = {"mean": "eight tasks", "lambada": "LAMBADA", "arithmetic": "arithmetic", "next_line": "next line"}
NAMES = {
    "default, alike": "default",
    "means, map r32": "means and a map of rank 32",
    "two_threshold": "default",
    "three_threshold": '`rule="three_threshold"`',
    "columns": "gate by columns",
}
PEERS = ("plain 0.667", "default, alike 0.667", "WINA 0.667", "TEAL 0.667")
COMPENSATION = tuple(
    f"{name} {budget}"
    for budget in (0.667, 0.55)
    for name in ("default, alike", "means", "means, map r32", "means, full weights in the last layer")
)
COLUMNS = tuple(
    f"{name} {budget}"
    for budget in (0.667, 0.55)
    for name in (
        *("default", "columns", "columns, less of down", "columns, more of the gate", "columns, less of the gate"),
        *("columns, weighted", "gate and up by columns"),
    )
)
PACKAGE = tuple(f"{rule} {budget}" for budget in (0.667, 0.55) for rule in ("two_threshold", "three_threshold"))

Row = dict[str, str]


def text_rows(kind: str, model: str) -> dict[str, Row]:
    """By variant; of several draws of the text for calibration the mean."""
    draws: dict[str, list[Row]] = {}
    for row in read(f"quality/{kind}_{model}_text.csv"):
        draws.setdefault(row["variant"], []).append(row)
    return {variant: rows[0] | {key: mean(rows, key) for key in MEANS} for variant, rows in draws.items()}


def mean(rows: list[Row], key: str) -> str:
    return str(sum(float(row[key]) for row in rows) / len(rows)) if key in rows[0] else ""


def task_rows(kind: str, model: str) -> dict[tuple[str, str], Row]:
    rows = [row for row in read(f"quality/{kind}_{model}_tasks.csv") if row["half"] == "reported"]
    return {(row["variant"], row["task"]): row for row in rows if row.get("draw", "mean") == "mean"}


def measured(kind: str, model: str, part: str) -> bool:
    return (ROOT / f"bench/results/quality/{kind}_{model}_{part}.csv").exists()


def made(kind: str = "compare") -> str:
    parts = [(model, part) for model in MODELS for part in ("text", "tasks") if measured(kind, model, part)]
    names = [f"quality/{kind}_{model}_{part}.csv" for model, part in parts]
    if not names:
        raise FileNotFoundError(f"quality/{kind}_*.csv")
    rows = [read(name)[0] for name in names]
    device, torch, commit, date = (
        ", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("device", "torch", "commit", "date")
    )
    where = f"{device}, torch {torch}, commit {commit}, {date}"
    return f"{', '.join(map(link, names))}, {where}."


def words(variant: str) -> str:
    name, budget = variant.rsplit(" ", 1)
    return f"{NAMES.get(name, name.replace('columns,', 'gate by columns,'))}, {float(budget):.0%}"


def accuracy(row: Row | None) -> str:
    """Points from the dense model; of the dense model, which differs from nothing, the accuracy."""
    if row is None or float(row["dense"]) == 0:
        return ""
    if row["variant"] == "dense":
        return f"{100 * float(row['dense']):.1f}"
    return f"{100 * float(row['difference']):+.1f} ± {100 * float(row['difference_se']):.1f}"


def perplexity(row: Row, dense: Row) -> str:
    value, ratio = float(row["c4_ppl"]), float(row["c4_ppl"]) / float(dense["c4_ppl"])
    return f"{value:.2f}" if row["variant"] == "dense" else f"{value:.2f} ({ratio:.3f}x)"


def rows_of(variants: tuple[str, ...], share: str, kind: str = "compare") -> str:
    """One table: for each model the dense one and ``variants``, as far as they were measured."""
    titles = TASKS if any(measured(kind, model, "tasks") for model in MODELS) else {}
    rows = []
    for model, name in MODELS.items():
        if not measured(kind, model, "text"):
            continue
        text, tasks = text_rows(kind, model), task_rows(kind, model) if measured(kind, model, "tasks") else {}
        for variant in ("dense", *(v for v in variants if v in text)):
            row = text[variant]
            cells = [f"{float(row[f'{share}_share']):.1%}", f"{float(row['c4_kl']):.3f}"]
            cells.append(perplexity(row, text["dense"]))
            cells += [accuracy(tasks.get((variant, task))) for task in titles]
            rows.append([f"{name}, dense" if variant == "dense" else words(variant), *cells])
    read_of = {"mlp": "MLP weights read", "model": "all weights read"}[share]
    return table(["", read_of, "C4 KL, nats", "C4 perplexity", *titles.values()], rows)


def costs() -> str:
    return f"{made('package')}\n\n{rows_of(PACKAGE, 'mlp', 'package')}"


def peers() -> str:
    return f"{made()}\n\n{rows_of(PEERS, 'model')}"


def compensation() -> str:
    return rows_of(COMPENSATION, "mlp")


def columns() -> str:
    return f"{made('columns')}\n\n{rows_of(COLUMNS, 'mlp', 'columns')}"
