"""Replay: decoding from recorded traces, without the models.

Every round looks up what the pair did at the row where the text stands: how many tokens were drafted, and how many of
them a fallback keeps. Then the text goes on at the row that the recording says follows. Where the recording does not
say, since decoding with these thresholds never came by, it goes on at as many tokens of a recorded text (a *path*).

The path is the target's own text for a fallback of 0, and for exact speculative decoding. For other thresholds it is
one that decoding with neighbouring recorded thresholds led to, drawn at random: linearly between two fallbacks, and
linearly in the logarithm between two rollbacks. So greedy decoding is replayed exactly where nothing is lossy, and at
recorded thresholds (though with fewer tokens than recorded, the last round of a text that ends early may differ);
elsewhere approximately, and smoothly in the thresholds.

There are two walks, one for many texts at once and one for a single text, which NumPy would slow down. They do the
same, and with one text they draw the same from the same generator.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .replay_table import ACCEPTED, Floats, Integers, ReplayTable

LOSSLESS = ACCEPTED
"""As a fallback: keep what passes the exact test, and nothing else."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of many texts, those of all texts' first rounds first; every array has shape (rounds,).

    Attributes:
        text: which text, from 0.
        row: where it stood.
        drafted: draft tokens that were verified.
        accepted: draft tokens among those emitted.
        taken: tokens emitted.
    """

    text: Integers
    row: Integers
    drafted: Integers
    accepted: Integers
    taken: Integers


class Replay:
    """Replays texts of one table.

    Args:
        table: what was recorded.
        round_seconds: what a round costs by the number of drafted tokens, shape (traces, K + 1).
        tokens: generated of each text, at most.
    """

    def __init__(self, table: ReplayTable, round_seconds: Floats, tokens: int) -> None:
        self.table = table
        self.tokens = tokens
        self._round_seconds = np.ascontiguousarray(round_seconds)
        self._depths = np.arange(table.draft_length)
        self._ends: Integers = np.minimum(tokens, table.lengths)  # tokens of each path
        self._costs: list[float] = self._round_seconds[0].tolist()
        self._fallbacks: list[float] = table.fallbacks[0].tolist()
        self._log_rollbacks: list[float] = table.log_rollbacks[0].tolist()
        # Single numbers come out of a memoryview several times faster than out of an array.
        self._needed, self._distance = table.needed.ravel().data, table.distance.ravel().data
        self._jump, self._routes = table.jump.data, table.routes.ravel().data
        self._drafted, self._places = table.drafted.data, table.places.data

    def decode(
        self, prompt: int, fallback: float, rollback: float, longest: int, random: np.random.Generator
    ) -> dict[str, float]:
        """Decode one text of the first trace, and sum over its rounds.

        Args:
            prompt: a number of the table.
            fallback: 0 to 1, or `LOSSLESS`.
            rollback: 1 or more; a fraction is rounded at random every round.
            longest: tokens drafted, at most.
            random: draws where the decoder would, and the path.

        Returns:
            `tokens`, `rounds`, `drafted`, `accepted`, `divergence` and `seconds`, as `measuring.metrics` takes them.
        """
        fallback = float(np.float32(fallback))
        costs, width = self._costs, self.table.draft_length
        tokens = rounds = drafted = accepted = 0
        divergence = seconds = 0.0
        path = self.choose_path(prompt, fallback, rollback, random)
        for row, drafts, kept, taken in self.walk(path, fallback, rollback, longest, random):
            rounds += 1
            tokens += taken
            drafted += drafts
            accepted += kept
            seconds += costs[drafts]
            if fallback >= 0:
                start = row * width
                for distance in self._distance[start : start + kept]:
                    if distance <= fallback:
                        divergence += distance
        return {
            "tokens": float(tokens),
            "rounds": float(rounds),
            "drafted": float(drafted),
            "accepted": float(accepted),
            "divergence": divergence,
            "seconds": seconds,
        }

    def walk(
        self, path: int, fallback: float, rollback: float, longest: int, random: np.random.Generator
    ) -> Iterator[tuple[int, int, int, int]]:
        """The rounds of one text of the first trace: row, tokens drafted, accepted and emitted.

        Arguments as for `decode`, but a path instead of a prompt, and a fallback as float32 has it.
        """
        table, tokens = self.table, self.tokens
        width, columns, reach = table.routes.shape[1], table.draft_length + 1, table.needed.shape[1]
        copies = int(table.copies[0])
        end = int(self._ends[path])
        further = rollback - 1  # tokens taken back beyond the one that was rejected
        fractional = further % 1 > 0
        row, count = self._routes[path * width], 0
        while True:
            drafted = min(self._drafted[row], tokens - 1 - count, longest)
            place = self._places[row]
            if table.sampled:
                place += int(random.random() * copies)
            start = place * reach
            kept = bisect_right(self._needed, fallback, start, start + drafted) - start
            back = int(further + random.random() if fractional else further)
            if kept < drafted:
                kept = max(kept - back, 0)
            taken = min(kept + 1, end - count)
            yield row, drafted, min(kept, taken), taken
            count += taken
            if count >= end:
                return
            row = self._jump[row * columns + kept]
            if row < 0:
                row = self._routes[path * width + count]

    def choose_path(self, prompt: int, fallback: float, rollback: float, random: np.random.Generator) -> int:
        """A path of a prompt of the first trace, for thresholds as in `walk`."""
        table = self.table
        if not table.has_detours:
            return int(table.paths[prompt, 0, 0])
        above = _neighbour(self._fallbacks, fallback, random)
        return int(table.paths[prompt, above, _neighbour(self._log_rollbacks, math.log(rollback), random)])

    def decode_many(
        self,
        prompts: Integers,
        traces: Integers,
        fallback: Floats,
        rollback: Floats,
        longest: Integers,
        random: np.random.Generator,
    ) -> dict[str, Floats]:
        """Decode many texts, and sum over the rounds of each; every argument but the last has shape (texts,).

        Args:
            prompts: as for `decode`.
            traces: the trace that each prompt belongs to.
            fallback: as for `decode`, all `LOSSLESS` or none.
            rollback: as for `decode`.
            longest: as for `decode`.
            random: as for `decode`.

        Returns:
            As `decode`, arrays of shape (texts,).
        """
        texts = len(prompts)
        limits = fallback.astype(np.float32)
        paths = self.choose_paths(prompts, traces, limits, rollback, random)
        rounds = self.walk_many(paths, traces, limits, rollback, longest, random)
        cost = self._round_seconds.ravel().take(traces[rounds.text] * self._round_seconds.shape[1] + rounds.drafted)

        def summed(values: NDArray[np.generic] | None = None) -> Floats:
            return np.bincount(rounds.text, values, texts).astype(np.float64)

        return {
            "tokens": self._ends[paths].astype(np.float64),
            "rounds": summed(),
            "drafted": summed(rounds.drafted),
            "accepted": summed(rounds.accepted),
            "divergence": self._divergence(rounds, limits),
            "seconds": summed(cost),
        }

    def walk_many(
        self,
        paths: Integers,
        traces: Integers,
        fallback: NDArray[np.float32],
        rollback: Floats,
        longest: Integers,
        random: np.random.Generator,
    ) -> Rounds:
        """The rounds of many texts; arguments as for `decode_many`, with a path instead of a prompt."""
        table, columns = self.table, self.table.draft_length + 1
        routes = table.routes.ravel()
        limits = fallback[:, None]
        further = rollback - 1  # tokens taken back beyond the one that was rejected
        fractional = bool((further % 1).any())
        copies = table.copies[traces]
        text: Integers = np.arange(len(paths))
        # Places on the path count from its first row in `routes`: where the text stands, where it ends, and the last
        # token that there is room for.
        here: Integers = paths * table.routes.shape[1]
        end, last = here + self._ends[paths], here + (self.tokens - 1)
        row: Integers = routes.take(here)
        done: list[tuple[Integers, ...]] = []
        while True:
            drafted = np.minimum(table.drafted.take(row), np.minimum(last - here, longest))
            if table.sampled:
                place = table.places.take(row) + (random.random(len(row)) * copies).astype(np.int64)
            else:
                place = row
            kept = np.minimum(_true_bytes(table.needed.take(place, 0) <= limits), drafted)
            back = (further + random.random(len(row)) if fractional else further).astype(np.int64)
            kept = np.maximum(kept - back * (kept < drafted), 0)
            taken = np.minimum(kept + 1, end - here)
            done.append((text, row, drafted, np.minimum(kept, taken), taken))
            here = here + taken
            following = table.jump.take(row * columns + kept)
            going = (here < end).nonzero()[0]
            if not len(going):
                break
            if len(going) < len(row):
                # What has ended would cost as much as what goes on.
                text, here, end, last = text.take(going), here.take(going), end.take(going), last.take(going)
                limits, further, following = limits.take(going, 0), further.take(going), following.take(going)
                copies, longest = copies.take(going), longest.take(going)
            row = np.where(following < 0, routes.take(here), following)
        return Rounds(*(np.concatenate(values) for values in zip(*done, strict=True)))

    def choose_paths(
        self,
        prompts: Integers,
        traces: Integers,
        fallback: NDArray[np.float32],
        rollback: Floats,
        random: np.random.Generator,
    ) -> Integers:
        """A path for each of many texts; arguments as for `decode_many`."""
        table = self.table
        if not table.has_detours:
            return table.paths[prompts, 0, 0]
        levels = [
            _neighbours(known[traces], values, random.random(len(prompts)))
            for known, values in ((table.fallbacks, fallback), (table.log_rollbacks, np.log(rollback)))
        ]
        return table.paths[prompts, levels[0], levels[1]]

    def _divergence(self, rounds: Rounds, fallback: NDArray[np.float32]) -> Floats:
        """Of each text: the distances of accepted tokens, where they are what made the token accepted outright."""
        if fallback[0] < 0:
            return np.zeros(len(fallback))
        accepted = rounds.accepted.nonzero()[0]
        text = rounds.text.take(accepted)
        distance = self.table.distance.take(rounds.row.take(accepted), 0)
        counts = (distance <= fallback.take(text)[:, None]) & (self._depths < rounds.accepted.take(accepted)[:, None])
        found: NDArray[Any] = np.bincount(text, np.einsum("ij,ij->i", distance, counts), len(fallback))
        return found


def _true_bytes(flags: NDArray[np.bool_]) -> Integers:
    """How many are true in each row, whose length is a multiple of 8; shape (rows, flags) to (rows,)."""
    # Eight flags are a word of bytes that are 0 or 1, and this product has the sum of all eight in its highest byte.
    words = (flags.view(np.uint64) * np.uint64(0x0101010101010101)) >> np.uint64(56)
    found = words[:, 0]
    for column in range(1, words.shape[1]):
        found = found + words[:, column]
    return found.view(np.int64)


def _neighbour(known: list[float], value: float, random: np.random.Generator) -> int:
    """One of the two known values, ascending, that a value lies between, at random by how near it is to them."""
    share = random.random()
    if len(known) == 1:
        return 0
    above = min(max(bisect_left(known, value), 1), len(known) - 1)
    low, high = known[above - 1], known[above]
    return above - int(share * (high - low) >= value - low)


def _neighbours(known: Floats, values: NDArray[np.floating], share: Floats) -> Integers:
    """`_neighbour` of many values: known values of each in a row of shape (texts, known)."""
    if known.shape[1] == 1:
        return np.zeros(len(values), np.int64)
    above = np.clip((known < values[:, None]).sum(1), 1, known.shape[1] - 1)
    each = np.arange(len(values))
    low, high = known[each, above - 1], known[each, above]
    return above - (share * (high - low) >= values - low)
