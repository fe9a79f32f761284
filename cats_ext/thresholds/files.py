"""The two files of a config, read and written; each file on disk is complete, and the two belong to each other.

``cats_config.json`` holds the readable facts and the SHA-256 of ``cats_thresholds.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

CONFIG_FILE = "cats_config.json"
THRESHOLDS_FILE = "cats_thresholds.safetensors"
FORMAT_VERSION = 2


def save_config_files(directory: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files into ``directory``, made if missing: both or, after an error, neither.

    Raises:
        OSError: a file cannot be written; earlier files are as they were.
    """
    directory.mkdir(parents=True, exist_ok=True)
    blob = save_tensors(tensors)
    text = json.dumps(document | {"thresholds_sha256": hashlib.sha256(blob).hexdigest()}, indent=2) + "\n"
    write_together({directory / THRESHOLDS_FILE: blob, directory / CONFIG_FILE: text.encode()})


def load_config_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON document and the tensors that :func:`save_config_files` wrote.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: a file is damaged, of another format version, or the two do not belong together.
    """
    path, tensors_path = directory / CONFIG_FILE, directory / THRESHOLDS_FILE
    document = _read_config(path)
    if not tensors_path.is_file():
        raise FileNotFoundError(f"{tensors_path} is missing; {path} refers to it")
    blob = tensors_path.read_bytes()
    expected, actual = document.get("thresholds_sha256"), hashlib.sha256(blob).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{tensors_path} is not the file that {path.name} was saved with (truncated or altered): "
            f"sha256 {actual}, expected {expected}"
        )
    try:
        return document, load_tensors(blob)
    except SafetensorError as error:
        raise ValueError(f"{tensors_path} is not a safetensors file: {error}") from error


def read_json(path: Path) -> Any:
    """What ``path`` holds; ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory with a CATS config")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} has no CATS config")
    document = read_json(path)
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} must have format_version {FORMAT_VERSION}, got {version!r}")
    return document


def write_together(contents: dict[Path, bytes]) -> None:
    """Replace all files or none. Each is complete on disk before the first rename, and an error undoes the renames."""
    new = {path: path.with_name(f".{path.name}.{os.getpid()}.new") for path in contents}
    old = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in contents if path.exists()}
    try:
        for path, content in contents.items():
            with open(new[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, backup in old.items():
            shutil.copy2(path, backup)
        try:
            for path in contents:
                os.replace(new[path], path)
        except BaseException:
            for path in contents:
                if path in old:
                    os.replace(old[path], path)
                else:
                    path.unlink(missing_ok=True)
            raise
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)
