"""The n-gram pool: runs of tokens that the target has produced in the window, by the token that they follow."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import SpecgymError, check_fields, number, one_of, whole_number

Retention = Literal["recency", "frequency", "sliding"]
_RETENTIONS = ("recency", "frequency", "sliding")
_SEEDS = ("nothing", "prompt", "text")
_RANKINGS = ("retention", "learned")
CONTEXT = 4
"""Tokens before an n-gram that the learned ranking compares."""
_CONTEXTS = 4
"""Places at which an n-gram was found last, whose contexts it remembers."""
_WEIGHTS = (-1.9, 0.3, 1.0, -0.8, 1.2, 2.0)
"""Weights that a ranking begins with: where texts of training prompts left them, on the shipped targets."""
_RATE = 0.5
"""First step of learning a ranking, in units of the features; AdaGrad makes the next ones shorter."""
_PRIOR_TRIALS = 2.0
"""Weight of a guess's recorded probability, in trials beside the real ones."""


class PoolSettingsError(SpecgymError, ValueError):
    """A setting of the pool that makes no sense; the message names it."""


@dataclass(frozen=True)
class PoolSettings:
    """Settings of the pool: n-grams kept, and those that become guesses. They change the speed, never the text.

    Raises:
        PoolSettingsError: a setting is out of its range.
    """

    seeds: Literal["nothing", "prompt", "text"] = "text"
    """Sources of n-grams beside the window: nothing; the prompt; or the prompt and the text as it grows.
    The paper has the first two."""
    retention: Retention = "recency"
    """Which n-gram of a token gives way to a new one: the one found longest ago; the one found least often (of those,
    longest ago); or as the first, and besides any that was last found more than `horizon` tokens of text ago."""
    horizon: int = 256
    """Horizon of the sliding retention, in tokens."""
    max_keys: int = 4096
    """Tokens that n-grams are kept for; the one used longest ago gives way."""
    per_key: int = 16
    """N-grams kept for each."""
    top_share: float | None = None
    """Verify only the most promising n-grams, as many as make up this share of the running scores of all that were
    found for a token (and are likely enough for `min_acceptance`), 0 to 1. A score is the number of tokens that an
    n-gram's verification is expected to bring."""
    max_overlap: float | None = None
    """Leave out an n-gram that has more than this share of its tokens, place by place, in common with one that is
    verified already, 0 to 1."""
    min_acceptance: float | None = None
    """Verify in two stages: first leave out n-grams whose first token the target is expected to accept with a lower
    probability than this, 0 to 1, by how often it did so before and by the probability recorded in the window."""
    ranking: Literal["retention", "learned"] = "retention"
    """Order in which n-grams of a token are verified: that of the retention, or by the share of its tokens that each is
    expected to get right, which a logistic model learns while the text grows (`Ranking`). With the latter `top_share`
    and `min_acceptance` go by the model, too."""
    chunk_tokens: int | None = None
    """Decode the text in chunks of so many tokens, each with a pool of its own; None for one pool for the whole text.
    A chunk inherits the prompt's n-grams, unless `seeds` is `nothing`, and what the ranking has learned; those of the
    text and the window are its own. A chunk begins with the first round after its first token was emitted."""

    def __post_init__(self) -> None:
        one_of(_in_pool("seeds"), self.seeds, _SEEDS, PoolSettingsError)
        one_of(_in_pool("retention"), self.retention, _RETENTIONS, PoolSettingsError)
        one_of(_in_pool("ranking"), self.ranking, _RANKINGS, PoolSettingsError)
        check_fields(self, _checked_count, "horizon", "max_keys", "per_key")
        check_fields(self, _checked_share, "top_share", "max_overlap", "min_acceptance")
        if self.chunk_tokens is not None:
            check_fields(self, _checked_count, "chunk_tokens")


def _in_pool(name: str) -> str:
    return f"{name} of the n-gram pool"


def _checked_count(name: str, value: object) -> int:
    return whole_number(_in_pool(name), value, error=PoolSettingsError)


def _checked_share(name: str, value: object) -> float | None:
    if value is None:
        return None
    return number(_in_pool(name), value, at_least=0, at_most=1, hint="or None", error=PoolSettingsError)


