"""Replay of traces: decoding from what a pair did at every position, without the models.

A rule says what is verified (`specgym.decoding.TraceRule`): drafts have up to `draft_length` tokens; one that fails the
exact test is kept all the same up to a `tolerance`; a rejection takes back so many tokens. Drafts may end earlier, by
`specgym.decoding.ExpectedGain`, which needs nothing but the draft's recorded confidences and the latency profile, or at
a token of which the draft is less sure than a threshold, for any threshold as live decoding would end them.

Every round looks up what the pair did at the row where the text stands: how many tokens were drafted, and how many of
them are kept. Then the text goes on at the row that the recording says follows. Where the recording does not say, since
decoding by this rule never came by, it goes on at as many tokens of a recorded text (a *path*).

The path is the target's own text for a tolerance of 0, and for exact verification. For other rules it is one that
decoding by neighbouring recorded rules led to, drawn at random: linearly between two tolerances, and linearly in the
logarithm between two numbers of tokens taken back. So greedy decoding is replayed exactly where nothing is lossy, and
for recorded rules (though with fewer tokens than recorded, the last round of a text that ends early may differ);
elsewhere approximately, and smoothly in the rule.

There are two walks, for many texts at once and for a single text, which NumPy would slow down. They do the same, and
with a single text they draw the same from the same generator.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import DecoderTraits, LatencyProfile, levels_of

from ..recordings.trace import Trace
from ..workloads import Workload
from .backend import Floats, Integers, Metrics, ReplayBackend
from .replay_table import Doubts, ReplayTable, Rounds, neighbour, neighbours, seconds_by_place, tokens_kept, true_bytes


class TraceWalk:
    """Walks over the rounds of recorded texts.

    Args:
        table: what was recorded.
        round_seconds: `seconds_by_place` of every trace, shape (traces, places).
        tokens: generated of each text, at most.
        by_gain: whether drafts end by `ReplayTable.ends`.
        before: whether the token that ends a draft because the draft is unsure of it is left out.
    """

    def __init__(
        self, table: ReplayTable, round_seconds: Floats, tokens: int, by_gain: bool = False, before: bool = False
    ) -> None:
        self.table = table
        self.tokens = tokens
        self._round_seconds = np.ascontiguousarray(round_seconds)
        self._depths = np.arange(table.draft_length)
        self._ends: Integers = np.minimum(tokens, table.lengths)  # tokens of each path
        self._costs: list[list[float]] = self._round_seconds.tolist()
        self._tolerances: list[list[float]] = table.tolerances.tolist()
        self._log_taken_back: list[list[float]] = table.log_taken_back.tolist()
        self._copies: list[int] = table.copies.tolist()
        # Single numbers come out of a memoryview several times faster than out of an array.
        self._needed, self._strayed = table.needed.ravel().data, table.strayed.ravel().data
        self._jump, self._routes = table.jump.data, table.routes.ravel().data
        self._levelled, self._before, self._doubt = by_gain, before, table.doubt.ravel().data
        drafted = np.minimum(table.drafted, table.ends) if by_gain else table.drafted[None]
        self._drafted_at: NDArray[np.uint8] = drafted.astype(np.uint8).ravel()  # by level, if that matters, and row
        self._drafted, self._places = self._drafted_at.data, table.places.data

    def __reduce__(self) -> tuple[type[TraceWalk], tuple[Any, ...]]:
        """Leave views of memory out of pickles and copies."""
        return type(self), (self.table, self._round_seconds, self.tokens, self._levelled, self._before)

    def decode(
        self,
        prompt: int,
        trace: int,
        tolerance: float,
        taken_back: float,
        longest: int,
        rng: np.random.Generator,
        stop_below: float = 0.0,
        fewest: int = 0,
    ) -> tuple[float, float, float, float, float, float]:
        """Decode one text, and sum over its rounds.

        Args:
            prompt: a number of the table.
            trace: the trace that it belongs to.
            tolerance: 0 to 1, or `specgym.decoding.EXACT`.
            taken_back: 1 or more; a fraction is rounded at random every round.
            longest: tokens drafted, at most.
            rng: draws where the decoder would, and the path.
            stop_below: sureness of a token that ends a draft, 0 to 1; at 0 none does. As `fewest`, for a table with
                `doubt`.
            fewest: tokens of a draft, at least; of a shorter one nothing is verified.

        Returns:
            `tokens`, `rounds`, `drafted`, `accepted`, `total_variation` and `seconds`, as `Metrics` has them.
        """
        tolerance = float(np.float32(tolerance))
        costs, width = self._costs[trace], self.table.draft_length
        tokens = rounds = drafted = accepted = 0
        variation = seconds = 0.0
        path = self.choose_path(prompt, trace, tolerance, taken_back, rng)
        steps = self.walk(path, trace, tolerance, taken_back, longest, rng, stop_below, fewest)
        for row, drafts, kept, emitted, cost in steps:
            rounds += 1
            tokens += emitted
            drafted += drafts
            accepted += kept
            seconds += costs[cost]
            if tolerance >= 0:
                start = row * width
                for distance in self._strayed[start : start + kept]:
                    if distance <= tolerance:
                        variation += distance
        return tokens, rounds, drafted, accepted, variation, seconds

    def walk(
        self,
        path: int,
        trace: int,
        tolerance: float,
        taken_back: float,
        longest: int,
        rng: np.random.Generator,
        stop_below: float = 0.0,
        fewest: int = 0,
        before_rounds: int = 0,
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield the rounds of one text: row, tokens drafted and verified, accepted, emitted, and `Rounds.cost`.

        Arguments as for `decode`, but a path instead of a prompt, and a tolerance as float32 has it; and the tokens
        that the text has before its first round.
        """
        table, tokens = self.table, self.tokens
        width, columns, reach = table.routes.shape[1], table.draft_length + 1, table.needed.shape[1]
        copies = self._copies[trace]
        end = int(self._ends[path])
        further = taken_back - 1  # tokens taken back beyond the one that was rejected
        fractional = further % 1 > 0
        needed, jump, routes, drafted_at, places = self._needed, self._jump, self._routes, self._drafted, self._places
        sampled, draw, first = table.sampled, rng.random, path * width
        if before_rounds >= end:
            return
        row, count, room = routes[first + before_rounds], before_rounds, tokens - 1 - before_rounds
        level = self._level(tolerance) if self._levelled else 0
        stops, before, doubt = stop_below > 0 or fewest > 0, self._before, self._doubt
        sure = -float(np.float32(stop_below)) if stops else 0.0
        while True:
            drafted = drafted_at[level + row]
            if drafted > room:
                drafted = room
            if drafted > longest:
                drafted = longest
            cost = drafted
            if stops:
                draft_steps = 0
                if min(room, longest) >= fewest:
                    start = row * reach
                    certain = bisect_right(doubt, sure, start, start + drafted) - start
                    draft_steps = min(certain + 1, drafted)
                    drafted = certain if before else draft_steps
                if drafted < fewest:
                    drafted = 0
                cost = drafted if draft_steps == drafted else (draft_steps + 1) * columns + drafted
            start = (places[row] + int(draw() * copies) if sampled else places[row]) * reach
            kept = bisect_right(needed, tolerance, start, start + drafted) - start
            back = int(further + draw() if fractional else further)
            if kept < drafted:
                kept = kept - back if kept > back else 0
            taken = kept + 1 if kept < end - count else end - count
            yield row, drafted, kept if kept < taken else taken, taken, cost
            count += taken
            if count >= end:
                return
            room -= taken
            row = jump[row * columns + kept]
            if row < 0:
                row = routes[first + count]

    def _level(self, tolerance: Any) -> Any:
        """Return the place in `_drafted_at` where the drafts of a tolerance begin, or of many."""
        return levels_of(tolerance) * len(self.table.drafted) if self._levelled else 0 * levels_of(tolerance)

    def choose_path(
        self, prompt: int, trace: int, tolerance: float, taken_back: float, rng: np.random.Generator
    ) -> int:
        """Choose a path of a prompt, for a rule as in `walk`."""
        table = self.table
        if not table.has_detours:
            return int(table.paths[prompt, 0, 0])
        above = neighbour(self._tolerances[trace], tolerance, rng)
        return int(table.paths[prompt, above, neighbour(self._log_taken_back[trace], math.log(taken_back), rng)])

    def decode_many(
        self,
        prompts: Integers,
        traces: Integers,
        tolerance: Floats,
        taken_back: Floats,
        longest: Integers,
        rng: np.random.Generator,
        stop_below: Floats | None = None,
        fewest: Integers | None = None,
    ) -> dict[str, Floats]:
        """Decode many texts, and sum over the rounds of each; every argument but `rng` has shape (texts,).

        Args:
            prompts: as for `decode`.
            traces: the trace that each prompt belongs to.
            tolerance: as for `decode`, all `EXACT` or none.
            taken_back: as for `decode`.
            longest: as for `decode`.
            rng: as for `decode`.
            stop_below: as for `decode`.
            fewest: as for `decode`.

        Returns:
            By name, as `decode`, arrays of shape (texts,).
        """
        texts = len(prompts)
        limits = tolerance.astype(np.float32)
        paths = self.choose_paths(prompts, traces, limits, taken_back, rng)
        rounds = self.walk_many(paths, traces, limits, taken_back, longest, rng, stop_below, fewest)
        cost = self._round_seconds.ravel().take(traces[rounds.text] * self._round_seconds.shape[1] + rounds.cost)

        def summed(values: NDArray[np.generic] | None = None) -> Floats:
            return np.bincount(rounds.text, values, texts).astype(np.float64)

        return {
            "tokens": self._ends[paths].astype(np.float64),
            "rounds": summed(),
            "drafted": summed(rounds.drafted),
            "accepted": summed(rounds.accepted),
            "total_variation": self._total_variation(rounds, limits),
            "seconds": summed(cost),
        }

    def walk_many(
        self,
        paths: Integers,
        traces: Integers,
        tolerance: NDArray[np.float32],
        taken_back: Floats,
        longest: Integers,
        rng: np.random.Generator,
        stop_below: Floats | None = None,
        fewest: Integers | None = None,
    ) -> Rounds:
        """Return the rounds of many texts; arguments as for `decode_many`, with a path instead of a prompt."""
        table, columns = self.table, self.table.draft_length + 1
        routes = table.routes.ravel()
        limits = tolerance[:, None]
        further = taken_back - 1  # tokens taken back beyond the one that was rejected
        fractional = bool((further % 1).any())
        copies = table.copies[traces]
        level = self._level(tolerance)
        text: Integers = np.arange(len(paths))
        # Places on the path count from its first row in `routes`: where the text stands, where it ends, and the last
        # token that there is room for.
        here: Integers = paths * table.routes.shape[1]
        end, last = here + self._ends[paths], here + (self.tokens - 1)
        row: Integers = routes.take(here)
        doubts = Doubts.of(table.doubt, stop_below, fewest, self._before)
        done: list[tuple[Integers, ...]] = []
        while True:
            room = np.minimum(last - here, longest)
            drafted = np.minimum(self._drafted_at.take(level + row), room)
            cost: list[Integers] = []
            if doubts is not None:
                drafted, *cost = doubts.end(row, drafted, room, columns)
            place = row
            if table.sampled:
                place = table.places.take(row) + (rng.random(len(row)) * copies).astype(np.int64)
            kept = np.minimum(true_bytes(table.needed.take(place, 0) <= limits), drafted)
            back = (further + rng.random(len(row)) if fractional else further).astype(np.int64)
            kept = tokens_kept(kept, drafted, back)
            taken = np.minimum(kept + 1, end - here)
            done.append((text, row, drafted, np.minimum(kept, taken), taken, *cost))
            here = here + taken
            following = table.jump.take(row * columns + kept)
            going = (here < end).nonzero()[0]
            if not len(going):
                break
            if len(going) < len(row):
                # What has ended would cost as much as what goes on.
                text, here, end, last = text.take(going), here.take(going), end.take(going), last.take(going)
                limits, further, following = limits.take(going, 0), further.take(going), following.take(going)
                copies, longest, level = copies.take(going), longest.take(going), level.take(going)
                doubts = doubts and doubts.take(going)
            row = np.where(following < 0, routes.take(here), following)
        columns_of = [np.concatenate(values) for values in zip(*done, strict=True)]
        return Rounds(*columns_of, *([] if doubts is not None else columns_of[2:3]))

    def choose_paths(
        self,
        prompts: Integers,
        traces: Integers,
        tolerance: NDArray[np.float32],
        taken_back: Floats,
        rng: np.random.Generator,
    ) -> Integers:
        """Choose a path for each of many texts; arguments as for `decode_many`."""
        table = self.table
        if not table.has_detours:
            return table.paths[prompts, 0, 0]
        levels = [
            neighbours(known[traces], values, rng.random(len(prompts)))
            for known, values in ((table.tolerances, tolerance), (table.log_taken_back, np.log(taken_back)))
        ]
        return table.paths[prompts, levels[0], levels[1]]

    def _total_variation(self, rounds: Rounds, tolerance: NDArray[np.float32]) -> Floats:
        """Sum, for each text, the distances of accepted tokens that were accepted for them."""
        if tolerance[0] < 0:
            return np.zeros(len(tolerance))
        accepted = rounds.accepted.nonzero()[0]
        text = rounds.text.take(accepted)
        distance = self.table.strayed.take(rounds.row.take(accepted), 0)
        counts = (distance <= tolerance.take(text)[:, None]) & (self._depths < rounds.accepted.take(accepted)[:, None])
        total: NDArray[Any] = np.bincount(text, np.einsum("ij,ij->i", distance, counts), len(tolerance))
        return total


