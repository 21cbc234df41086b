"""Archives: recordings are kept as one ``.npz`` of plain arrays and one string of JSON; nothing is ever unpickled."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import SpecgymError, replacing

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_WAY_OUT = "record it again: python -m specgym.envs.record --help"

Arrays = Mapping[str, NDArray[Any]]
Info = TypeVar("Info")
Content = TypeVar("Content")


class TraceError(SpecgymError, ValueError):
    """A recording that cannot be read, or does not hold what is asked of it; the message names it and the way out."""


def write_archive(path: str | Path, form: str, info: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an archive; a reader never sees half of one.

    Args:
        path: the file, ending in ``.npz``.
        form: name and version of the arrays' layout.
        info: what was recorded, as JSON has it.
        arrays: by name.
    """
    metadata = np.array(json.dumps({"format": form, **info}))
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, metadata=metadata)


def read_archive(
    path: str | Path,
    form: str,
    noun: str,
    error: type[TraceError],
    read_info: Callable[[dict[str, Any]], Info],
    read_content: Callable[[Info, Arrays], Content],
) -> Content:
    """Read an archive.

    Args:
        path: the file.
        form: name and version of the layout it must have.
        noun: what it holds, as messages call it.
        error: what to raise.
        read_info: makes what was recorded of its JSON; a KeyError, TypeError or ValueError says that it cannot.
        read_content: makes the whole of both, likewise, or with an IndexError.

    Raises:
        TraceError: `error`: the file is missing, truncated, damaged, of another kind or version, or contradicts itself.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise error(f"there is no {noun} {path}; {_WAY_OUT}") from None
    except _UNREADABLE as problem:
        raise error(f"{noun} {path} is damaged, or none ({problem}); {_WAY_OUT}") from problem
    try:
        metadata = json.loads(str(content.pop("metadata")))
        if metadata.pop("format") != form:
            raise ValueError("another format")
        info = read_info(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise error(f"{path} is no {noun} of this version ({form}): {problem}; {_WAY_OUT}") from problem
    try:
        return read_content(info, content)
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise error(f"{noun} {path} is damaged ({problem}); {_WAY_OUT}") from problem


def has_form(path: str | Path, form: str) -> bool:
    """Whether a file says that it is an archive of this layout; False for any other, one missing or damaged too."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return json.loads(str(archive["metadata"])).get("format") == form
    except (*_UNREADABLE, KeyError, AttributeError):
        return False
