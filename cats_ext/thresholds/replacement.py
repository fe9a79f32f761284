"""Files of a directory that are replaced together: all of them or none, whoever else saves there.

New files are complete on disk in a folder of their own before the first one is moved. Moving them is undone after an
error or an interrupt, and by the next save if the process was killed. Other files of the directory are not touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from cats_ext._progress import finish_despite_interrupt

_FOLDER = f".cats-saving-{uuid.getnode():x}-"  # of this machine: the locks of others are not seen in all file systems
_NAMES = "names.json"  # of the files that are being moved, beside the folders of the old and the new ones


def write_together(contents: dict[Path, bytes], obsolete: Iterable[str] = ()) -> None:
    """Replace all these files of one directory, made if missing, or after an error none.

    Args:
        contents: by path.
        obsolete: names of files that the new ones take the place of; removed.

    Raises:
        OSError: a file cannot be written; all are as they were.
    """
    (directory,) = {path.parent for path in contents}
    with staged(directory) as new:
        for path, content in contents.items():
            (new / path.name).write_bytes(content)
        publish(new, directory, lambda _: obsolete)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty folder inside ``directory``, made if missing, to write new files into. Removed at the end."""
    place, made = directory / f"{_FOLDER}{uuid.uuid4().hex[:12]}", not directory.exists()
    locks: list[int] = []  # held until the process ends, however it does

    def make() -> None:
        _clear_abandoned(directory)
        for folder in ("old", "new"):
            (place / folder).mkdir(parents=True)
        _lock(place, locks)

    def clean() -> None:
        (place / _NAMES).unlink(missing_ok=True)  # first: all are where they belong
        shutil.rmtree(place, ignore_errors=True)
        _release(locks)
        if made:
            with suppress(OSError):  # not empty: there is something to keep
                directory.rmdir()

    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _alone(directory, make)
            yield place / "new"
        finally:
            clean()
    finally:  # of an interrupt in or right before the first one
        clean()


def publish(
    new: Path,
    directory: Path,
    obsolete: Callable[[Sequence[str]], Iterable[str]] = lambda names: (),
    last: Sequence[str] = (),
) -> list[str]:
    """Move the files in ``new``, a folder of :func:`staged`, into ``directory``: all of them, or after an error none.

    Args:
        obsolete: gives the names of files that the new ones, whose names it gets, take the place of; removed.
        last: names of files without which the others are not used. They go first and come last, so that a process that
            is killed in between leaves none of them.

    Returns:
        The names of the new files.
    """
    old = new.parent / "old"
    names = [str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (last.index(name) if name in last else -1, name))
    for name in names:
        _sync(new / name)
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a directory, where a file is to be written")
        for folder in (old, directory):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)

    def move() -> None:
        (new.parent / _NAMES).write_text(json.dumps(names))
        _sync(new.parent / _NAMES)
        try:
            for name in (*last, *obsolete(names)):
                if (directory / name).is_file():
                    os.rename(directory / name, old / name)
            for name in names:
                _keep(directory / name, old / name)
                os.replace(new / name, directory / name)
        except BaseException:
            finish_despite_interrupt(lambda: _put_back(names, new, old, directory))
            raise
        (new.parent / _NAMES).unlink()

    _alone(directory, move)
    return names


def _keep(path: Path, backup: Path) -> None:
    """Give ``path``, if it is there, a second name."""
    if os.path.lexists(path):
        try:
            os.link(path, backup, follow_symlinks=False)
        except OSError:  # the file system has no links
            os.rename(path, backup)


def _put_back(names: Sequence[str], new: Path, old: Path, directory: Path) -> None:
    """Undo :func:`publish`, however far it has come. Safe to call again."""
    for name in names:
        if not (new / name).exists() and (directory / name).exists():
            os.replace(directory / name, new / name)
    for path in [*old.rglob("*")]:
        if not path.is_dir() or path.is_symlink():
            os.replace(path, directory / path.relative_to(old))


def _clear_abandoned(directory: Path) -> None:
    """Remove the folders of processes that were killed; if they were moving files, the old ones are put back."""
    for place in directory.glob(f"{_FOLDER}*"):
        _locking(partial(_clear, directory, place))


def _clear(directory: Path, place: Path, locks: list[int]) -> None:
    if not _lock(place, locks, fcntl.LOCK_NB):
        return
    if (place / _NAMES).is_file():
        _put_back(json.loads((place / _NAMES).read_text()), place / "new", place / "old", directory)
        (place / _NAMES).unlink()
    shutil.rmtree(place, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alone(directory: Path, action: Callable[[], object]) -> None:
    """Call ``action`` while no other thread or process that does so moves files into ``directory``."""

    def run(locks: list[int]) -> None:
        _lock(directory, locks)  # some network file systems have no locks on directories
        action()

    _locking(run)


def _locking(action: Callable[[list[int]], object]) -> None:
    """Call ``action`` with a list for :func:`_lock`, and release what is in it. No ``with``: an interrupt at its end
    would leave the lock, and the next save would wait for it."""
    locks: list[int] = []
    try:
        try:
            action(locks)
        finally:
            _release(locks)
    finally:  # of an interrupt in or right before the first one
        _release(locks)


def _lock(path: Path, locks: list[int], more: int = 0) -> bool:
    """Lock ``path`` until the handle that is added to ``locks`` is closed; False if it cannot be locked, or is gone."""
    try:
        locks.append(os.open(path, os.O_RDONLY))
        fcntl.flock(locks[-1], fcntl.LOCK_EX | more)  # of each handle its own, so that threads exclude each other too
    except OSError:
        return False
    return True


def _release(locks: list[int]) -> None:
    while locks:
        os.close(locks.pop())
