"""The rules that a learned one must beat: those with a number to choose, a bandit that learns by itself, an oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgym.decoding import (
    FEATURES,
    ConfidenceBelow,
    EntropyAbove,
    ExpectedGain,
    FixedLength,
    LatencyProfile,
    ProductBelow,
    Rows,
    StopRule,
)
from specgym.envs import DraftLengthVectorEnv, Trace

from .bandit import RoundBandit
from .side_by_side import Decoded, SideBySide, Sums, at_own_rate

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
    """A `RoundBandit` over fixed lengths, which learns while it decodes.

    What was learned is kept from text to text, and lost with `start`.

    Args:
        longest: arms 1 to `longest`, in tokens.
        exploration: in tokens, above 0.

    Raises:
        ValueError: an argument is out of range.
    """

    looks_at_entropy: ClassVar[bool] = False

    def __init__(self, longest: int, exploration: float = 1.0) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        self.longest = longest
        self._bandit = RoundBandit(longest, exploration)

    @property
    def name(self) -> str:
        """`bandit`, with the number of arms."""
        return f"bandit over 1 to {self.longest}"

    def start(self, environments: int, seed: int | None) -> None:
        """Forget everything. The bandit itself draws nothing at random."""
        self._bandit.forget(environments)

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Decide whether to stop; where a draft has its first token, a length is chosen for it."""
        self._bandit.attend(len(features))
        self._bandit.choose(features[:, _PLACE] == 1)
        return features[:, _PLACE] > self._bandit.arm

    def verified(
        self, rows: Rows, drafted: NDArray[np.int64], emitted: NDArray[np.int64], seconds: NDArray[np.float64]
    ) -> None:
        """Learn from rounds that are over, also where the text or the draft ended before the length was reached.

        A round without a drafted token was nobody's choice.
        """
        self._bandit.learn(rows, emitted, seconds)

    @property
    def favourite(self) -> int:
        """The length tried most, in tokens."""
        return self._bandit.favourite + 1


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


@dataclass(frozen=True)
class ReplayedPrompts(SideBySide[StopRule]):
    """Every prompt of a trace, to be decoded with any rules.

    Attributes:
        trace: what was recorded.
        profile: what time is charged by.
        batch_size: sequences decoded together.
        max_draft_length: longest draft, in tokens.
        tokens: of each text, at most.
        decision_seconds: charged for every decision.
        passes: how often each prompt is decoded; once where the trace is greedy.
        decoder: whose draft goes on while the target verifies; None where the two take turns.
        pre_verify: whether such a target reads on at once after a rejection (1), or waits (0).
    """

    trace: Trace
    profile: LatencyProfile
    batch_size: int = 1
    max_draft_length: int = 16
    tokens: int = 64
    decision_seconds: float = 0.0
    passes: int = 1
    decoder: str | None = None
    pre_verify: int | None = None

    @property
    def round_seconds(self) -> NDArray[np.float64]:
        """Seconds of a round by drafted tokens, over those of a plain token, shape (max_draft_length + 1,)."""
        point = self.profile.at(batch_size=self.batch_size)
        return point.round_seconds(self.max_draft_length) / point.autoregressive_seconds

    @property
    def plain_seconds(self) -> float:
        return self.profile.at(batch_size=self.batch_size).autoregressive_seconds

    def environment(self, texts: int) -> DraftLengthVectorEnv:
        return DraftLengthVectorEnv(
            texts,
            recording=self.trace,
            profile=self.profile,
            batch_size=self.batch_size,
            max_draft_length=self.max_draft_length,
            max_new_tokens=self.tokens,
            decision_seconds=self.decision_seconds,
            decoder=self.decoder,
            pre_verify=self.pre_verify,
        )

    @property
    def expected_gain(self) -> ExpectedGain:
        """The closed form for decoding in turns, by the chances that are counted on these prompts."""
        counted = replace(self.profile.at(batch_size=self.batch_size), chances=self.trace.chances)
        return ExpectedGain.of(counted, self.max_draft_length)

    def learns(self, rule: StopRule) -> bool:
        return type(rule).verified is not StopRule.verified

    def tell(self, rule: StopRule, rows: NDArray[np.intp], info: Mapping[str, NDArray[Any]], seconds: Sums) -> None:
        rule.verified(rows, info["drafted"][rows], info["tokens"][rows], seconds)


@dataclass(frozen=True)
class Chosen:
    """Rules chosen on the training prompts of a workload at a batch size.

    Attributes:
        simple: by method, the best of the simple rules, and the expected gain by the chances counted there.
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
    best["gain"] = prompts.expected_gain
    bandit = UpperConfidenceBound(prompts.max_draft_length)
    prompts.decode([bandit])
    return Chosen(best, bandit)


def oracle(prompts: ReplayedPrompts) -> tuple[Clairvoyant, Decoded]:
    """The oracle at the rate of its own throughput, and what it reaches."""
    return at_own_rate(prompts, lambda rate: Clairvoyant(prompts.round_seconds, rate))
