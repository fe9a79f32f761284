"""Files that are replaced together: all or none, at every point where it can end, and from many threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.patched import InterruptAt

from cats_ext.thresholds import replacement
from cats_ext.thresholds.replacement import publish, staged, write_together

OLD = {"a": b"old a", "b": b"old b", "part": b"of the old", "of the user": b"stays"}
NEW = {"a": b"new a", "b": b"new b", "inner/c": b"new c", "of the user": b"stays"}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def fill(directory: Path) -> Path:
    for name, content in OLD.items():
        (directory / name).write_bytes(content)
    return directory


def replace_all(directory: Path) -> None:
    with staged(directory) as new:
        (new / "inner").mkdir()
        for name in ("a", "b", "inner/c"):
            (new / name).write_bytes(NEW[name])
        publish(new, directory, lambda names: ["part"], last=("b",))


def test_new_files_replace_old_ones(tmp_path):
    replace_all(fill(tmp_path))
    assert contents(tmp_path) == NEW
    assert not (tmp_path / "a").stat().st_mode & 0o111


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_at_every_line(tmp_path, error):
    functions = [replace_all, staged.__wrapped__, publish, replacement._keep, replacement._sync]
    ended, line = set(), 0
    while True:
        directory = tmp_path / str(line)
        directory.mkdir()
        fill(directory)
        try:
            with InterruptAt(line, functions, error):
                replace_all(directory)
        except error:
            found = contents(directory)
            assert found in (OLD, NEW), line
            ended.add(found == NEW)
            assert [name for name in os.listdir(directory) if name.startswith(".")] == [], line
        else:
            break
        line += 1
    assert line > 40 and ended == {True, False}


def test_interrupted_while_it_is_undone(tmp_path, monkeypatch):
    """Twice: in the middle of moving files in, and in the middle of moving them back."""
    really, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) in (3, 5):
            raise KeyboardInterrupt
        really(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_all(fill(tmp_path))
    assert len(calls) > 5 and {name for name in contents(tmp_path)} == OLD.keys() and contents(tmp_path) == OLD


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    replace_all(fill(tmp_path))
    assert contents(tmp_path) == NEW


def test_killed_at_any_point_leaves_no_mixture_that_is_used(tmp_path):
    """``last`` has the file without which the others are not used: it is the old one, the new one, or not there."""
    points = [tmp_path / str(point) for point in range(8)]
    for directory in points:
        directory.mkdir()
        fill(directory)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cats_ext.thresholds.replacement import publish, staged\n"
        "def dying(really):\n"
        "    def call(*arguments, **named):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return really(*arguments, **named)\n"
        "    return call\n"
        "os.rename, os.replace, os.link = dying(os.rename), dying(os.replace), dying(os.link)\n"
        "for left, directory in enumerate(map(Path, sys.argv[1:])):\n"
        "    if os.fork() == 0:\n"
        "        with staged(directory) as new:\n"
        "            for name in 'ab': (new / name).write_text('new ' + name)\n"
        "            publish(new, directory, lambda names: ['part'], last=('b',))\n"
        "        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(replacement.__file__).parents[2])}
    command = [sys.executable, "-c", script, *map(str, points)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    codes = [int(code) for code in result.stdout.split()]
    assert codes[0] == -signal.SIGKILL and codes[-1] == 0 and len(codes) == len(points), result.stderr
    for directory in points:
        found = contents(directory)
        if "b" in found:
            version = found["b"][:3]
            assert found["a"][:3] == version and ("part" in found) == (version == b"old")
        # The next save, of another file, finds all of the old ones or all of the new ones, and nothing else.
        write_together({directory / "d": b"newest d"})
        new = {"a": b"new a", "b": b"new b", "of the user": b"stays"}
        assert contents(directory) in [{**version, "d": b"newest d"} for version in (OLD, new)], directory
        assert not [name for name in os.listdir(directory) if name.startswith(".")]


def test_folders_of_living_processes_and_of_users_stay(tmp_path):
    (tmp_path / ".cats-saving-mine").mkdir()
    with staged(tmp_path) as new:
        (new / "a").write_bytes(b"of the first")
        write_together({tmp_path / "b": b"of the second"})
        publish(new, tmp_path)
    assert contents(tmp_path) == {"a": b"of the first", "b": b"of the second"}
    assert os.listdir(tmp_path / ".cats-saving-mine") == []


def test_threads_end_with_the_files_of_one(tmp_path):
    start = threading.Barrier(4)

    def save(worker: int) -> None:
        start.wait()
        for turn in range(20):
            text = f"{worker} {turn}".encode()
            write_together({tmp_path / name: text for name in "abc"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert contents(tmp_path).keys() == {"a", "b", "c"} and len({*contents(tmp_path).values()}) == 1
    assert len(os.listdir(tmp_path)) == 3


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "of the user").write_text("stays")
    with pytest.raises(IsADirectoryError, match="a is a directory, where a file is to be written"):
        write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_together({tmp_path / "file" / "a": b"new"})
    assert sorted(contents(tmp_path)) == ["a/of the user", "file"]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"of the cache")
    (tmp_path / "a").symlink_to(tmp_path / "blob")
    write_together({tmp_path / "a": b"new"})
    assert contents(tmp_path) == {"a": b"new", "blob": b"of the cache"} and not (tmp_path / "a").is_symlink()


def test_after_an_interrupt_at_any_line_other_threads_can_save(tmp_path):
    directory = tmp_path / "saved"
    locking = [replacement._alone, replacement._locking, replacement._lock, replacement._release]
    functions = [*locking, staged.__wrapped__, write_together, publish]
    for line in range(1000):
        interrupt = InterruptAt(line, functions, KeyboardInterrupt)
        try:
            with interrupt:
                write_together({directory / "a": b"1", directory / "b": b"2"})
        except KeyboardInterrupt:
            pass
        other = threading.Thread(target=write_together, args=({directory / "a": b"of another"},), daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive(), f"waits for ever after an interrupt before line {line}"
        if interrupt.left >= 0:
            break
    assert 20 < line < 999
