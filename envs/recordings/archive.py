"""Archive files of recordings, and the folder of finished parts from which an interrupted recording goes on.

An archive is a ``.npz`` of plain arrays and a string of JSON, with a checksum (`specgym.decoding.sealed_files`);
nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    DamagedFileError,
    Sampling,
    SpecgymError,
    Split,
    check_digest,
    number,
    read_arrays,
    read_sealed,
    write_arrays,
    write_sealed,
)

if TYPE_CHECKING:
    from ..workloads import Workload

_PARTS = "specgym-recording-1"
_WAY_OUT = "record it again: python -m specgym.envs.record --help"

EARLIER_LIMIT = 128
"""Tokens that prompts were cut to while recordings did not say so."""
LONGEST_DRAFT = 255
"""Tokens drafted at a position, at most."""

Arrays = Mapping[str, NDArray[Any]]
Info = TypeVar("Info")
Content = TypeVar("Content")


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class TraceError(SpecgymError, ValueError):
    """A recording that cannot be read, or does not hold what is asked of it; the message names it and the way out."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Models, prompts and sampling of a recording."""

    workload: str
    split: str
    target: str
    target_sha256: str
    """Hash of the names and values of all weights, and of what the generation config asks for besides sampling, if
    anything."""
    draft: str
    """Empty, like the next, for a decoder that drafts nothing."""
    draft_sha256: str
    temperature: float
    top_k: int
    top_p: float
    prompts_sha256: str
    """Hash of the prompt set (`PromptSet.digest`)."""
    max_prompt_tokens: int | None = EARLIER_LIMIT
    """Tokens of a prompt, at most, as the workload asks for; None for as many as there is room for."""
    longest_prompt: int | None = None
    """Tokens of the longest prompt before it was cut, if it was; None in a recording of an earlier version."""
    draft_length: int
    """K, the most tokens drafted at a position; 0 for a decoder that drafts no chains."""
    tokens: int
    """Tokens of each of the target's texts, at most."""
    seed: int
    """Seed of all sampling, and of a design."""
    specgym: str
    torch: str
    transformers: str

    @property
    def sampling(self) -> Sampling:
        """Sampling by which tokens were chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Raise ValueError unless every number is one that can have been recorded."""
        _ = self.sampling
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {self.split!r}")
        limit = 1 if self.max_prompt_tokens is None else self.max_prompt_tokens
        if not (0 <= self.draft_length <= LONGEST_DRAFT and self.tokens >= 1 and self.seed >= 0 and limit >= 1):
            numbers = (
                f"prompts cut to {limit}, draft_length {self.draft_length}, tokens {self.tokens} and seed {self.seed}"
            )
            raise ValueError(f"no recording has {numbers}")


def write_archive(path: str | Path, form: str, info: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an archive; a reader never sees half of one.

    Args:
        path: the file, ending in ``.npz``.
        form: name and version of the arrays' layout.
        info: facts of the recording, as JSON has them.
        arrays: by name.
    """
    write_arrays(path, {**arrays, "metadata": np.array(json.dumps({"format": form, **info}))})


def read_archive(
    path: str | Path,
    forms: tuple[str, str],
    noun: str,
    error: type[TraceError],
    read_info: Callable[[dict[str, Any]], Info],
    read_content: Callable[[Info, Arrays], Content],
) -> Content:
    """Read an archive.

    Args:
        path: the file.
        forms: name and version of the layout it must have, and those of the same layout from before it had a checksum.
        noun: name of the content in messages.
        error: class to raise.
        read_info: builds the facts from their JSON; a KeyError, TypeError or ValueError says that it cannot.
        read_content: builds the whole from both, likewise, or with an IndexError.

    Raises:
        TraceError: `error`: the file is missing, truncated, damaged, changed after it was written, of another kind or
            version, or contradicts itself.
    """
    try:
        content, sealed = read_arrays(path)
    except FileNotFoundError:
        raise error(f"there is no {noun} {path}; {_WAY_OUT}") from None
    except DamagedFileError as problem:
        raise error(f"{noun} {path} is damaged, or none ({problem}); {_WAY_OUT}") from problem
    try:
        metadata = json.loads(str(content.pop("metadata")))
        form = metadata.pop("format")
        if form not in forms:
            raise ValueError("another format")
        info = read_info(metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise error(f"{path} is no {noun} of this version ({forms[0]}): {problem}; {_WAY_OUT}") from problem
    try:
        if form == forms[0] and not sealed:
            check_digest(None, "")
        return read_content(info, content)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as problem:
        raise error(f"{noun} {path} is damaged ({problem}); {_WAY_OUT}") from problem


def has_form(path: str | Path, *forms: str) -> bool:
    """Return whether a file is an archive of one of these layouts; False also where it is missing or damaged."""
    try:
        return json.loads(str(read_arrays(path, ["metadata"]).arrays["metadata"])).get("format") in forms
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def numbers(arrays: Arrays, name: str, kinds: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of an archive.

    Args:
        arrays: of the archive.
        name: of the array.
        kinds: letters of `numpy.dtype.kind` that it may have.
        shape: what it must have; -1 for any number.

    Raises:
        KeyError: it is missing.
        ValueError: it has another type or shape.
    """
    array = arrays[name]
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} has the type {array.dtype}")
    if array.ndim != len(shape) or any(size not in (-1, there) for size, there in zip(shape, array.shape, strict=True)):
        expected = ", ".join("n" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name} has shape {array.shape}, expected ({expected})")
    return array


