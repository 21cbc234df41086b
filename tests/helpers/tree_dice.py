"""Draft trees whose every random choice is a branch of a walk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specgym.decoding.decoders.draft_tree import decoder
from specgym.decoding.decoders.draft_tree import pruning as rules
from tests.helpers.known_distributions import Branches


def branch_draws(patch: pytest.MonkeyPatch, walk: Branches) -> None:
    """Let every token be drawn by the walk, children included. (Dice are `branching_dice.Dice`.)"""

    def token_of(row: Tensor) -> int:
        weights = row.double()
        return walk.choose((weights / weights.sum()).tolist())

    def draw(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor(token_of(p))

    def several(q: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor([[token_of(row) for _ in range(count)] for row in q])

    def distinct(q: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        result = []
        for row in q:
            left, drawn = row.clone(), list[int]()
            for _ in range(count):
                possible = [token for token in range(len(left)) if token not in drawn]
                drawn.append(token_of(left) if left.sum() > 0 else possible[0])
                left[drawn[-1]] = 0.0
            result.append(drawn)
        return torch.tensor(result)

    patch.setattr(decoder, "draw", draw)
    patch.setattr(rules, "draw", draw)
    patch.setattr(rules, "draw_several", several)
    patch.setattr(rules, "draw_distinct", distinct)
