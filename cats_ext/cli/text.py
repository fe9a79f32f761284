"""Text for the commands: files, data sets of the Hugging Face hub, or the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Modules with long prose docstrings that are in every Python from 3.10 on and nearly equal in all of them. No module is
# in both lists.
CALIBRATION_MODULES = (
    *("typing", "difflib", "inspect", "logging", "ipaddress", "statistics", "email.message", "smtplib", "threading"),
    *("configparser", "logging.handlers", "http.cookiejar", "codecs", "os", "optparse", "doctest", "unittest.mock"),
)
HELD_OUT_MODULES = (
    *("json", "subprocess", "shutil", "argparse", "urllib.parse", "urllib.request", "traceback", "socketserver"),
    *("ssl", "uuid", "textwrap", "tarfile", "zipfile", "collections", "fractions", "asyncio.tasks", "tempfile"),
)


# Names for --set: dataset of the Hugging Face hub, configuration, split and how many of its rows are read.
NAMED_TEXTS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
    "c4": ("allenai/c4", "en", "validation", 500),
    "docstrings": None,
}


def named_text(name: str) -> list[str]:
    """The texts of a named set: ``docstrings`` of Python's library, or a data set of the Hugging Face hub.

    Raises:
        ValueError: there is no set of this name.
        ImportError, OSError: as :func:`dataset_texts`.
    """
    if name not in NAMED_TEXTS:
        raise ValueError(f"--set must be one of {', '.join(NAMED_TEXTS)}, got '{name}'")
    if NAMED_TEXTS[name] is None:
        return [docstrings(HELD_OUT_MODULES)]
    *source, rows = NAMED_TEXTS[name]
    texts = _load_texts(f"--set {name}", "eval", *source, rows)
    return ["".join(texts)] if rows is None else texts


def dataset_texts(name: str, rows: int) -> list[str]:
    """The field ``text`` of the first ``rows`` rows of ``NAME[:CONFIGURATION[:SPLIT]]``, read as a stream.

    NAME is on the Hugging Face hub, or a directory of data files. The default of SPLIT is train.

    Raises:
        ImportError: the package ``datasets`` is missing.
        OSError: the set cannot be loaded.
        ValueError: there is no row, or one without a text.
    """
    path, configuration, split = (*name.split(":"), "", "")[:3]
    return _load_texts(f"--dataset {name}", "finetune", path, configuration or None, split or "train", rows)


def _load_texts(
    option: str, extra: str, path: str, configuration: str | None, split: str, rows: int | None
) -> list[str]:
    """The field ``text`` of a data set's first ``rows`` rows, or of all. Errors name the option and pip's ``extra``."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{option} needs the package datasets: pip install 'cats_ext[{extra}]'") from error
    try:
        data = load_dataset(path, configuration, split=split, streaming=rows is not None)
        found = list(data if rows is None else data.take(rows))
    except Exception as error:  # the hub's client raises many kinds
        raise OSError(f"{option}: {path} cannot be loaded ({type(error).__name__}: {error})") from error
    for row in found:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{option} must have texts in a field 'text', got the fields {', '.join(row)}")
    if not found:
        raise ValueError(f"{option} has no rows")
    return [row["text"] for row in found]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of ``paths``: one a file, of a ``.jsonl`` file one a line (field ``text``); ``.gz`` is unpacked.

    Raises:
        FileNotFoundError: a path does not exist or is a directory.
        ValueError: a file is not what its name says, or there is no text in any of them.
    """
    texts: list[str] = []
    for path in paths:
        if path.is_dir() or not path.exists():
            raise FileNotFoundError(f"text file '{path}' {'is a directory' if path.is_dir() else 'does not exist'}")
        try:
            data = path.read_bytes()
            content = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"'{path}' is not a complete gzip file: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"'{path}' is not UTF-8 text: {error}") from error
        name = path.name.removesuffix(".gz")
        texts += _jsonl_texts(path, content) if name.endswith(".jsonl") else [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}")
    return texts


def _jsonl_texts(path: Path, content: str) -> Iterable[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of '{path}' must be a JSON object with a field 'text'") from error
        if not isinstance(text, str):
            raise ValueError(f"line {number} of '{path}': field 'text' must be a string, got {type(text).__name__}")
        yield text


def docstrings(modules: Sequence[str]) -> str:
    """The docstrings of ``modules`` in the order of their source, read without importing anything.

    Raises:
        FileNotFoundError: this Python carries no source of its standard library.
    """
    found: list[str] = []
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        path = library.joinpath(*module.split("."))
        source = next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
        if source is None:
            continue
        tree = ast.parse(source.read_bytes())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        # short docstrings are mostly "Return the x." over and over
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 200]
    if not found:
        raise FileNotFoundError("this Python has no source of its standard library: give a text with --text FILE")
    return "\n\n".join(found)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Token ids ``[N]`` of ``texts``, joined by blank lines, without special tokens.

    Raises:
        ValueError: fewer than two tokens, which leaves nothing to predict.
    """
    encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_tensors="pt")
    ids = encoded.input_ids[0].to(torch.int64)
    if ids.numel() < 2:
        raise ValueError(f"the text has {ids.numel()} token: at least 2 are needed to predict one")
    return ids