def typed(kind: type[Info], facts: Mapping[str, Any]) -> Info:
    """Build a dataclass of facts from JSON whose types are those of its fields.

    Raises:
        ValueError: a text, a whole number or a finite number is something else.
        TypeError: a field is missing, or there is one too many.
    """
    hints = get_type_hints(kind)
    for entry in fields(kind):  # type: ignore[arg-type]
        value, expected = facts.get(entry.name), hints[entry.name]
        if value is None and expected == int | None:
            continue
        expected = int if expected == int | None else expected
        if entry.name not in facts or expected not in _WORDS:
            continue
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"{entry.name} must be {_WORDS[expected]}, got {value!r}")
        if expected in (int, float):
            number(entry.name, value, error=ValueError)
    return kind(**facts)


def parts_of(path: Path) -> Path:
    """Return the folder of a recording that will be written to `path`."""
    return path.with_name(path.name + ".parts")


def claim_parts(parts: Path, expected: Mapping[str, Any]) -> None:
    """Make the folder of parts, or check that the folder there belongs to this recording.

    Args:
        parts: the folder.
        expected: whatever the recording depends on, as JSON takes it.

    Raises:
        TraceError: it belongs to another; the message names what differs.
    """
    mark, written = parts / "recording.json", json.loads(json.dumps({"format": _PARTS, **expected}))
    if not parts.exists():
        write_sealed(mark, written)
        return
    try:
        there = read_sealed(mark, _PARTS)
        differing = sorted(name for name in {*there, *written} if there.get(name) != written.get(name))
    except (OSError, DamagedFileError):
        differing = [f"a damaged {mark.name}"]
    if differing:
        raise TraceError(
            f"{parts} holds parts of another recording (with other {', '.join(differing)}); remove it, or choose "
            "another file"
        )


def write_part(part: Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays of one part, whole or not at all."""
    write_arrays(part, arrays, compressed=False)


def read_part(part: Path) -> dict[str, NDArray[Any]]:
    """Read what `write_part` wrote.

    Raises:
        TraceError: it is missing, damaged, or changed after it was written.
    """
    try:
        arrays, sealed = read_arrays(part)
        if not sealed:
            check_digest(None, "")
    except (OSError, DamagedFileError) as problem:
        raise TraceError(f"{part} is damaged ({problem}); remove it, and the recording goes on without it") from problem
    return arrays


def provenance_of(named: Workload, split: Split, prompts: Sequence[Sequence[int]], drafted: bool) -> dict[str, Any]:
    """Return the fields of `Provenance` that do not depend on how much is recorded.

    Args:
        named: the workload; it is loaded.
        split: of the prompts.
        prompts: their tokens, as recorded: all of the split or the first.
        drafted: whether the pair's draft takes part.
    """
    import torch
    import transformers  # which replay, the other user of this file, does not load

    from specgym import __version__
    from specgym.decoding import PromptSet, digest, draft_digest, load_prompts, target_digest

    pair, sampling = named.load(), named.sampling
    draft = pair.draft if drafted else None
    source = load_prompts(named.prompts) if isinstance(named.prompts, str) else named.prompts
    return {
        "workload": named.name,
        "split": split,
        "target": pair.target.name,
        "target_sha256": target_digest(pair),
        "draft": "" if draft is None else draft.name,
        "draft_sha256": "" if draft is None else draft_digest(draft),
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
        "prompts_sha256": source.digest if isinstance(source, PromptSet) else digest(map(str, prompts)),
        "max_prompt_tokens": named.prompt_limit,
        "longest_prompt": max(map(len, named.encoded(split)[: len(prompts)])),
        "specgym": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
