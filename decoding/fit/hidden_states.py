"""The hidden states of a target along its own text or any other, from which heads and drafts learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .distilled_text import DistilledText, join_texts
from .errors import FitError
from .labels import labels_of
from .prompt_windows import SPEED
from .state_files import Chained, places_between, states_along


@dataclass(frozen=True)
class HiddenStates:
    """States of the positions from which heads are to predict, and what follows each.

    For drafts they may be those of whole texts (`whole_states`). Otherwise a position belongs here if every token that
    heads predict from it was written by the target: it begins at the last but one of a prompt, from which the first
    head predicts the first token written. (The target itself predicts the token between.) So no token of a prompt is
    ever a label.

    Attributes:
        text: that the target read.
        states: after its final norm, shape (positions, h), float16, in a file or several.
        row: of each position the row of ``text``, shape (positions,), int64.
        place: of each position the place in that row, likewise.
    """

    text: DistilledText
    states: np.ndarray | Chained
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
        FitError: no position has anything to predict; or as for `states_along`.
    """
    first = np.maximum(text.prompts - 2, 0)
    last = np.where(text.side == SPEED, 0, text.ends - 2)  # the side whose speed is measured needs none
    row, place = places_between(first, last)
    if not len(row):
        raise FitError("the target ends every text at once, so there is nothing to learn: give other text")
    return HiddenStates(text, states_along(text.folder / "hidden.npy", model, text, first, last, batch), row, place)


def whole_states(model: PreTrainedModel, text: DistilledText, bfloat16: bool, batch: int = 16) -> HiddenStates:
    """`hidden_states` at every position of every text, the last included: for drafts, which need no labels.

    Args:
        model: the target.
        text: what it reads.
        bfloat16: multiply matrices in bfloat16, as training does: much quicker where the processor can, and far nearer
            to the target's own distribution than a draft comes.
        batch: rows that it reads at a time.

    Raises:
        FitError: as for `states_along`.
    """
    first = np.zeros_like(text.ends)
    row, place = places_between(first, text.ends)
    path = text.folder / f"whole{'-bfloat16' * bfloat16}.npy"
    states = states_along(path, model, text, first, text.ends, batch, bfloat16)
    return HiddenStates(text, states, row, place)


def join_states(parts: Sequence[HiddenStates]) -> HiddenStates:
    """The states of several texts as those of one, whose rows are those of the first, then of the second, and so on.

    Args:
        parts: at least one, all of the same target.
    """
    if len(parts) == 1:
        return parts[0]
    text = join_texts([part.text for part in parts])
    before = np.cumsum([0, *(len(part.text.ends) for part in parts[:-1])])
    return HiddenStates(
        text=text,
        states=Chained([part.states for part in parts]),
        row=np.concatenate([part.row + rows for part, rows in zip(parts, before, strict=True)]),
        place=np.concatenate([part.place for part in parts]),
    )
