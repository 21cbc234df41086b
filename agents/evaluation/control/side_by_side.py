"""Many rules side by side on the same recorded prompts, and what each of them reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from specgym.envs import ControlVectorEnv, MixedTrace, Trace

Sums = NDArray[np.float64]
_RATE_ROUNDS = 4


class ControlRule(Protocol):
    """A rule that decides for many texts at once."""

    @property
    def name(self) -> str:
        """Name of the rule in tables."""

    def __call__(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Decide for every text."""

    def start(self, environments: int, seed: int | None) -> None:
        """Forget what was learned."""


@runtime_checkable
class Foreseeing(Protocol):
    """A rule that is told what will be accepted."""

    def foresee(self, remaining_acceptable: NDArray[np.int64]) -> None:
        """Tell what the next call needs to know."""


Rule = TypeVar("Rule", bound=ControlRule)


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


class SideBySide(ABC, Generic[Rule]):
    """Every prompt of a trace, to be decoded with any rules.

    Attributes:
        trace: what was recorded.
        passes: how often each prompt is decoded; once where the trace is greedy.
    """

    trace: Trace | MixedTrace
    passes: int

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.trace.prompts

    @property
    def repeats(self) -> int:
        """Times that every prompt is decoded, with other random choices; 1 where it is always the same."""
        return 1 if self.trace.info.sampling.greedy else self.passes

    @property
    @abstractmethod
    def plain_seconds(self) -> float:
        """Seconds of a token of plain decoding."""

    @abstractmethod
    def environment(self, texts: int) -> ControlVectorEnv:
        """Make the environment that decodes so many texts."""

    def learns(self, rule: Rule) -> bool:
        """Return whether a rule learns from rounds."""
        return False

    def tell(self, rule: Rule, rows: NDArray[np.intp], info: Mapping[str, NDArray[Any]], seconds: Sums) -> None:
        """Tell a rule that learns which rounds are over.

        Args:
            rule: that learns.
            rows: its texts concerned.
            info: of the step, of all its texts.
            seconds: of each round, shape (rows,).
        """

    def together(self, rules: Sequence[Rule], texts: int) -> Sequence[tuple[Rule, int]]:
        """Rules that decide as `rules` do, each for its texts and those of the next, and the number of their texts.

        Args:
            rules: in order.
            texts: of each rule.
        """
        return [(rule, texts) for rule in rules]

    def decode(self, rules: Sequence[Rule], seed: int = 0, afresh: bool = True) -> list[Decoded]:
        """Decode every prompt with every rule.

        Args:
            rules: each sees its own drafts alone.
            seed: fixes what is accepted of sampled drafts, and the rules' own random choices.
            afresh: call each rule's `start` before; otherwise it goes on with what it has learned.

        Returns:
            One for each rule, in order.
        """
        texts = self.prompts * self.repeats  # of each rule
        env = self.environment(len(rules) * texts)
        if afresh:
            for rule in rules:
                rule.start(texts, seed)
        chosen = np.tile(np.arange(self.prompts), self.repeats * len(rules))
        features, info = env.reset(seed=seed, options={"prompt": chosen})
        sums = {field.name: np.zeros(env.num_envs) for field in fields(Decoded)}
        actions = np.zeros(env.num_envs, np.int64)
        under_way = np.zeros(env.num_envs)  # seconds of the round so far
        deciding, learning, begin = [], [], 0
        for rule, count in self.together(rules, texts):
            part = slice(begin, begin := begin + count)
            deciding.append((rule, part, isinstance(rule, Foreseeing)))
            if self.learns(rule):
                learning.append((rule, part))
        while not env.resting.all():
            for rule, part, foresees in deciding:
                if foresees:
                    rule.foresee(info["remaining_acceptable"][part])  # type: ignore[attr-defined]  # checked above
                actions[part] = rule(features[part])
            features, _, _, _, info = env.step(actions)
            for name, total in sums.items():
                total += info[name]
            under_way += info["seconds"]
            for rule, part in learning:
                rows = np.flatnonzero(info["rounds"][part])
                self.tell(rule, rows, {name: info[name][part] for name in sums}, under_way[part][rows])
            under_way[info["rounds"] > 0] = 0.0
        sums["seconds"] /= self.plain_seconds
        shape = len(rules), self.repeats, self.prompts
        by_rule = {name: total.reshape(shape).sum(1) for name, total in sums.items()}
        return [Decoded(**{name: total[number] for name, total in by_rule.items()}) for number in range(len(rules))]


def at_own_rate(prompts: SideBySide[Any], make: Callable[[float], Rule]) -> tuple[Rule, Decoded]:
    """Return a rule at the rate of its own throughput, and what it reaches, by Dinkelbach's algorithm.

    Args:
        prompts: that it decodes.
        make: the rule at a rate, relative to plain decoding.
    """
    rate = 1.0
    for _ in range(_RATE_ROUNDS):
        rule = make(rate)
        decoded = prompts.decode([rule])[0]
        rate = decoded.throughput
    return rule, decoded
