"""Worlds of real pairs, to be tuned by what has learned in simulated ones: measured by decoding, or by replay.

Either measures what a simulated world measures: the speedup of a setting on some training texts, acceptance by place
and by level of the draft's probability, and the draft's entropy. Replay charges a latency profile; decoding reads the
clock, the setting and plain decoding taking turns, prompt by prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from specgym.decoding import ArgumentError, LatencyProfile, one_of, takes_threshold

from ..prompt_order import prompts_at
from ..recordings.archive import TraceError
from ..workloads import Workload
from .acceptance import LENGTHS, LEVELS, LONGEST, length_of, threshold_of
from .beliefs import PROFILED, Facts
from .pool import AcceptancePool
from .worlds import ENGINE_NAMES, ENGINES, PROMPTS, Charges, Readings, Worlds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specgym.decoding import DraftStep, EngineStop, Round

TOKENS: Final = 48
"""Tokens decoded after each prompt, at most."""
_WARM_UP = 12


class RealWorld(Protocol):
    """A real pair with a prompt set and an engine, as a single world.

    Attributes:
        workload: that is measured.
        engine: its name.
        backend: what measures, ``live`` or ``replay``.
        profile: seconds of rounds, from which `facts` are.
        facts: known before anything is tried, each of shape (1,).
        threshold: whether a threshold may end drafts early.
    """

    workload: Workload
    engine: str
    backend: str
    profile: LatencyProfile
    facts: Facts
    threshold: bool

    def __len__(self) -> int:
        """Return 1."""
        ...

    def measure(self, setting: int) -> Readings:
        """Measure a setting on the next training texts; arrays with one row."""
        ...


def knobs_of(setting: int, threshold: bool = True) -> dict[str, float]:
    """Return a setting as knobs of `SpeculativeDecoder`.

    Args:
        setting: its number.
        threshold: whether the engine has a threshold.
    """
    number = np.array(setting)
    length: dict[str, float] = {"draft_length": int(length_of(number))}
    return {**length, "stop_threshold": float(threshold_of(number))} if threshold else length


def facts_of(workload: Workload, engine: str, profile: LatencyProfile) -> Facts:
    """Return what is known of a pair before anything is tried.

    Args:
        workload: of the pair; its name says whether the engine takes a threshold for such drafts.
        engine: one of `ENGINE_NAMES`.
        profile: of rounds that draft chains, by which they cost what they do.

    Raises:
        ValueError: there is no such engine.
    """
    one_of("engine", engine, ENGINE_NAMES)
    fixed = not has_threshold(workload, engine)
    stop = ENGINES[ENGINE_NAMES.index(engine)].stop
    short, long = (profile.round(tokens) / profile.autoregressive_seconds for tokens in PROFILED)
    return Facts(
        np.array([fixed]),
        np.array([stop == "before" and not fixed]),
        np.array([workload.sampling.temperature]),
        np.array([1]),
        np.array([short]),
        np.array([max(short, long)]),
    )


def has_threshold(workload: Workload, engine: str) -> bool:
    """Return whether an engine ends the drafts of a workload's pair early, by a threshold."""
    if not isinstance(workload.pair, str):
        return ENGINES[ENGINE_NAMES.index(engine)].stop is not None
    return takes_threshold(engine, workload.pair)


class _Pair:
    """Facts about a real pair; arguments as for those that measure it."""

    def __init__(self, workload: Workload, engine: str, profile: LatencyProfile) -> None:
        self.workload, self.engine, self.profile = workload, engine, profile
        self.facts = facts_of(workload, engine, profile)
        self.threshold = not bool(self.facts.fixed[0])

    def __len__(self) -> int:
        return 1


class ReplayedPair(_Pair):
    """A world whose pair's trace ships with the package.

    Args:
        workload: that was recorded.
        engine: one of `ENGINE_NAMES`.
        profile: what time is charged by.
        seed: fixes the texts of every measurement.

    Raises:
        TraceError: no such trace ships.
        ValueError: there is no such engine.
    """

    backend = "replay"

    def __init__(self, workload: Workload, engine: str, profile: LatencyProfile, seed: int = 0) -> None:
        super().__init__(workload, engine, profile)
        pool = AcceptancePool.recorded([workload.name], seed)
        (place, *_) = np.flatnonzero(pool.before == self.facts.before[0])
        nothing = np.zeros(1, np.int64)
        costs = Charges.of([], [profile]).costs(nothing, nothing)
        engines = np.array([ENGINE_NAMES.index(engine)])
        self._worlds = Worlds(pool, np.array([place]), engines, np.array([1]), nothing, np.zeros(1), costs)
        self._rng = np.random.default_rng(seed)

    def measure(self, setting: int) -> Readings:
        """Measure a setting on some of the recorded training texts."""
        return self._worlds.measure(np.zeros(1, np.int64), np.array([setting]), self._rng)


