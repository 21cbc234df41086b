"""Hidden states along texts, computed once and kept in a file that is read where needed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import replacing
from ..models.output_head import output_layer
from .distilled_text import DistilledText
from .errors import FitError


class Chained:
    """Several arrays of states one behind the other, each read where it is asked for and not copied together.

    Args:
        parts: each of shape (positions, h), float16.
    """

    def __init__(self, parts: Sequence[np.ndarray | Chained]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        """How many positions all have."""
        return int(self._ends[-1])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The states at some positions, shapes (n,) to (n, h)."""
        of = np.searchsorted(self._ends, positions, side="right")
        chosen = [np.flatnonzero(of == number) for number in range(len(self._parts))]
        before = np.concatenate([[0], self._ends])
        found = [part[positions[rows] - start] for part, rows, start in zip(self._parts, chosen, before, strict=False)]
        return np.concatenate(found)[np.argsort(np.concatenate(chosen))]


def places_between(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and place of every position, in the order of the rows.

    Args:
        first: of each text its first position, shape (texts,), int64.
        last: of each text the position behind its last one, likewise; at or below ``first`` it has none.

    Returns:
        Two arrays of shape (positions,), int64.
    """
    counts = np.maximum(last - first, 0)
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within


def states_along(
    path: Path,
    model: PreTrainedModel,
    text: DistilledText,
    first: np.ndarray,
    last: np.ndarray,
    batch: int = 16,
    bfloat16: bool = False,
) -> np.ndarray:
    """The states that a model has at some positions, computed or, where the file exists, opened.

    Args:
        path: of the file.
        model: that reads the texts.
        text: the texts.
        first: of each text its first position, shape (texts,), int64.
        last: of each text the position behind its last one, likewise; at or below ``first`` it has none.
        batch: texts that are read at a time.
        bfloat16: multiply matrices in bfloat16, whatever the type of the weights.

    Returns:
        After the final norm, in the order of `places_between`, shape (positions, h), float16.

    Raises:
        FitError: the disk is too small, a state is not finite in float16, or the file is damaged.
    """
    counts = np.maximum(last - first, 0)
    shape = int(counts.sum()), output_layer(model).weight.shape[1]
    if not path.is_file():
        _write(path, model, text, first, counts, shape, batch, bfloat16)
    try:
        states = np.load(path, mmap_mode="r", allow_pickle=False)
        if states.shape != shape:
            raise ValueError(f"it has shape {states.shape} instead of {shape}")
    except (OSError, ValueError) as error:
        raise FitError(f"{path} is damaged ({error}): remove it, and it is computed anew") from error
    return states


@torch.inference_mode()
def _write(
    path: Path,
    model: PreTrainedModel,
    text: DistilledText,
    first: np.ndarray,
    counts: np.ndarray,
    shape: tuple[int, int],
    batch: int,
    bfloat16: bool,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise FitError(
            f"the hidden states need {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free: make "
            "room, give --work, or generate fewer --texts"
        )
    rows = np.flatnonzero(counts)
    with replacing(path) as temporary:
        states = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        done = 0
        for start in tqdm(range(0, len(rows), batch), unit="batch", mininterval=5.0, desc="hidden states"):
            members = rows[start : start + batch]
            width = int((first + counts)[members].max())
            ids = torch.from_numpy(text.tokens[members, :width].astype(np.int64)).to(model.device)
            # What pads a row stands behind it, where a causal model does not look. Scores are not wanted.
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
                output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            found = output.hidden_states[-1].to(torch.float16).cpu().numpy()
            for member, of_row in zip(members, found, strict=True):
                part = of_row[first[member] : first[member] + counts[member]]
                if not np.isfinite(part).all():
                    raise FitError(_overflow(model))
                states[done : done + len(part)] = part
                done += len(part)
        states.flush()
        del states


def _overflow(model: PreTrainedModel) -> str:
    kind = str(model.dtype).removeprefix("torch.")
    way_out = "choose another model"
    return (
        f"{model.name_or_path or type(model).__name__} in {kind} has hidden states that are NaN or above "
        f"{np.finfo(np.float16).max:,.0f}, the largest number of the float16 in which they are kept: "
        + (way_out if model.dtype == torch.float32 else f"give --dtype float32, or {way_out}")
    )
