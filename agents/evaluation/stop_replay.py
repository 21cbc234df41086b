"""Decoding recorded texts with stop rules: many rules side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, StopRule
from specgym.envs import DraftLengthVectorEnv, Trace

from .stop_baselines import Clairvoyant, UpperConfidenceBound, simple_rules

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
