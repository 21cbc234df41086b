"""Timed rounds of Lookahead decoding: whole ones, by the tokens that the target's pass reads.

A round's time is nearly a function of that number alone. With `guesses` at 0 a round reads exactly its window, so any
number can be had. What was seen on a CPU (tiny-10m and tiny-3m, float32): of two rounds that read equally many tokens,
the one with guesses from the pool takes at most 2 % longer on the larger target and 5 to 7 % on the smaller, most of it
after the pass; with n-grams of 5 or 6 tokens it is 2 to 6 % shorter, as the output layer then leaves tokens out, so
that where the vocabulary is large against the model such settings are charged somewhat too much.
"""

from __future__ import annotations

from ...latency.probe import CostProbe
from .decoder import LookaheadDecoder
from .traits import LookaheadTraits

_SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
"""Closer where the small preset reads (10 to 20 tokens), since passes are not linear in detail."""


def probe(like: LookaheadDecoder, max_target_tokens: int | None) -> CostProbe:
    """Return rounds of all sizes up to the largest, by default 160 tokens."""
    largest = max_target_tokens or LookaheadTraits.largest_pass
    sizes = [*(size for size in _SIZES if size < largest), largest]
    # The first rounds of a text, whose window lacks rows, read fewer tokens and are passed over.
    decoder = LookaheadDecoder(like.pair.without_draft(), max_window=max(map(_columns, sizes)), max_ngram=3)
    return CostProbe(decoder, sizes, _knobs, room_for=_columns)


def _ngram(size: int) -> int:
    return 3 if size % 2 == 0 else 2  # two rows as by default on a small device; an odd number needs a single one


def _columns(size: int) -> int:
    return size // (_ngram(size) - 1)


def _knobs(size: int) -> dict[str, float]:
    return {"window": _columns(size), "ngram": _ngram(size), "guesses": 0}
