"""Resumable recording: a folder for finished parts until all are there, and the provenance of a recording."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specgym import __version__
from specgym.decoding import PromptSet, Split, digest, draft_digest, load_prompts, replacing, weights_digest, write_json

from ..workloads import Workload
from .archive import TraceError


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
        prompts: their tokens.
        drafted: whether the pair's draft takes part.
    """
    pair, sampling = named.load(), named.sampling
    draft = pair.draft if drafted else None
    source = load_prompts(named.prompts) if isinstance(named.prompts, str) else named.prompts
    return {
        "workload": named.name,
        "split": split,
        "target": pair.target.name,
        "target_sha256": weights_digest(pair.target.model),
        "draft": "" if draft is None else draft.name,
        "draft_sha256": "" if draft is None else draft_digest(draft),
        "temperature": float(sampling.temperature),
        "top_k": int(sampling.top_k),
        "top_p": float(sampling.top_p),
        "prompts_sha256": source.digest if isinstance(source, PromptSet) else digest(map(str, prompts)),
        "specgym": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
