"""The n-gram pool: runs of tokens that the target has produced in the window, by the token that they follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import SpecgymError, check_fields, number, one_of, whole_number

Retention = Literal["recency", "frequency", "sliding"]
_RETENTIONS = ("recency", "frequency", "sliding")
_SEEDS = ("nothing", "prompt", "text")
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

    def __post_init__(self) -> None:
        one_of(_in_pool("seeds"), self.seeds, _SEEDS, PoolSettingsError)
        one_of(_in_pool("retention"), self.retention, _RETENTIONS, PoolSettingsError)
        check_fields(self, _checked_count, "horizon", "max_keys", "per_key")
        check_fields(self, _checked_share, "top_share", "max_overlap", "min_acceptance")


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
    """

    __slots__ = ("accepted", "begun", "last_seen", "probability", "seen", "tokens", "tried")

    def __init__(self, tokens: tuple[int, ...], probability: float, now: int) -> None:
        self.tokens = tokens
        self.probability = probability
        self.seen = 1
        self.last_seen = now
        self.tried = 0
        self.accepted = 0
        self.begun = 0

    @property
    def first_probability(self) -> float:
        """Recorded for one token: the geometric mean over the run's."""
        return float(self.probability ** (1 / len(self.tokens)))

    def expected_acceptance(self) -> float:
        """Expected acceptance of the first token: the recorded probability, corrected by the trials since."""
        return (self.begun + _PRIOR_TRIALS * self.first_probability) / (self.tried + _PRIOR_TRIALS)

    def score(self) -> float:
        """Tokens that verifying it is expected to bring, by the same reasoning."""
        prior = sum(self.first_probability**power for power in range(1, len(self.tokens) + 1))
        return (self.accepted + _PRIOR_TRIALS * prior) / (self.tried + _PRIOR_TRIALS)


class NGramPool:
    """N-grams by their first token, bounded in tokens and in n-grams for each.

    Args:
        settings: what is kept, and how it is chosen from.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self._guesses: OrderedDict[int, OrderedDict[tuple[int, ...], Guess]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """N-grams in the pool."""
        return self._size

    @property
    def keys(self) -> int:
        """Tokens that there are n-grams for."""
        return len(self._guesses)

    def add(self, key: int, tokens: tuple[int, ...], now: int, probability: float = 1.0) -> None:
        """Keep an n-gram, or note that it was found again.

        Args:
            key: the token that it follows.
            tokens: at least one.
            now: tokens of text so far, which is the pool's clock.
            probability: of the run, as recorded.
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
            return
        if len(group) >= self.settings.per_key:
            del group[self._least(group)]
            self._size -= 1
        group[tokens] = Guess(tokens, probability, now)
        self._size += 1

    def find(self, key: int, now: int) -> list[Guess]:
        """N-grams kept for a token, the best by the retention's order first."""
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
        return guesses

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
