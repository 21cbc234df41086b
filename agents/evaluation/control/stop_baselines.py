"""The rules that a learned one must beat: those with a number to choose, a bandit that learns by itself, an oracle.

Decoding recorded texts with stop rules: many rules side by side on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgym.decoding import (
    FEATURES,
    ConfidenceBelow,
    EntropyAbove,
    FixedLength,
    LatencyProfile,
    ProductBelow,
    Rows,
    StopRule,
)
from specgym.envs import DraftLengthVectorEnv, Trace

_PLACE = [feature.name for feature in FEATURES].index("place")
_SHARES = (0.01, 0.03, *(round(0.05 * step, 2) for step in range(1, 20)), 0.97, 0.99)
_ENTROPIES = tuple(0.25 * step for step in range(25))


def simple_rules(max_draft_length: int) -> dict[str, Sequence[StopRule]]:
    """By method, the rules from which the best one is chosen on training prompts.

    Args:
        max_draft_length: longest draft, in tokens.
    """
    return {
        "fixed": [FixedLength(length) for length in range(1, max_draft_length + 1)],
        "confidence": [ConfidenceBelow(share) for share in _SHARES],
        "entropy": [EntropyAbove(nats) for nats in _ENTROPIES],
        "product": [ProductBelow(share) for share in _SHARES],
    }


class UpperConfidenceBound(StopRule):
    """A bandit over fixed lengths, which learns while it decodes.

    UCB1 (Auer, Cesa-Bianchi and Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem", 2002): every round
    drafts the length whose mean reward, plus ``exploration * sqrt(2 ln(all rounds) / its rounds)``, is largest. Since
    the objective is a ratio of sums, the reward of a round is ``tokens - rate * seconds`` with the throughput of all
    rounds so far as the rate. Rounds that are still under way count as tried, so that drafts side by side differ.

    What was learned is kept from text to text, and lost with `start`.

    Args:
        longest: arms 1 to `longest`, in tokens.
        exploration: in tokens, above 0. UCB1's own would be the range of rewards, which is as large as `longest`; it
            would try poor lengths for longer than most texts last.

    Raises:
        ValueError: an argument is out of range.
    """

    looks_at_entropy: ClassVar[bool] = False

    def __init__(self, longest: int, exploration: float = 1.0) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        if not (math.isfinite(exploration) and exploration > 0):
            raise ValueError(f"exploration must be finite and above 0, got {exploration}")
        self.longest, self.exploration = longest, exploration
        self.start(1, None)

    @property
    def name(self) -> str:
        """`bandit`, with the number of arms."""
        return f"bandit over 1 to {self.longest}"

    def start(self, environments: int, seed: int | None) -> None:
        """Forget everything. The bandit itself draws nothing at random."""
        self._tokens, self._seconds = np.zeros(self.longest), np.zeros(self.longest)
        self._tried = np.zeros(self.longest, np.int64)
        self._attend(environments)

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide whether to stop; where a draft has its first token, a length is chosen for it."""
        if len(features) != len(self._arm):
            self._attend(len(features))
        for row in np.flatnonzero((features[:, _PLACE] == 1) & ~self._open).tolist():
            arm = self._best()
            self._arm[row], self._open[row] = arm, True
            self._tried[arm] += 1
        return features[:, _PLACE] > self._arm

    def verified(
        self, rows: Rows, drafted: NDArray[np.int64], emitted: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        """Learn from rounds that are over, also where the text or the draft ended before the length was reached."""
        chosen = np.zeros(len(self._arm), np.bool_)
        chosen[slice(None) if rows is None else rows] = True
        numbers = np.flatnonzero(chosen) if rows is None or np.asarray(rows).dtype == np.bool_ else np.asarray(rows)
        counts = self._open[numbers]  # a round without a drafted token was nobody's choice
        arms = self._arm[numbers[counts]]
        np.add.at(self._tokens, arms, np.asarray(emitted)[counts])
        np.add.at(self._seconds, arms, np.asarray(seconds)[counts])
        self._open[numbers] = False

    @property
    def favourite(self) -> int:
        """The length tried most, in tokens."""
        return int(self._tried.argmax()) + 1

    def _attend(self, environments: int) -> None:
        self._arm = np.zeros(environments, np.int64)
        self._open = np.zeros(environments, np.bool_)

    def _best(self) -> int:
        untried = np.flatnonzero(self._tried == 0)
        if len(untried):
            return int(untried[0])
        spent = float(self._seconds.sum())
        rate = float(self._tokens.sum()) / spent if spent > 0 else 0.0
        bonus = self.exploration * np.sqrt(2 * math.log(int(self._tried.sum())) / self._tried)
        return int(((self._tokens - rate * self._seconds) / self._tried + bonus).argmax())


class Clairvoyant(StopRule):
    """Knows how many drafted tokens will be accepted, and drafts as many of them as are worth their time.

    Of `n` tokens drafted and `r` more acceptable ones it drafts another if for some `m` up to `r` the `m` tokens gained
    are worth more than ``rate * (round(n + m) - round(n))``. At the rate of its own throughput no rule that decides
    round by round has a better round.

    Args:
        round_seconds: of a round by drafted tokens from 0 on, over those of a plain token, shape (longest + 1,).
        rate: throughput that time is priced at, relative to plain decoding, at least 0.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, round_seconds: ArrayLike, rate: float) -> None:
        seconds = np.asarray(round_seconds, np.float64)
        if seconds.ndim != 1 or len(seconds) < 2 or not np.isfinite(seconds).all():
            raise ValueError("round_seconds must be finite numbers, for 0 and 1 drafted tokens at least")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate must be finite and at least 0, got {rate}")
        self.rate = rate
        longest = len(seconds) - 1
        worth = np.arange(longest + 1) - rate * seconds  # of a round in which all that is drafted is accepted
        self._go_on = np.zeros((longest + 1, longest + 1), np.bool_)
        for place in range(longest):
            best = np.maximum.accumulate(worth[place + 1 :]) - worth[place]
            self._go_on[place, 1 : longest - place + 1] = best > 0
            self._go_on[place, longest - place + 1 :] = best[-1] > 0
        self._remaining = np.zeros(0, np.int64)

    @property
    def name(self) -> str:
        """`oracle`."""
        return "oracle"

    def foresee(self, remaining_acceptable: NDArray[np.int64]) -> None:
        """Tell what the next call needs to know.

        Args:
            remaining_acceptable: how many more tokens of each draft would be accepted, shape (environments,).
        """
        self._remaining = remaining_acceptable

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide: True to stop.

        Raises:
            ValueError: `foresee` was told of another number of drafts.
        """
        if len(self._remaining) != len(features):
            raise ValueError(
                f"the oracle was told of {len(self._remaining)} drafts and is asked about {len(features)}; call "
                "foresee first. Live decoding cannot: nobody knows what the target will accept"
            )
        longest = len(self._go_on) - 1
        place = np.minimum(features[:, _PLACE].astype(np.int64), longest)
        return ~self._go_on[place, np.clip(self._remaining, 0, longest)]


Sums = NDArray[np.float64]
_ORACLE_ROUNDS = 4


@dataclass(frozen=True)
class Decoded:
    """Sums of decoding some prompts, over all passes of a prompt, shape (prompts,)."""

    tokens: Sums
    """Emitted."""
    seconds: Sums
    """Charged, over those of a plain token."""
    drafted: Sums
    """Draft tokens verified."""
    accepted: Sums
    """Those among them that were emitted."""
    rounds: Sums
    """Verified."""

    @property
    def throughput(self) -> float:
        """Tokens over seconds, relative to plain decoding."""
        return float(self.tokens.sum() / self.seconds.sum())

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted tokens, 0 to 1."""
        return float(self.accepted.sum() / max(self.drafted.sum(), 1))

    @property
    def draft_length(self) -> float:
        """Drafted tokens a round."""
        return float(self.drafted.sum() / self.rounds.sum())


@dataclass(frozen=True)
class ReplayedPrompts:
    """Every prompt of a trace, to be decoded with any rules.

    Attributes:
        trace: what was recorded.
        profile: what time is charged by.
        batch_size: sequences decoded together.
        max_draft_length: longest draft, in tokens.
        tokens: of each text, at most.
        decision_seconds: charged for every decision.
        passes: how often each prompt is decoded, with other dice; once where the trace is greedy.
    """

    trace: Trace
    profile: LatencyProfile
    batch_size: int = 1
    max_draft_length: int = 16
    tokens: int = 64
    decision_seconds: float = 0.0
    passes: int = 1

    @property
    def round_seconds(self) -> NDArray[np.float64]:
        """Seconds of a round by drafted tokens, over those of a plain token, shape (max_draft_length + 1,)."""
        point = self.profile.at(batch_size=self.batch_size)
        return point.round_seconds(self.max_draft_length) / point.autoregressive_seconds

    def decode(self, rules: Sequence[StopRule], seed: int = 0, afresh: bool = True) -> list[Decoded]:
        """Decode every prompt with every rule.

        Args:
            rules: each sees its own drafts alone.
            seed: fixes what is accepted of sampled drafts, and the rules' own random choices.
            afresh: call each rule's `start` before; otherwise it goes on with what it has learned.

        Returns:
            One for each rule, in order.
        """
        passes = 1 if self.trace.info.sampling.greedy else self.passes
        prompts = self.trace.prompts
        texts = prompts * passes  # of each rule
        env = DraftLengthVectorEnv(
            len(rules) * texts,
            recording=self.trace,
            profile=self.profile,
            batch_size=self.batch_size,
            max_draft_length=self.max_draft_length,
            max_new_tokens=self.tokens,
            decision_seconds=self.decision_seconds,
        )
        if afresh:
            for rule in rules:
                rule.start(texts, seed)
        chosen = np.tile(np.arange(prompts), passes * len(rules))
        features, info = env.reset(seed=seed, options={"prompt": chosen})
        sums = {field.name: np.zeros(env.num_envs) for field in fields(Decoded)}
        stop = np.ones(env.num_envs, np.bool_)
        under_way = np.zeros(env.num_envs)  # seconds of the round so far
        while not env.resting.all():
            for number, rule in enumerate(rules):
                part = slice(number * texts, (number + 1) * texts)
                if isinstance(rule, Clairvoyant):
                    rule.foresee(info["remaining_acceptable"][part])
                stop[part] = rule(features[part])
            features, _, _, _, info = env.step(stop)
            for name, total in sums.items():
                total += info[name]
            under_way += info["seconds"]
            self._report(rules, info, under_way, texts)
            under_way[info["rounds"] > 0] = 0.0
        sums["seconds"] /= self.profile.at(batch_size=self.batch_size).autoregressive_seconds
        shape = len(rules), passes, prompts
        by_rule = {name: total.reshape(shape).sum(1) for name, total in sums.items()}
        return [Decoded(**{name: total[number] for name, total in by_rule.items()}) for number in range(len(rules))]

    @staticmethod
    def _report(rules: Sequence[StopRule], info: dict[str, NDArray[Any]], spent: Sums, texts: int) -> None:
        """Tell the rules which rounds are over; `spent` is the seconds of each."""
        for number, rule in enumerate(rules):
            if type(rule).verified is StopRule.verified:
                continue  # it does not learn
            part = slice(number * texts, (number + 1) * texts)
            rows = np.flatnonzero(info["rounds"][part])
            drafted, emitted = (info[name][part][rows] for name in ("drafted", "tokens"))
            rule.verified(rows, drafted, emitted, spent[part][rows])


@dataclass(frozen=True)
class Chosen:
    """Rules chosen on the training prompts of a workload at a batch size.

    Attributes:
        simple: by method, the best of the simple rules.
        bandit: having decoded the training prompts once.
    """

    simple: dict[str, StopRule]
    bandit: UpperConfidenceBound


def choose(prompts: ReplayedPrompts) -> Chosen:
    """Choose every rule's number by its throughput, and let the bandit learn.

    Args:
        prompts: for training.
    """
    families = simple_rules(prompts.max_draft_length)
    replays = prompts.decode([rule for rules in families.values() for rule in rules])
    best, place = {}, 0
    for method, rules in families.items():
        throughputs = [decoded.throughput for decoded in replays[place : place + len(rules)]]
        best[method] = rules[int(np.argmax(throughputs))]
        place += len(rules)
    bandit = UpperConfidenceBound(prompts.max_draft_length)
    prompts.decode([bandit])
    return Chosen(best, bandit)


def oracle(prompts: ReplayedPrompts) -> tuple[Clairvoyant, Decoded]:
    """The oracle at the rate of its own throughput, and what it reaches, by Dinkelbach's algorithm."""
    rate = 1.0
    for _ in range(_ORACLE_ROUNDS):
        rule = Clairvoyant(prompts.round_seconds, rate)
        decoded = prompts.decode([rule])[0]
        rate = decoded.throughput
    return rule, decoded
