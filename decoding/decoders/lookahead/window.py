"""The lookahead window: guesses at the tokens to come, improved in parallel until runs of them come true."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


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
