"""Whether a result can be written, tried before the work that makes it, with errors that name the path."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def check_writable(name: str, path: str | os.PathLike, *, directory: bool) -> None:
    """Write some bytes where ``path`` is to be made or replaced; afterwards everything is as it was.

    Args:
        name: what the error calls the path.
        directory: whether files are to be written into ``path``; else it is a file itself.

    Raises:
        OSError: they cannot be written, or ``path`` is something else.
    """
    path, made = Path(path), []
    folder = path if directory else path.parent
    try:
        if directory and not path.is_dir() and path.exists():
            raise NotADirectoryError(f"{name} '{path}' exists and is not a directory")
        if not directory and path.is_dir():
            raise IsADirectoryError(f"{name} '{path}' is a directory")
        if not directory and path.exists() and not path.is_file():  # it would be replaced: no device
            raise FileExistsError(f"{name} '{path}' exists and is not a file")
        for parent in reversed([parent for parent in (folder, *folder.parents) if not parent.exists()]):
            parent.mkdir(exist_ok=True)
            made.append(parent)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".cats-", buffering=0) as probe:
            probe.write(bytes(4096))
            os.fsync(probe.fileno())
        if not directory:
            with suppress(FileNotFoundError):
                os.stat(path)  # its name may be too long
    except OSError as error:
        if error.errno is None:
            raise
        raise cannot_be_written(name, path, error) from error
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # another process has written into it
                parent.rmdir()


def cannot_be_written(name: str, path: str | os.PathLike, error: Exception) -> OSError:
    """The error to raise for ``error``, which the writing of ``path`` ended with."""
    return OSError(f"{name} '{path}' cannot be written: {getattr(error, 'strerror', None) or error}")
