"""Writing files so that a reader, or a run that is killed, never meets half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path`` in one step.

    Args:
        path: where the finished file shall stand; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; what we ship and share is as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest(parts: Iterable[str]) -> str:
    """SHA-256 over length-prefixed strings, so that ``["ab"]`` and ``["a", "b"]`` differ; 64 hex digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_name(name: str) -> str:
    """A name that every file system takes: letters, digits, ``@``, ``.``, ``-``, and ``_`` for everything else."""
    return "".join(letter if letter.isalnum() or letter in "@.-" else "_" for letter in name)


def cache_folder() -> Path:
    """The folder for what specgym downloads or measures once; it may not exist yet.

    ``$SPECGYM_CACHE`` if set, else ``specgym`` in ``$XDG_CACHE_HOME``, else ``~/.cache/specgym``.
    """
    if folder := os.environ.get("SPECGYM_CACHE"):
        return Path(folder).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "specgym"
