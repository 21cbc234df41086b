"""The lookahead window: guesses at the tokens to come, improved in parallel until runs of them come true.

One pass of Lookahead decoding: window and guesses as one token tree, and exact verification of the guesses.

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

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.kv_cache import TokenTree


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
    def verified(self) -> list[int]:
        """Nodes that the text may end at: the current token and the chains."""
        return [0, *self.checked]

    @cached_property
    def scored(self) -> list[int]:
        """Nodes whose scores are needed: those that are verified, then the window's last row.

        A window of three rows or more has some that are not needed.
        """
        return self.verified if self.newest == self.trunk else [*self.verified, *self.newest]

    @cached_property
    def place(self) -> dict[int, int]:
        """Place of a node's scores in the result of the pass."""
        return {node: place for place, node in enumerate(self.scored)}

    @cached_property
    def newest_places(self) -> slice:
        """Places of the scores of the window's last row."""
        places = [self.place[node] for node in self.newest]
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)

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


class NGram(NamedTuple):
    """A run of tokens that a column of the window has seen."""

    key: int
    """The first of them."""
    tokens: tuple[int, ...]
    """Those that followed it."""
    probability: float
    """Product of the target's confidences in these tokens."""


class Window:
    """Rows of guessed tokens. Cell (row, column) is a guess at the token `row + column` places after the current one.

    Each pass of the target reads all rows and gives a new one. While rows are missing, in the first N - 2 rounds, the
    new row is added; from then on it takes the last place and the first row leaves, and every column has then seen a
    run of N tokens, each the target's choice after those before it in its branch: an n-gram.

    Args:
        current: the text's last token.
        filler: makes a token for a cell of which nothing is known; never one that ends a text.

    Attributes:
        rows: all of the same length, at least one; the first cell of the first is the current token.
    """

    def __init__(self, current: int, filler: Callable[[], int]) -> None:
        self._filler = filler
        self.rows: list[list[int]] = [[current]]
        self._sure: list[list[float]] = [[1.0]]

    def resize(self, columns: int, most_rows: int) -> None:
        """Widen or narrow the window, and drop the last rows of one that is too high."""
        del self.rows[most_rows:], self._sure[most_rows:]
        for row, sure in zip(self.rows, self._sure, strict=True):
            missing = columns - len(row)
            del row[columns:], sure[columns:]
            row.extend(self._filler() for _ in range(missing))
            sure.extend([0.0] * missing)

    def advance(
        self, new: Sequence[int], emitted: Sequence[int], most_rows: int, sureness: Sequence[float]
    ) -> list[NGram]:
        """Take in a new row, and move on with the text.

        Args:
            new: the target's choice after each cell of the last row, with fillers in place of tokens that end a text.
            emitted: the text's new tokens, at least one; the last becomes the current token.
            most_rows: N - 1.
            sureness: the target's probability of each of the new tokens.

        Returns:
            An n-gram from each column; none while rows are missing.
        """
        full = len(self.rows) == most_rows
        self.rows.append(list(new))
        self._sure.append(list(sureness))
        result: list[NGram] = []
        if full:
            result = [
                NGram(run[0], run[1:], math.prod(sure[1:]))
                for run, sure in zip(zip(*self.rows, strict=True), zip(*self._sure, strict=True), strict=True)
            ]
            del self.rows[0], self._sure[0]
        else:
            self.rows[0][0] = self._filler()  # the current token is no guess, and may be one that ends a text
        # A row that moves up is one place further on already.
        self._pass(len(emitted) - full, emitted[-1])
        return result

    def follow(self, emitted: Sequence[int]) -> None:
        """Move on with the text after a pass that did not read the window. Its new tokens as for `advance`."""
        self.rows[0][0] = self._filler()
        self._pass(len(emitted), emitted[-1])

    def _pass(self, places: int, current: int) -> None:
        # Columns whose places the text has passed are not thrown away but go to the other end, where a guess about
        # earlier places is still better than none.
        places %= len(self.rows[0])
        self.rows = [row[places:] + row[:places] for row in self.rows]
        self._sure = [row[places:] + row[:places] for row in self._sure]
        self.rows[0][0] = current
