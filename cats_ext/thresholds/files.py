"""Files that are whole or not there: what was written before stays until the new content is safe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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