class LivePair(_Pair):
    """A world that is measured by decoding, by the clock.

    Args:
        workload: whose training prompts are decoded.
        engine: one of `ENGINE_NAMES`.
        profile: seconds of rounds on this machine.
        max_new_tokens: decoded after each prompt, at most.
        seed: fixes the order of the prompts and all draws.

    Raises:
        ValueError: there is no such engine, or the pair has no draft. Loading errors as for `load_pair`.
    """

    backend = "live"

    def __init__(
        self,
        workload: Workload,
        engine: str,
        profile: LatencyProfile,
        max_new_tokens: int = TOKENS,
        seed: int = 0,
    ) -> None:
        from specgym.decoding import AutoregressiveDecoder, SpeculativeDecoder  # torch, which a replay does without

        super().__init__(workload, engine, profile)
        pair = workload.load()
        stop = ENGINES[ENGINE_NAMES.index(engine)].stop if self.threshold else None
        rule: EngineStop = "never" if stop is None else "llama.cpp" if stop == "before" else "transformers"
        self._before = stop == "before"
        self.decoder = SpeculativeDecoder(pair, LONGEST, stop=rule)
        self.plain = AutoregressiveDecoder(pair)
        self._prompts = workload.prompt_ids("train")
        if not self._prompts:
            raise ArgumentError(f"{workload.name} has no training prompts to measure on")
        self._tokens, self._sampling, self._seed = max_new_tokens, workload.sampling, seed
        self._measured = 0

    def measure(self, setting: int) -> Readings:
        """Decode the next training prompts plainly and with a setting, in turns."""
        from specgym.decoding import Side, decode_in_turns

        knobs, number = knobs_of(setting, self.threshold), self._measured
        self._measured += 1
        order = prompts_at(number * PROMPTS, PROMPTS, len(self._prompts), self._seed)
        prompts = [self._prompts[place] for place in order]
        length = int(knobs["draft_length"])
        sides = {"plain": Side(self.plain), **({"drafted": Side(self.decoder, knobs)} if length else {})}
        with self.plain.pair.capturing(after=1):  # a first text pays for what is set up once
            for decoder, values in sides.values():
                decoder.generate(prompts[0], max_new_tokens=_WARM_UP, sampling=self._sampling, seed=0, knobs=values)
        tally = _Tally(self._before)
        self.decoder.on_round = tally.add
        seconds, tokens = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0)
        try:
            turns = decode_in_turns(
                sides,
                prompts,
                max_new_tokens=self._tokens,
                sampling=self._sampling,
                seeds=range(PROMPTS * number, PROMPTS * number + len(prompts)),
                warm_up=0,
            )
            for turn in turns:
                for name, generation in turn.items():
                    seconds[name] += generation.seconds
                    tokens[name] += len(generation.tokens)
        finally:
            self.decoder.on_round = None
        if not length:
            tally.drafts[0] = tokens["plain"]
            return tally.readings(1.0)
        rates = {name: seconds[name] / tokens[name] for name in sides}
        return tally.readings(rates["plain"] / rates["drafted"])


class _Tally:
    """Counts of rounds, as a measurement has them.

    Args:
        before: whether the rule looks at the likeliest of ten tokens, as one does that stops before a token.
    """

    def __init__(self, before: bool) -> None:
        from specgym.decoding import TokenRule

        self._rule = TokenRule(1.0, before)
        self.drafts = np.zeros(LONGEST + 1, np.int64)
        self._kept, self._reached = np.zeros((2, LONGEST), np.int64)
        self._judged, self._passed = np.zeros((2, LEVELS), np.int64)
        self._entropy = 0.0

    def add(self, steps: Sequence[DraftStep], round_: Round) -> None:
        """Count a round."""
        stays = round_.accepted
        reached = min(stays + 1, round_.drafted)
        self.drafts[round_.drafted] += 1
        self._kept += stays >= LENGTHS[1:]
        self._reached += reached >= LENGTHS[1:]
        for place, step in enumerate(steps[:reached]):
            level = min(int(self._rule.sureness(step) * LEVELS), LEVELS - 1)
            self._judged[level] += 1
            self._passed[level] += place < stays
            self._entropy += step.entropy()

    def readings(self, speedup: float) -> Readings:
        """Return the counts as arrays with one row."""
        return Readings(
            np.array([speedup]),
            self.drafts[None],
            self._kept[None],
            self._reached[None],
            self._judged[None],
            self._passed[None],
            np.array([self._entropy / max(int(self._judged.sum()), 1)]),
        )


def real_world(workload: Workload, engine: str, live: bool, seed: int = 0, tokens: int = TOKENS) -> RealWorld:
    """Return a pair as a world: replayed where its trace ships, unless it is to be decoded.

    Args:
        workload: of the pair.
        engine: one of `ENGINE_NAMES`.
        live: whether to decode even where a trace ships.
        seed: fixes the measured texts.
        tokens: decoded after each prompt, at most, where the pair is decoded.

    Raises:
        ValueError: there is no such engine. Otherwise as for `profile_of`.
    """
    from ..profiles import profile_of

    if not live:
        try:
            return ReplayedPair(workload, engine, profile_of(workload, None, replayed=True), seed)
        except TraceError:
            pass  # nothing of it ships
    return LivePair(workload, engine, profile_of(workload, None, replayed=False), tokens, seed)
