"""The folder in which a recording keeps what is finished, until all of it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..decoding.files import replacing, write_json
from .traces import TraceError


def parts_of(path: Path) -> Path:
    """The folder of a recording that will be written to `path`."""
    return path.with_name(path.name + ".parts")


def claim_parts(parts: Path, expected: Mapping[str, Any]) -> None:
    """Make the folder of parts, or see that the one there belongs to this recording.

    Args:
        parts: the folder.
        expected: all that the recording depends on; plain values that JSON takes.

    Raises:
        TraceError: it belongs to another.
    """
    mark, written = parts / "recording.json", json.loads(json.dumps(expected))
    if not parts.exists():
        write_json(mark, written)
        return
    try:
        same = json.loads(mark.read_text(encoding="utf-8")) == written
    except (OSError, ValueError):
        same = False
    if not same:
        raise TraceError(
            f"{parts} holds parts of another recording (other models, prompts, settings or versions); remove it, or "
            "choose another file"
        )


def write_part(part: Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays of one part, whole or not at all."""
    with replacing(part) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
