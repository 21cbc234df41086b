"""Timing whole rounds of Lookahead decoding, by how many tokens the target's pass reads.

A round's time is nearly a function of that number alone. With `guesses` at 0 a round reads exactly its window, so any
number can be had. What was seen on a CPU (tiny-10m and tiny-3m, float32): of two rounds that read equally many tokens,
the one with guesses from the pool takes at most 2 % longer on the larger target and 5 to 7 % on the smaller, most of it
after the pass; with n-grams of 5 or 6 tokens it is 2 to 6 % shorter, as the output layer then leaves tokens out, so
that where the vocabulary is large against the model such settings are charged somewhat too much.
"""

from __future__ import annotations

import logging

from ...latency.interleaved import Timing
from ...latency.profile import LatencyProfile
from ...latency.round_kinds import MOST_TARGET_TOKENS
from . import LookaheadDecoder

_LOG = logging.getLogger(__name__)
_SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, MOST_TARGET_TOKENS)
"""Closer where the small preset reads (10 to 20 tokens), since passes are not linear in detail."""


def measure_lookahead(timing: Timing, max_target_tokens: int | None) -> LatencyProfile:
    """Time live Lookahead rounds of many sizes, and plain decoding, all interleaved. See `latency_measure.measure`.

    Args:
        timing: of what, and how.
        max_target_tokens: the most tokens that a timed pass reads, 1 or more; None for 160, or for as many as the
            target's context has room for.

    Raises:
        ValueError: the target's context has no room for a pass of so many tokens.
    """
    sizes = _sizes(timing, max_target_tokens)
    decoder = LookaheadDecoder(timing.pair, max_window=max(map(_columns, sizes)), max_ngram=3)
    # The first rounds of a text, whose window lacks rows, read fewer tokens and are passed over.
    return timing.measure(decoder, sizes, _knobs, drafting=None)


def _sizes(timing: Timing, largest: int | None) -> list[int]:
    """Sizes to time behind the longest context, ascending."""
    timing.require_room(1)
    room, target, context = timing.room, timing.pair.target, max(map(len, timing.prompts))
    if largest is None:
        fitting = [size for size in _SIZES if _columns(size) <= room]
        if fitting[-1] < _SIZES[-1]:
            _LOG.warning(
                "Lookahead rounds of %s are timed up to %d tokens, not %d, since its context of %d has no room for "
                "more behind %d; larger ones are charged in proportion",
                target.name, fitting[-1], _SIZES[-1], target.context_limit, context,
            )  # fmt: skip
        return fitting
    if _columns(largest) > room:
        raise ValueError(
            f"a pass over {largest} tokens behind a context of {context} does not fit in {target.name}, whose context "
            f"is {target.context_limit}; give a max_target_tokens of at most {max(1, 2 * room)}, a shorter prompt or "
            "shorter contexts"
        )
    return [*(size for size in _SIZES if size < largest), largest]


def _ngram(size: int) -> int:
    return 3 if size % 2 == 0 else 2  # two rows as by default on a small device; an odd number needs a single one


def _columns(size: int) -> int:
    return size // (_ngram(size) - 1)


def _knobs(size: int) -> dict[str, float]:
    return {"window": _columns(size), "ngram": _ngram(size), "guesses": 0}
