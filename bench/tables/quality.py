"""Writes the tables of docs/quality.md from bench/results/quality; tests/docs checks that they are current.

python bench tables.quality
"""

from __future__ import annotations

from bench.tables.pages import Page, link, table
from bench.tables.quality_evidence import measured
from bench.tables.quality_models import costs


def budgets() -> str:
    """The default rule at every budget that was measured, on one model."""
    text, tasks = measured()
    rows = []
    for (name, kind), row in text.items():
        if kind == "wikitext" and name.rsplit(" ", 1)[0] == "two_threshold":
            ratio = float(row["ppl"]) / float(row["dense_ppl"])
            cells = [f"{float(row['bytes']):.0%}", f"{ratio:.3f}x", f"{float(row['kl']):.3f}"]
            for task in ("mean", "lambada"):
                found = tasks.get((name, task))
                error = found and f"{100 * float(found['difference']):+.1f} ± {100 * float(found['difference_se']):.1f}"
                cells.append(error or "")
            rows.append([f"`{float(row['bytes_target']):.3g}`", *cells])
    header = ["`budget=`", "read on this text", "WikiText-2 perplexity", "KL, nats", "eight tasks", "LAMBADA"]
    return f"{link('quality/text.csv')}, {link('quality/tasks.csv')}.\n\n{table(header, rows)}"


PAGE = Page("docs/quality.md", {"costs": costs, "budgets": budgets})

if __name__ == "__main__":
    PAGE.write()
