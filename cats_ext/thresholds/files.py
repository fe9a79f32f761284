"""The two files of a config, read and written; each file on disk is complete, and the two belong to each other.

``cats_config.json`` holds the readable facts. ``cats_thresholds.cats`` holds the tensors, in the format of safetensors;
its ending is another one because many tools take every ``*.safetensors`` for weights. A SHA-256 in the JSON file covers
the facts and the tensors. Format version 2 had it over the tensors only, and their file under another name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cats_ext.thresholds.replacement import write_together

CONFIG_FILE = "cats_config.json"
THRESHOLDS_FILE = "cats_thresholds.cats"
FORMAT_VERSION = 3
_THRESHOLDS_FILES = {2: "cats_thresholds.safetensors", FORMAT_VERSION: THRESHOLDS_FILE}  # by format version
OLD_FILES = tuple(name for name in _THRESHOLDS_FILES.values() if name != THRESHOLDS_FILE)
_MOST_JSON, _MOST_TENSORS = 1 << 26, 1 << 30  # bytes; the thresholds of the largest models take 0.15 of these


def pack_files(document: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The contents of both files by name.

    Raises:
        TypeError, ValueError: the document cannot be written as JSON.
    """
    blob = save_tensors(tensors)
    try:
        document = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"config cannot be written as JSON: {error}") from error
    text = json.dumps(document | {"sha256": _digest(document, blob)}, indent=2) + "\n"
    return {THRESHOLDS_FILE: blob, CONFIG_FILE: text.encode()}


def save_config_files(directory: Path, contents: dict[str, bytes]) -> None:
    """Write what :func:`pack_files` gave into ``directory``, made if missing: both or, after an error, neither.

    Raises:
        OSError: a file cannot be written; earlier files are as they were.
    """
    write_together({directory / name: content for name, content in contents.items()}, obsolete=OLD_FILES)


def load_config_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON document and the tensors that :func:`save_config_files` wrote.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: a file is damaged or too large, of another format version, or the two do not belong together.
    """
    path = directory / CONFIG_FILE
    document = _read_config(path)
    tensors_path = directory / _THRESHOLDS_FILES[document["format_version"]]
    if not tensors_path.is_file():
        raise FileNotFoundError(f"{tensors_path} is missing; {path} refers to it")
    blob = _read(tensors_path, _MOST_TENSORS)
    if document["format_version"] == FORMAT_VERSION:
        what, expected, actual = f"{path} and {tensors_path.name} are", document.get("sha256"), _digest(document, blob)
    else:
        what, expected = f"{tensors_path} is", document.get("thresholds_sha256")
        actual = hashlib.sha256(blob).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{what} not as saved (truncated, altered or edited by hand): sha256 {actual}, expected {expected!r:.80}; "
            "to change a config use set_sparsity, CatsConfig.at_sparsity or dataclasses.replace, and save it again"
        )
    try:
        return document, load_tensors(blob)
    except Exception as error:  # of half a dozen types for unknown dtypes, shapes and offsets
        raise ValueError(f"{tensors_path} is not a safetensors file: {type(error).__name__}: {error}") from error


def thresholds_file(config_path: Path) -> str:
    """The name of the other file, beside ``config_path``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_config_files`.
    """
    return _THRESHOLDS_FILES[_read_config(config_path)["format_version"]]


def read_json(path: Path) -> Any:
    """What ``path`` holds; ValueError if it is not JSON, or nested or long beyond reason."""
    try:
        return json.loads(_read(path, _MOST_JSON).decode(), parse_int=_parse_int)
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError, _LongNumberError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


class _LongNumberError(ValueError):
    """A number in JSON of more digits than any count has."""


def _parse_int(digits: str) -> int:
    if len(digits) > 100:
        raise _LongNumberError(f"a number has {len(digits)} digits")
    return int(digits)


def _read(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path} must have at most {most} bytes, got {size}")
    return path.read_bytes()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory with a CATS config")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} has no CATS config")
    document = read_json(path)
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version not in _THRESHOLDS_FILES:
        versions = " or ".join(map(str, _THRESHOLDS_FILES))
        raise ValueError(f"{path} must have format_version {versions}, got {version!r:.50}")
    return document


def _digest(document: dict[str, Any], blob: bytes) -> str:
    """SHA-256 of the document's values in their order, without that of ``sha256``, and of the tensors' file."""
    text = json.dumps({key: value for key, value in document.items() if key != "sha256"})
    return hashlib.sha256(text.encode() + b"\n" + blob).hexdigest()
