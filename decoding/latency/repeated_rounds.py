"""Doing rounds over and over so that their times can be trusted: what all measured latency profiles share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from ..decoder import Decoder, Round, Session
from ..loading.pair import Pair
from ..sampling import Sampling

_WARM_UP = 3
_FEWEST_REPEATS = 3

Item = TypeVar("Item")


class EndlessText:
    """Sessions of one decoder on one prompt; a new one begins where a text ends.

    Args:
        decoder: of the rounds.
        prompt: token ids that every session continues.
        sampling: how tokens are chosen.
        growth: tokens after which a text is ended, so that the context stays near the prompt's length; by default it
            goes on to the model's limit.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int], sampling: Sampling, *, growth: int | None = None
    ) -> None:
        self._decoder = decoder
        self._prompt = list(prompt)
        self._sampling = sampling
        self._growth = growth
        self._seed = 0
        self._session: Session | None = None

    def restart(self) -> None:
        """Begin a new text with the next round."""
        self._session = None

    def step(self, knobs: Mapping[str, float] | None = None) -> Round:
        """Do one round, with values for the decoder's knobs as `Session.step` takes them."""
        session = self._session
        if session is None or session.finished or (self._growth is not None and len(session.tokens) > self._growth):
            self._seed += 1
            session = self._decoder.start(self._prompt, max_new_tokens=2**20, sampling=self._sampling, seed=self._seed)
            self._session = session
        return session.step(knobs)


def turns(repeats: int, time_limit: float) -> Iterator[tuple[int, bool]]:
    """The number of each repeat, and whether its times count; a few for warming up come first and do not.

    Args:
        repeats: how many count, if time allows.
        time_limit: seconds after which fewer have to do, but at least 3.
    """
    started = time.perf_counter()
    for turn in range(_WARM_UP + repeats):
        if turn >= _WARM_UP + _FEWEST_REPEATS and time.perf_counter() - started > time_limit:
            return
        yield turn, turn >= _WARM_UP


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The items from another one on in every turn, so that each is now early, now late in a text."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def medians(samples: Mapping[int, list[float]]) -> dict[int, float]:
    """Median by number of tokens, without the numbers that came up too rarely to trust."""
    enough = min(_FEWEST_REPEATS, max(len(seconds) for seconds in samples.values()))
    return {tokens: statistics.median(seconds) for tokens, seconds in samples.items() if len(seconds) >= enough}


def repeating_prompt(pair: Pair) -> list[int]:
    """Token ids that repeat themselves, so that drafts which copy from the text have something to copy."""
    length = max(2, min(48, pair.target.context_limit // 4))
    period = max(1, length // 2)
    return [(7919 * (place % period) + 11) % pair.target.vocabulary_size for place in range(length)]
