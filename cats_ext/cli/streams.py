"""Standard output and error of the program: closed, on a full disk, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


class StandardOutputError(OSError):
    """Standard output cannot be written, and no command can do its work."""


class _Descriptor(io.FileIO):
    """File descriptor 1 or 2. What cannot be written to standard error is dropped: the work is worth more."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 2:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise StandardOutputError(f"standard output cannot be written: {error.strerror}") from error


def _stream(stream: TextIO | None, descriptor: int) -> TextIO:
    options = {"encoding": "utf-8", "errors": "backslashreplace"}
    if stream is not None:
        options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
    return io.TextIOWrapper(io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False)), **options)


def run(program: Callable[[], object]) -> None:
    """Call ``program``, which may exit. If standard output fails, exit with code 1 and one sentence.

    A reader that leaves early (``cats ... | head``) is no error to speak of: then only the code says it.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else a file opened later would be taken for standard output or error
    os.close(opened)
    if sys.stdout is None:
        sys.exit("error: standard output is closed")
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)
    try:
        try:
            program()
        finally:
            sys.stdout.flush()
    except (StandardOutputError, BrokenPipeError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"error: {error}")
