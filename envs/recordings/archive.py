"""Archive files of recordings, and the folder of finished parts from which an interrupted recording goes on.

An archive is a ``.npz`` of plain arrays and a string of JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import Sampling, SpecgymError, Split, replacing, write_json

if TYPE_CHECKING:
    from ..workloads import Workload

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_WAY_OUT = "record it again: python -m specgym.envs.record --help"

EARLIER_LIMIT = 128
"""Tokens that prompts were cut to while recordings did not say so."""

Arrays = Mapping[str, NDArray[Any]]
Info = TypeVar("Info")
Content = TypeVar("Content")


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


def write_archive(path: str | Path, form: str, info: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an archive; a reader never sees half of one.

    Args:
        path: the file, ending in ``.npz``.
        form: name and version of the arrays' layout.
        info: facts of the recording, as JSON has them.
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
        noun: name of the content in messages.
        error: class to raise.
        read_info: builds the facts from their JSON; a KeyError, TypeError or ValueError says that it cannot.
        read_content: builds the whole from both, likewise, or with an IndexError.

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
    """Return whether a file is an archive of this layout; False also where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return json.loads(str(archive["metadata"])).get("format") == form
    except (*_UNREADABLE, KeyError, AttributeError):
        return False


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
    mark, written = parts / "recording.json", json.loads(json.dumps(expected))
    if not parts.exists():
        write_json(mark, written)
        return
    try:
        there = json.loads(mark.read_text(encoding="utf-8"))
        differing = sorted(name for name in {*there, *written} if there.get(name) != written.get(name))
    except (OSError, ValueError, TypeError, AttributeError):
        differing = [f"a damaged {mark.name}"]
    if differing:
        raise TraceError(
            f"{parts} holds parts of another recording (with other {', '.join(differing)}); remove it, or choose "
            "another file"
        )


def write_part(part: Path, arrays: Mapping[str, Any]) -> None:
    """Write the arrays of one part, whole or not at all."""
    with replacing(part) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


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
