"""Text for the commands: files, data sets of the Hugging Face hub, or the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import codecs
import errno
import gzip
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from cats_ext.data.texts import PART, cut_text

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


def stream_texts(paths: Sequence[Path]) -> Iterator[tuple[int, str]]:
    """The texts of ``paths`` in consecutive parts, each with the number of its text, read as they are asked for.

    A file is one text, a ``.jsonl`` file one a line (field ``text``); ``.gz`` is unpacked.

    Raises:
        OSError: a file is missing, is no file, or cannot be read.
        ValueError: a file is not what its name says, or there is no text in any of them.
    """
    number, blank = 0, True
    for path in paths:
        with _opened(path) as file:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                texts: Iterable[Iterable[str]] = ([text] for text in _jsonl_texts(path, file))
            else:
                texts = [_decoded(path, file)]
            for text in texts:
                for part in text:
                    blank = blank and not part.strip()
                    yield number, part
                number += 1
    if blank:
        raise ValueError(f"--text: there is no text in {', '.join(map(str, paths))}")


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of :func:`stream_texts` that are not blank."""
    texts = ("".join(part for _, part in parts) for _, parts in itertools.groupby(stream_texts(paths), itemgetter(0)))
    return [text for text in texts if text.strip()]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of ``path``; errors while it is open name it."""
    try:
        if not (path.is_file() or path.is_fifo()):
            state = "is not a file" if path.exists() else "does not exist"
            raise FileNotFoundError(errno.ENOENT, state)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"--text '{path}' is not a complete gzip file: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--text '{path}' {error.strerror}") from None
    except OSError as error:
        raise OSError(f"--text '{path}' cannot be read: {error.strerror}") from error


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text in ``file`` in parts, cut before white space where there is some."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, rest = 0, ""
    while True:
        block = file.read(PART)
        read += len(block)
        try:
            rest += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = read - len(error.object) + error.start
            raise ValueError(f"--text '{path}' is not UTF-8 text: {error.reason} at byte {place}") from error
        if not block:
            yield rest
            return
        *parts, rest = cut_text(rest, PART)
        yield from parts


def _jsonl_texts(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"line {number} of --text '{path}'"
        try:
            text = json.loads(line.decode())["text"]
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{where} must be a JSON object with a field 'text'") from error
        if not isinstance(text, str):
            raise ValueError(f"{where}: field 'text' must be a string, got {type(text).__name__}")
        if not is_text(text):
            raise ValueError(f"{where}: field 'text' has half of a surrogate pair, which is no character")
        yield text


def is_text(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: surrogates stand for bytes of an argument that were not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int | None = None) -> Tensor:
    """Token ids ``[N]`` of ``texts``, joined by blank lines, without special tokens; the first ``limit`` of them.

    Raises:
        ValueError: fewer than two tokens, which leaves nothing to predict.
    """
    found, count = [], 0
    for part in cut_text("\n\n".join(texts), PART):
        encoded = tokenizer(part, add_special_tokens=False, verbose=False, return_tensors="np")
        found.append(torch.from_numpy(encoded.input_ids[0]).to(torch.int64))
        count += len(found[-1])
        if limit is not None and count >= limit:
            break
    ids = torch.cat(found)[:limit]
    if ids.numel() < 2:
        raise ValueError(f"--text: the text has {ids.numel()} token: at least 2 are needed to predict one")
    return ids
