"""Reading what a run has written. Writing is `decoding.files`: whole files or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specgym.decoding import SpecgymError


class RunFileError(SpecgymError, ValueError):
    """A file of a run that is missing, damaged, or of another kind; the message names it and the way out."""


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        way_out: what to do where it is missing or damaged, as the end of a sentence.

    Raises:
        RunFileError: it is missing, cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFileError(f"there is no {path}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise RunFileError(f"{path} cannot be read ({error}); {way_out}") from error
    if not isinstance(content, dict):
        raise RunFileError(f"{path} holds a {type(content).__name__} where an object was expected; {way_out}")
    return content