class TraceReplay(ReplayBackend):
    """Traces replayed by the knobs of a decoder that is recorded by them. See `Backend`.

    Args:
        decoder: whose rule and knobs.
        traces: of its pairs' drafts, one a workload.
        workloads: what was recorded.
        profiles: what every workload's time is charged by, at the operating point.
        max_new_tokens: tokens decoded of each prompt, at most.
        options: build options of the decoder.
    """

    def __init__(
        self,
        decoder: type[DecoderTraits],
        traces: Sequence[Trace],
        workloads: Sequence[Workload],
        profiles: Sequence[LatencyProfile],
        max_new_tokens: int,
        options: Mapping[str, Any],
    ) -> None:
        knobs = decoder.knobs_without_pair(**options)
        self._rule = functools.partial(decoder.trace_rule, options=decoder.checked_options(**options))
        usual = self._rule({knob.name: knob.default for knob in knobs})
        charged = profiles if usual.by_gain else None
        table = ReplayTable(traces, detours=not decoder.lossless, profiles=charged, stop=usual.stop)
        super().__init__(workloads, profiles, knobs, table.prompts, table.first_prompts)
        before = usual.stop == "top_ten"
        seconds = np.array([seconds_by_place(profile, table.draft_length, before) for profile in profiles])
        self._walk = TraceWalk(table, seconds, max_new_tokens, usual.by_gain, before)

    def decode(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> Metrics[Floats]:
        """Decode n texts; a single one without NumPy, which is faster."""
        if len(prompts) > 1:
            return super().decode(prompts, workloads, knobs, rng)
        workload = workloads.item()
        rule = self._rule({name: values.item() for name, values in knobs.items()})
        sums = self._walk.decode(
            prompts.item(),
            workload,
            rule.tolerance,
            rule.taken_back,
            int(rule.draft_length),
            rng,
            rule.stop_below,
            int(rule.fewest),
        )
        return Metrics(*np.array([*sums, self.profiles[workload].autoregressive_seconds * sums[0]])[:, None])

    def sums(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> dict[str, Floats]:
        """Return the sums of `Metrics` but `plain_seconds`, by name."""
        texts, rule = len(prompts), self._rule(knobs)
        tolerance, taken_back = (np.full(texts, number) for number in (rule.tolerance, rule.taken_back))
        longest, fewest = (np.full(texts, number).astype(np.int64) for number in (rule.draft_length, rule.fewest))
        below = np.full(texts, rule.stop_below)
        return self._walk.decode_many(prompts, workloads, tolerance, taken_back, longest, rng, below, fewest)
