"""The hidden states of a target along its own text, computed once and kept in a file that is read where needed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import replacing
from ..medusa.heads import output_layer
from .distilled_text import DistilledText
from .errors import FitError
from .labels import labels_of
from .prompt_windows import SPEED


@dataclass(frozen=True)
class HiddenStates:
    """States of the positions from which heads are to predict, and what follows each.

    A position belongs here if every token that heads predict from it was written by the target: it begins at the last
    but one of a prompt, from which the first head predicts the first token written. (The target itself predicts the
    token between.) So no token of a prompt is ever a label.

    Attributes:
        text: that the target read.
        states: after its final norm, shape (positions, h), float16, in a file.
        row: of each position the row of ``text``, shape (positions,), int64.
        place: of each position the place in that row, likewise.
    """

    text: DistilledText
    states: np.ndarray
    row: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        """How many positions."""
        return len(self.row)

    def of_side(self, side: int) -> np.ndarray:
        """Numbers of the positions in texts of one side, shape (m,), int64, ascending."""
        return np.flatnonzero(self.text.side[self.row] == side)

    def hidden(self, positions: np.ndarray) -> torch.Tensor:
        """Their states, shape (m, h), float16."""
        return torch.from_numpy(np.ascontiguousarray(self.states[positions]))

    def labels(self, positions: np.ndarray, heads: int) -> torch.Tensor:
        """The tokens that heads should predict, shape (heads, m), int64; `IGNORED` behind the end of a text."""
        rows, row = np.unique(self.row[positions], return_inverse=True)
        texts, ends = (torch.from_numpy(each[rows].astype(np.int64)) for each in (self.text.tokens, self.text.ends))
        return labels_of(texts, ends, torch.from_numpy(row), torch.from_numpy(self.place[positions]), heads)


def hidden_states(model: PreTrainedModel, text: DistilledText, batch: int = 16) -> HiddenStates:
    """Compute the states of a text's positions, or open the file that an earlier call wrote.

    Args:
        model: the target that wrote the text.
        text: what it wrote.
        batch: rows that it reads at a time.

    Raises:
        FitError: no position has anything to predict, the disk is too small, a state is not finite in float16, or the
            file is damaged.
    """
    row, place = _positions(text)
    if not len(row):
        raise FitError("the target ends every text at once, so there is nothing to learn: give other text")
    size = output_layer(model).weight.shape[1]
    path = text.folder / "hidden.npy"
    if not path.is_file():
        _write(path, model, text, row, size, batch)
    try:
        states = np.load(path, mmap_mode="r", allow_pickle=False)
        if states.shape != (len(row), size):
            raise ValueError(f"it has shape {states.shape} instead of {(len(row), size)}")
    except (OSError, ValueError) as error:
        raise FitError(f"{path} is damaged ({error}): remove it, and it is computed anew") from error
    return HiddenStates(text, states, row, place)


def _positions(text: DistilledText) -> tuple[np.ndarray, np.ndarray]:
    """Row and place of every position, in the order of the rows; the side whose speed is measured needs none."""
    first = np.maximum(text.prompts - 2, 0)
    counts = np.where(text.side == SPEED, 0, np.maximum(text.ends - 2 - first, 0))
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within


@torch.inference_mode()
def _write(path: Path, model: PreTrainedModel, text: DistilledText, row: np.ndarray, size: int, batch: int) -> None:
    needed, free = 2 * size * len(row), shutil.disk_usage(path.parent).free
    if needed > free:
        raise FitError(
            f"the hidden states need {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free: make "
            "room, give --work, or generate fewer --texts"
        )
    rows = np.unique(row)
    first = np.maximum(text.prompts - 2, 0)
    with replacing(path) as temporary:
        states = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(len(row), size))
        done = 0
        for start in tqdm(range(0, len(rows), batch), unit="batch", mininterval=5.0, desc="hidden states"):
            members = rows[start : start + batch]
            width = int(text.ends[members].max())
            ids = torch.from_numpy(text.tokens[members, :width].astype(np.int64)).to(model.device)
            # What pads a row stands behind it, where a causal model does not look. Scores are not wanted.
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            found = output.hidden_states[-1].to(torch.float16).cpu().numpy()
            for member, of_row in zip(members, found, strict=True):
                part = of_row[first[member] : text.ends[member] - 2]
                if not np.isfinite(part).all():
                    raise FitError(_overflow(model))
                states[done : done + len(part)] = part
                done += len(part)
        states.flush()
        del states


def _overflow(model: PreTrainedModel) -> str:
    kind = str(model.dtype).removeprefix("torch.")
    way_out = "choose another target"
    return (
        f"{model.name_or_path or type(model).__name__} in {kind} has hidden states that are NaN or above "
        f"{np.finfo(np.float16).max:,.0f}, the largest number of the float16 in which they are kept: "
        + (way_out if model.dtype == torch.float32 else f"give --dtype float32, or {way_out}")
    )
