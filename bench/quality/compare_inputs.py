"""Texts and tasks of one model's tokenizer as token ids: what quality.compare runs on where no tokenizer is installed.

    python bench quality.compare_inputs --model DIR_OR_GGUF --data ../shared/data --output inputs.json.gz

Beside the tasks of quality.task_requests, two that break first: short arithmetic, and the next line of functions of
Python's standard library. Both are exact: the greedy continuation must be the number and a blank line, or the line.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lib.command import command
from bench.quality.task_requests import task_requests
from bench.quality.texts import c4_documents, load_texts, read_jsonl, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOTS = 6
_PEOPLE, _THINGS = ("Anna", "Ben", "Carla", "David"), ("apples", "books", "coins", "pens")
DRAWS = 5  # of the text for calibration
# Modules whose functions are plain Python, read as text.
_MODULES = """argparse ast bisect calendar cmd codecs collections/__init__ configparser contextlib copy csv datetime
difflib dis doctest email/message enum fileinput fractions ftplib functools gettext glob gzip heapq html/parser
http/client http/server imaplib inspect ipaddress json/decoder json/encoder logging/__init__ mailbox mimetypes nntplib
ntpath optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint pstats pydoc queue
random reprlib sched selectors shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess symtable
tarfile telnetlib tempfile textwrap threading timeit tokenize trace traceback turtle typing unittest/case unittest/mock
urllib/parse urllib/request uuid warnings wave weakref webbrowser xml/dom/minidom xmlrpc/client zipfile""".split()


def texts(tokenizer: PreTrainedTokenizerBase, data: Path, window: int, scale: float) -> dict[str, list[list[int]]]:
    """Windows for calibration, for judging a search, for development, and those that are reported.

    The draws of the text for calibration after the first have windows that nothing else uses.
    """
    loaded, documents = load_texts(data), c4_documents(data)
    middle = "\n\n".join(documents[len(documents) // 2 :])
    wiki = "\n\n".join(row["text"] for row in read_jsonl(data / "text/wiki_paragraphs.jsonl.gz"))

    def windows(text: str, count: float, skip: int = 0) -> list[list[int]]:
        count, skip = (max(1, round(scale * count)), round(scale * skip))
        ids = token_ids(tokenizer, text, (skip + count) * window).view(-1, window)
        return ids[skip:].tolist()

    def draw(skip: int) -> list[list[int]]:
        return windows(loaded["wikitext_valid"], 16, skip) + windows(loaded["c4_end"], 16, skip)

    return {
        "calibration": draw(0),
        **{f"calibration_{k}": draw(24 + 16 * (k - 1)) for k in range(1, DRAWS)},
        "held": windows(loaded["wikitext_valid"], 4, 16) + windows(loaded["c4_end"], 8, 16),
        "dev": windows(middle, 16) + windows(wiki, 8),
        "c4": windows(loaded["c4"], 48),
        "wikitext": windows(loaded["wikitext"], 8),
    }


def arithmetic(count: int) -> Iterator[tuple[str, str]]:
    """Sums, differences, products and one-step problems in words, after solved ones of all kinds."""
    rng = random.Random(0)

    def problem(kind: int) -> tuple[str, int]:
        a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9)
        who, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
        return (
            (f"What is {a} plus {b}?", a + b),
            (f"What is {a + b} minus {b}?", a),
            (f"What is {c} times {a % 10 + 2}?", c * (a % 10 + 2)),
            (f"{who} has {a} {thing} and buys {b} more. How many {thing} does {who} have?", a + b),
            (f"{who} has {a + c} {thing} and gives away {c}. How many {thing} are left?", a),
            (f"{who} packs {c} boxes with {a % 10 + 2} {thing} each. How many {thing} is that?", c * (a % 10 + 2)),
        )[kind]

    for i in range(count):
        shots = (problem(k) for k in range(_SHOTS))
        question, answer = problem(i // 2 % _SHOTS)  # every kind in both halves
        solved = "".join(f"Question: {q}\nAnswer: {n}\n\n" for q, n in shots)
        yield f"{solved}Question: {question}\nAnswer:", f" {answer}\n\n"


def next_lines(count: int) -> Iterator[tuple[str, str]]:
    """Functions with a docstring up to a line of their body, and that line."""
    rng, library = random.Random(0), Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in _MODULES:
        path = library / f"{name}.py"
        source = path.read_text() if path.exists() else ""
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            first, last = node.body[0].end_lineno, node.end_lineno
            wanted = [i for i in range(first + 1, last) if 12 <= len(lines[i].strip()) <= 60 and "#" not in lines[i]]
            if last - first >= 4 and last - node.lineno <= 40 and wanted:
                i = rng.choice(wanted)
                # a line break is one token with the indentation behind it: it belongs to the answer
                context = "".join(lines[node.lineno - 1 : i]).removesuffix("\n")
                found.append((context, "\n" + lines[i].rstrip()))
    return iter(rng.sample(found, min(count, len(found))))


def exact(tokenizer: PreTrainedTokenizerBase, pairs: Iterator[tuple[str, str]]) -> list[dict]:
    """Requests as in quality.task_requests; a token across the boundary is of the context if it adds only space."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    items = []
    for context, answer in pairs:
        before, whole = ids(context), ids(context + answer)
        if whole[: len(before)] != before:
            same = [a == b for a, b in zip(before, whole, strict=False)].index(False)
            before = whole[: same + 1]
            text = tokenizer.decode(before)
            if not text.startswith(context) or text.removeprefix(context).strip():
                continue
        items.append({"answer": None, "requests": [(before, whole[len(before) :])]})
    return items


def main() -> None:
    parser = command(__spec__, __doc__, output="file", required=True, rows=False)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of windows and of items")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    gguf = args.model.suffix == ".gguf"
    source, options = (args.model.parent, {"gguf_file": args.model.name}) if gguf else (args.model, {})
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    limit = None if args.scale >= 1 else max(4, int(200 * args.scale))
    tasks = task_requests(tokenizer, args.data, limit)
    for name, pairs in (("arithmetic", arithmetic(limit or 1200)), ("next_line", next_lines(limit or 1200))):
        tasks[name] = exact(tokenizer, pairs)
        print(name, len(tasks[name]))
    document = {"texts": texts(tokenizer, args.data, args.window, args.scale), "tasks": tasks}
    args.output.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
