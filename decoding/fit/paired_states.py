"""The hidden states of a draft and its target at the same positions of the target's own text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.weight_hashes import weights_digest
from .distilled_text import DistilledText
from .errors import FitError
from .state_files import places_between, states_along


@dataclass(frozen=True)
class PairedStates:
    """States of every position from which a token was written, and that token.

    Attributes:
        text: that the target wrote.
        draft: states of the draft after its final norm, shape (positions, draft width), float16, in a file.
        target: states of the target, shape (positions, target width), likewise.
        row: of each position the row of ``text``, shape (positions,), int64.
        place: of each position the place in that row, likewise; the token written from it stands behind it.
        digest: of all that they depend on, 64 hex digits.
    """

    text: DistilledText
    draft: np.ndarray
    target: np.ndarray
    row: np.ndarray
    place: np.ndarray
    digest: str

    def __len__(self) -> int:
        """How many positions."""
        return len(self.row)

    @property
    def written(self) -> np.ndarray:
        """The token that the target wrote from each position, shape (positions,), int32."""
        return self.text.tokens[self.row, self.place + 1]

    def of_side(self, side: int) -> np.ndarray:
        """Numbers of the positions in texts of one side, shape (m,), int64, ascending."""
        return np.flatnonzero(self.text.side[self.row] == side)

    def of_draft(self, positions: np.ndarray) -> Tensor:
        """States of the draft, shape (m, draft width), float32."""
        return torch.from_numpy(self.draft[positions].astype(np.float32))

    def of_target(self, positions: np.ndarray) -> Tensor:
        """States of the target, shape (m, target width), float32."""
        return torch.from_numpy(self.target[positions].astype(np.float32))


def paired_states(draft: PreTrainedModel, target: PreTrainedModel, text: DistilledText) -> PairedStates:
    """Let both models read a text once, or open the files that an earlier call wrote.

    Args:
        draft: the model that drafts.
        target: the model that wrote the text.
        text: what it wrote.

    Raises:
        FitError: nothing was written; or as for `states_along`.
    """
    first, last = np.maximum(text.prompts - 1, 0), text.ends - 1
    row, place = places_between(first, last)
    if not len(row):
        raise FitError("the target wrote nothing: give more --new-tokens")
    names = [hashlib.sha256(f"{weights_digest(each)} {each.dtype}".encode()).hexdigest() for each in (draft, target)]
    of_draft, of_target = (
        states_along(text.folder / f"states-{name[:16]}.npy", each, text, first, last)
        for name, each in zip(names, (draft, target), strict=True)
    )
    digest = hashlib.sha256(" ".join([text.digest, *names]).encode()).hexdigest()
    return PairedStates(text, of_draft, of_target, row, place, digest)