class Guess:
    """An n-gram of the pool, without the token that it follows.

    Attributes:
        tokens: that follow.
        probability: of the whole run as recorded in the window, the product over its tokens; 1 for a run of the text.
        seen: how often it was found.
        last_seen: tokens of text when it was found last.
        tried: how often it was verified.
        accepted: tokens of it that were accepted, over all times.
        begun: how often its first token was accepted.
        contexts: the tokens before the one that it follows, the nearest first, where it was found last.
        learned: share of its tokens that a `Ranking` expects to be right, 0 to 1; None without one.
    """

    __slots__ = (
        "accepted", "begun", "contexts", "last_seen", "learned", "probability", "seen", "tokens", "tried",
    )  # fmt: skip

    def __init__(self, tokens: tuple[int, ...], probability: float, now: int) -> None:
        self.tokens = tokens
        self.probability = probability
        self.seen = 1
        self.last_seen = now
        self.tried = 0
        self.accepted = 0
        self.begun = 0
        self.contexts: list[tuple[int, ...]] = []
        self.learned: float | None = None

    @property
    def first_probability(self) -> float:
        """Recorded for one token: the geometric mean over the run's."""
        return float(self.probability ** (1 / len(self.tokens)))

    def expected_acceptance(self) -> float:
        """Expected acceptance of the first token: the recorded probability, corrected by the trials since."""
        if self.learned is not None:
            return self.learned
        return (self.begun + _PRIOR_TRIALS * self.first_probability) / (self.tried + _PRIOR_TRIALS)

    def score(self) -> float:
        """Tokens that verifying it is expected to bring, by the same reasoning."""
        if self.learned is not None:
            return self.learned * len(self.tokens)
        prior = sum(self.first_probability**power for power in range(1, len(self.tokens) + 1))
        return (self.accepted + _PRIOR_TRIALS * prior) / (self.tried + _PRIOR_TRIALS)


class Ranking:
    """A logistic model of how much of an n-gram comes true, learned from every round of a text.

    Features of an n-gram are the tokens before it that it has in common with the text (at the best of the places where
    it was found), how often and how long ago it was found, the probability that the window recorded, and how often its
    first token was accepted before. After a round it is known of all n-grams of the current token, verified or not,
    how many of their tokens the text has; so each of them is an example. Every text begins anew.

    Attributes:
        weights: of a constant and the five features.
    """

    def __init__(self) -> None:
        self.weights = list(_WEIGHTS)
        self._squares = [1.0] * len(self.weights)
        self._shown: list[tuple[Guess, list[float]]] = []

    def order(self, guesses: Sequence[Guess], before: Sequence[int], now: int) -> list[Guess]:
        """The most promising first; of equal ones, those that were so.

        Args:
            guesses: of the current token.
            before: the text's tokens before that, the nearest first.
            now: tokens of text so far.
        """
        self._shown = [(guess, self._features(guess, before, now)) for guess in guesses]
        for guess, features in self._shown:
            guess.learned = self._expected(features)
        return sorted(guesses, key=lambda guess: -(guess.learned or 0.0) * len(guess.tokens))

    def learn(self, emitted: Sequence[int]) -> None:
        """Take a step for each n-gram that was ordered last, now that the text's next tokens are known."""
        for guess, features in self._shown:
            known = min(len(guess.tokens), len(emitted))
            right = next((place for place in range(known) if guess.tokens[place] != emitted[place]), known)
            excess = self._expected(features) - right / known
            for place, feature in enumerate(features):
                slope = excess * feature
                self._squares[place] += slope * slope
                self.weights[place] -= _RATE * slope / math.sqrt(self._squares[place])
        self._shown = []

    def _features(self, guess: Guess, before: Sequence[int], now: int) -> list[float]:
        match = 0
        for context in guess.contexts:
            same = 0
            while same < min(len(context), len(before)) and context[same] == before[same]:
                same += 1
            match = max(match, same)
        accepted = (guess.begun + 0.5) / (guess.tried + 1.0)
        ages = math.log1p(max(now - guess.last_seen, 0))
        return [1.0, match / 2, math.log(guess.seen), ages / 3, guess.first_probability - 0.5, 2 * accepted - 1]

    def _expected(self, features: Sequence[float]) -> float:
        total = sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))


