"""Replay of decoding in which the draft goes on while the target verifies, from traces of decoding in turns.

What a draft proposes at a position of the target's text depends on that text alone, and a token that is verified there
comes after accepted ones. So the first token of every recorded draft is all that is needed: when greedy the replay is
what live decoding does, round by round. When sampling, whether it passes is drawn anew every time, and the text goes on
at the recorded position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from specgym.decoding import DecoderTraits, LatencyProfile

from ..recordings.trace import Trace
from ..workloads import Workload
from .backend import Floats, Integers, ReplayBackend
from .chain_replay import TraceColumns


class PipelinedReplay(ReplayBackend):
    """Traces replayed by the knobs of a pipelined decoder (`DecoderTraits.overlaps`). See `Backend`.

    A round that loses its bet before the target's pass is over takes as long as that pass; one that wins it, as long as
    the pass or the draft. Of a token under way when a bet is lost the draft is not charged the rest.

    Args: as for `TraceReplay`; the profiles are of rounds that overlap.
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
        self._rule = partial(decoder.trace_rule, options=decoder.checked_options(**options))
        first_prompts = np.cumsum([0, *(trace.prompts for trace in traces[:-1])])
        super().__init__(workloads, profiles, knobs, [np.arange(trace.prompts) for trace in traces], first_prompts)
        longest = int(max(knob.high for knob in knobs))
        self._chance = np.zeros((sum(trace.prompts for trace in traces), max_new_tokens))
        lengths = [np.minimum(np.diff(trace.starts), max_new_tokens) for trace in traces]
        self._length = np.concatenate(lengths).astype(np.int64)
        ended = np.concatenate([trace.ended for trace in traces])
        self._asked = np.where(ended, max_new_tokens, self._length)  # no draft knows that a text is about to end
        for trace, first, used in zip(traces, first_prompts, lengths, strict=True):
            chance = TraceColumns.of(trace, 1, max_new_tokens).chance[:, 0]
            for prompt, (start, length) in enumerate(zip(trace.starts[:-1], used, strict=True), first):
                self._chance[prompt, :length] = chance[start : start + length]
        sizes = range(longest + 1)
        self._awaited = np.array([[profile.draft(steps) if steps else 0.0 for steps in sizes] for profile in profiles])
        self._round_seconds = np.array(
            [[[profile.round_of(steps, read + 1) for read in sizes] for steps in sizes] for profile in profiles]
        )

    def sums(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> dict[str, Floats]:
        """Return the sums of `Metrics` but `plain_seconds`, by name."""
        texts, rule = np.arange(len(prompts)), self._rule(knobs)
        window = np.broadcast_to(rule.draft_length, texts.shape).astype(np.int64)
        waits = np.broadcast_to(rule.pre_verify, texts.shape) == 0
        length, asked = self._length[prompts], self._asked[prompts]
        places = np.arange(self._chance.shape[1])
        # Each position is verified once at most, so one draw a position decides all bets.
        lost = np.where(rng.random((len(texts), len(places))) < self._chance[prompts], len(places), places)
        next_lost = np.minimum.accumulate(lost[:, ::-1], axis=1)[:, ::-1]
        sums = {name: np.zeros(len(texts)) for name in ("tokens", "rounds", "drafted", "accepted", "seconds")}
        sums["total_variation"] = np.zeros(len(texts))
        at, ready = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        while len(texts):
            left = asked - at
            first = np.where(waits & (ready == 0), np.minimum(window, left - 1), 0)
            ready = ready + first
            read = np.minimum(ready, left - 1)
            ahead = np.where(ready == read, np.minimum(window, left - read), 0)
            passed = next_lost[np.arange(len(texts)), at] - at
            tested = (passed >= read) & ((ahead > 0) | (ready > read))
            won = tested & (passed > read)
            taken = np.minimum(np.minimum(passed, read) + 1, length - at)
            drafted_ahead = np.where(won, ahead, np.minimum(ahead, tested))
            for name, values in {
                "tokens": taken,
                "rounds": 1,
                "drafted": read + tested,
                "accepted": np.minimum(np.minimum(passed, read) + won, taken),
                "seconds": self._awaited[workloads, first] + self._round_seconds[workloads, drafted_ahead, read],
            }.items():
                sums[name][texts] += values
            ready = np.where(won, ready - read + ahead - 1, 0)
            at = at + taken
            going = at < length
            if not going.all():
                texts, workloads, window, waits, length, asked, next_lost, at, ready = (
                    values[going] for values in (texts, workloads, window, waits, length, asked, next_lost, at, ready)
                )
        return sums
