"""Writing files so that a reader, or a run that is killed, never meets half of one."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SUFFIX: Final = ".tmp"
_TEMPORARY: Final = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""Names as `tempfile` draws them (`_RandomNameSequence` of Python 3.11)."""
_PREFIX: Final = 60
"""Characters of a file's name that its temporary file repeats; with four bytes each they leave room for the rest."""
_OLD: Final = 24 * 3600.0
"""Seconds after which a temporary file is taken for left behind where there are no locks."""
_PROBE: Final = 65_536
"""Bytes that a folder has room for if it is writable."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path`` in one step.

    Temporary files of the same name that killed processes left behind are removed.

    Args:
        path: where the finished file shall stand; its folder is created.

    Raises:
        OSError: the file cannot be written, for instance to a full disk; `filename` is ``path``, whatever wrote.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:_PREFIX]}."
        remove_leftovers(path.parent, prefix)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=_SUFFIX)
    except OSError as error:
        raise _named(error, path) from None
    temporary = Path(name)
    try:
        with _held(handle), named_errors(path, temporary):
            yield temporary
            # mkstemp makes private files; what we ship and share is as readable as any other file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Name what is written inside in the error of a disk that is full or cannot be written, whatever library wrote.

    Args:
        path: what shall stand there in the end.
        temporary: the file, or the folder, that is written.
    """
    try:
        yield
    except OSError as error:
        other = error.filename is not None and temporary not in (Path(error.filename), *Path(error.filename).parents)
        if error.errno is None or other:
            raise
        raise _named(error, path) from error
    except Exception as error:
        # torch and safetensors say in their own words that a file could not be written.
        if (reason := _unwritable(path.parent)) is not None:
            raise _named(reason, path) from error
        raise


def remove_leftovers(folder: Path, prefix: str = ".") -> None:
    """Remove temporary files of `replacing` in a folder, and in those within it, whose process was killed.

    Args:
        folder: where to look.
        prefix: beginning of their names, a dot at least; of one file's when given, and then only beside it.
    """
    for leftover in folder.rglob(f".*{_SUFFIX}") if prefix == "." else folder.glob(f"{glob.escape(prefix)}*{_SUFFIX}"):
        if _TEMPORARY.fullmatch(leftover.name):
            with contextlib.suppress(OSError), leftover.open("rb") as file:
                if _abandoned(file.fileno()):
                    leftover.unlink()


def _unwritable(folder: Path) -> OSError | None:
    """The error of writing a few bytes into a folder; None if that works."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file that was to be written."""
    return type(error)(error.errno, error.strerror or str(error), str(path))


@contextlib.contextmanager
def _held(handle: int) -> Iterator[None]:
    """Mark a temporary file as being written, for as long as this process lives, and close it in the end."""
    if fcntl is None:
        os.close(handle)  # Windows replaces no file that is open
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _abandoned(handle: int) -> bool:
    """True if no process holds a temporary file; without locks, if it is old."""
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        else:
            return True
    return time.time() - os.fstat(handle).st_mtime > _OLD


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