class NGramPool:
    """N-grams by their first token, bounded in tokens and in n-grams for each.

    Args:
        settings: what is kept, and how it is chosen from.

    Attributes:
        ranking: orders n-grams, if it is learned.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.ranking = Ranking() if settings.ranking == "learned" else None
        self._guesses: OrderedDict[int, OrderedDict[tuple[int, ...], Guess]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """N-grams in the pool."""
        return self._size

    @property
    def keys(self) -> int:
        """Tokens that there are n-grams for."""
        return len(self._guesses)

    def add(
        self, key: int, tokens: tuple[int, ...], now: int, probability: float = 1.0, context: tuple[int, ...] = ()
    ) -> None:
        """Keep an n-gram, or note that it was found again.

        Args:
            key: the token that it follows.
            tokens: at least one.
            now: tokens of text so far, which is the pool's clock.
            probability: of the run, as recorded.
            context: tokens before the key, the nearest first; the learned ranking alone needs them.
        """
        group = self._guesses.get(key)
        if group is None:
            group = self._guesses[key] = OrderedDict()
            if len(self._guesses) > self.settings.max_keys:
                self._size -= len(self._guesses.popitem(last=False)[1])
        else:
            self._guesses.move_to_end(key)
        known = group.get(tokens)
        if known is not None:
            known.seen += 1
            known.last_seen = max(known.last_seen, now)  # the text's own runs are noted late
            known.probability = probability
            group.move_to_end(tokens)
            if context and context not in known.contexts:
                known.contexts = [*known.contexts[1 - _CONTEXTS :], context]
            return
        if len(group) >= self.settings.per_key:
            del group[self._least(group)]
            self._size -= 1
        group[tokens] = guess = Guess(tokens, probability, now)
        guess.contexts = [context] if context else []
        self._size += 1

    def context(self, tokens: Sequence[int], end: int) -> tuple[int, ...]:
        """The tokens before place `end` of some, the nearest first, as far as the ranking compares them."""
        return tuple(tokens[max(0, end - CONTEXT) : end][::-1]) if self.ranking else ()

    def find(self, key: int, now: int, before: Sequence[int] = ()) -> list[Guess]:
        """N-grams kept for a token, the best first by the ranking, or else by the retention's order.

        Args:
            key: the token.
            now: tokens of text so far.
            before: tokens before the key, the nearest first, for the ranking.
        """
        group = self._guesses.get(key)
        if group is None:
            return []
        self._guesses.move_to_end(key)
        if self.settings.retention == "sliding":
            for old in [guess for guess in group.values() if now - guess.last_seen > self.settings.horizon]:
                del group[old.tokens]
                self._size -= 1
            if not group:
                del self._guesses[key]
        guesses = list(reversed(group.values()))
        if self.settings.retention == "frequency":
            guesses.sort(key=lambda guess: -guess.seen)  # stable: of those found as often, the latest first
        return guesses if self.ranking is None else self.ranking.order(guesses, before, now)

    def _least(self, group: OrderedDict[tuple[int, ...], Guess]) -> tuple[int, ...]:
        if self.settings.retention == "frequency":
            return min(group.values(), key=lambda guess: guess.seen).tokens  # the first of several is the oldest
        return next(iter(group))


def choose_guesses(
    candidates: Sequence[Guess], settings: PoolSettings, count: int, longest: int
) -> list[tuple[Guess, tuple[int, ...]]]:
    """Choose the n-grams that become guesses, the cheap first stage before the target's exact check, and cut them.

    Args:
        candidates: the best first.
        settings: of the pool.
        count: guesses, at most.
        longest: tokens of a guess, at most; longer ones are cut. 0 gives none.
    """
    if count == 0 or longest == 0:
        return []
    kept = list(candidates)
    if settings.min_acceptance is not None:
        kept = [guess for guess in kept if guess.expected_acceptance() >= settings.min_acceptance]
    if settings.top_share is not None:
        kept = _promising(kept, settings.top_share)
    picked: dict[tuple[int, ...], Guess] = {}
    for guess in kept:
        tokens = guess.tokens[:longest]
        if tokens in picked or (
            settings.max_overlap is not None and any(_overlap(tokens, other) > settings.max_overlap for other in picked)
        ):
            continue
        picked[tokens] = guess
        if len(picked) == count:
            break
    return [(guess, tokens) for tokens, guess in picked.items()]


def _promising(candidates: Sequence[Guess], share: float) -> list[Guess]:
    """The best by score, as few as make up a share of all scores; in the order that they are found in if equal."""
    ordered = sorted(candidates, key=lambda guess: -guess.score())
    enough, total = share * sum(guess.score() for guess in ordered), 0.0
    for place, guess in enumerate(ordered):
        total += guess.score()
        if total >= enough:
            return ordered[: place + 1]
    return ordered


def _overlap(tokens: Sequence[int], other: Sequence[int]) -> float:
    """The share of the tokens that the other has at the same place."""
    return sum(mine == its for mine, its in zip(tokens, other, strict=False)) / len(tokens)
