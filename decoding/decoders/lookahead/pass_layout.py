"""One pass of Lookahead decoding: window and guesses as one token tree, and exact verification of the guesses.

The published mask is that of a tree. The window's first row is its trunk, a chain that begins with the current token;
every column of the window is a branch that hangs from its cell of the trunk, and every guess one that hangs from the
current token. Position and visibility of a cell are then those of a node: cell (row, column) is `row + column` steps
behind the current token, and sees the trunk up to its column and its own column up to its row.

A guess is proposed with certainty, so its distribution is one-hot. At a node of the tree of guesses the distinct next
tokens are tried one after the other: token x is accepted with its share of the target's probability that is left, and
otherwise taken out of it. The text follows the target's distribution whatever was guessed, as in Algorithm 4 of Fu et
al. (arXiv 2402.02057). Greedy decoding is the case in which every probability is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.token_tree import TokenTree


class Layout:
    """The places of window and guesses in one pass.

    The nodes are numbered row by row through the window, then guess by guess.

    Args:
        rows: of the window, at least 1.
        columns: of the window, at least 1.
        guesses: the length of each guess, in tokens.

    Attributes:
        tree: how the tokens hang together.
        trunk: nodes of the window's first row.
        newest: nodes of the window's last row, from which its next row comes.
        guesses: the nodes of each guess.
    """

    def __init__(self, rows: int, columns: int, guesses: Sequence[int]) -> None:
        parents = [*range(-1, columns - 1), *range((rows - 1) * columns)]
        self.trunk = range(columns)
        self.newest = range((rows - 1) * columns, rows * columns)
        self.guesses: list[range] = []
        for length in guesses:
            first = len(parents)
            parents += [0, *range(first, first + length - 1)]
            self.guesses.append(range(first, first + length))
        self.tree = TokenTree(parents)
        self._moved: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def scored(self) -> list[int]:
        """Nodes whose scores are needed: those that are verified, then the window's last row.

        A window of three rows or more has some that are not needed.
        """
        verified = [0, *self.checked]
        return verified if self.newest == self.trunk else [*verified, *self.newest]

    @cached_property
    def place(self) -> dict[int, int]:
        """Place of a node's scores in the result of the pass."""
        return {node: place for place, node in enumerate(self.scored)}

    @cached_property
    def chains(self) -> list[range]:
        """The nodes of every chain that is verified, none of them the root: the rest of the trunk, then each guess."""
        return [self.trunk[1:], *self.guesses]

    @cached_property
    def checked(self) -> list[int]:
        """The nodes of all chains."""
        return [node for chain in self.chains for node in chain]

    def scored_on(self, device: torch.device) -> Tensor:
        """`scored` on a device, shape (scored,), int64."""
        return self._on(device)[0]

    def checked_on(self, device: torch.device) -> Tensor:
        """`checked` on a device, shape (checked,), int64."""
        return self._on(device)[1]

    def parents_on(self, device: torch.device) -> Tensor:
        """Places of the scores of the checked nodes' parents in the result of the pass, shape (checked,), int64."""
        return self._on(device)[2]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._moved:
            parents = [self.place[self.tree.parents[node]] for node in self.checked]
            scored, checked, above = (
                torch.tensor(numbers, dtype=torch.int64, device=device)
                for numbers in (self.scored, self.checked, parents)
            )
            self._moved[device] = scored, checked, above
        return self._moved[device]


@lru_cache(maxsize=512)
def layout(rows: int, columns: int, guesses: tuple[int, ...]) -> Layout:
    """The layout of a shape; each is worked out once. Arguments as for `Layout`."""
    return Layout(rows, columns, guesses)


class Accepted(NamedTuple):
    """Result of verifying some guesses."""

    guess: int
    """The guess that was followed furthest; 0 if none was followed at all."""
    length: int
    """Number of its tokens that were accepted."""
    rejected: list[int]
    """Tokens that were tried where the guesses ended, and that may therefore not come next."""


def follow(
    guesses: Sequence[Sequence[int]], chances: Sequence[Sequence[float]], uniform: Callable[[], float]
) -> Accepted:
    """Walk down the tree of guesses, as far as the dice accept.

    Args:
        guesses: token ids; guesses with the same beginning share it.
        chances: of each token of each guess, its probability by the target after those before it, 0 to 1.
        uniform: throws a die, in [0, 1).
    """
    surviving = [number for number, guess in enumerate(guesses) if guess]
    followed, count = 0, 0
    while surviving:
        left = 1.0
        rejected: list[int] = []
        for number in surviving:
            token = guesses[number][count]
            if token in rejected:
                continue
            chance = chances[number][count]
            if uniform() * left < chance:
                break
            left -= chance
            rejected.append(token)
        else:
            return Accepted(followed, count, rejected)
        followed = number
        surviving = [other for other in surviving if guesses[other][count] == token]
        count += 1
        surviving = [other for other in surviving if len(guesses[other]) > count]
    return Accepted(followed, count, [])
