"""Timing whole rounds of Lookahead decoding, by how many tokens the target's pass reads.

A round's time is nearly a function of that number alone. With `guesses` at 0 a round reads exactly its window, so any
number can be had. What was seen on a CPU (tiny-10m and tiny-3m, float32): of two rounds that read equally many tokens,
the one with guesses from the pool takes at most 2 % longer on the larger target and 5 to 7 % on the smaller, most of it
after the pass; with n-grams of 5 or 6 tokens it is 2 to 6 % shorter, as the output layer then leaves tokens out, so
that where the vocabulary is large against the model such settings are charged somewhat too much.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from .autoregressive import AutoregressiveDecoder
from .decoder import Round
from .hardware import describe_hardware
from .latency import LatencyProfile, arithmetic_of
from .lookahead import LookaheadDecoder
from .pairs import Pair
from .repeated_rounds import EndlessText, medians, repeating_prompt, rotated, turns
from .round_kinds import LOOKAHEAD, MOST_TARGET_TOKENS
from .sampling import Sampling
from .speculative import require_positive

_LOG = logging.getLogger(__name__)
_SIZES = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, MOST_TARGET_TOKENS)
"""Closer where the small preset reads (10 to 20 tokens), since passes are not linear in detail."""
_GROWTH = 16
_TRIES = 8


def target_alone(pair: Pair) -> Pair:
    """A pair's target without the draft, called by the target's name."""
    return Pair(pair.target, None, pair.tokenizer, name=pair.target.name)


def measure_lookahead(
    pair: Pair,
    *,
    max_target_tokens: int | None,
    repeats: int,
    prompt: Sequence[int] | None,
    sampling: Sampling,
    time_limit: float,
    contexts: Sequence[int],
) -> LatencyProfile:
    """Time live Lookahead rounds of many sizes, and plain decoding, all interleaved. See `latency_measure.measure`.

    Args:
        pair: a target; its draft, if it has one, is not used.
        max_target_tokens: the most tokens that a timed pass reads, 1 or more; None for 160, or for as many as the
            target's context has room for.
        repeats: how often every size is timed, 1 or more.
        prompt: token ids to continue; None for some of which nothing is known.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3.
        contexts: tokens read before, each 1 or more, besides the prompt's own length. They are timed by live rounds
            too, after a text of that length.

    Raises:
        ValueError: a number is not positive, or the target's context has no room for a pass of so many tokens.
    """
    pair = target_alone(pair)
    for context in contexts:
        require_positive("each of contexts", context)
    plain_decoder = AutoregressiveDecoder(pair)
    own = repeating_prompt(pair) if prompt is None else plain_decoder.check_prompt(prompt)
    lengths = [len(own), *sorted({*map(int, contexts)} - {len(own)})]
    sizes = _sizes(pair, max(lengths), max_target_tokens)
    decoder = LookaheadDecoder(pair, max_window=max(map(_columns, sizes)), max_ngram=3)
    prompts = [(own * (length // len(own) + 1))[:length] for length in lengths]
    texts = [
        tuple(EndlessText(each, prompt, sampling, growth=_GROWTH) for each in (decoder, plain_decoder))
        for prompt in prompts
    ]
    rounds: list[defaultdict[int, list[float]]] = [defaultdict(list) for _ in lengths]
    plain: list[list[float]] = [[] for _ in lengths]
    for turn, counts in turns(repeats, time_limit):
        for place, (looking_ahead, plainly) in enumerate(texts):
            looking_ahead.restart()
            plainly.restart()
            for size in rotated(sizes, turn):
                cycle = _round_of(looking_ahead, size)
                autoregressive = plainly.step().verify_seconds
                if counts:
                    plain[place].append(autoregressive)
                    if cycle is not None:
                        rounds[place][size].append(cycle.draft_seconds + cycle.verify_seconds)
    found = [
        LatencyProfile(
            pair=pair.name,
            draft_seconds={0: 0.0},
            target_seconds=medians(rounds[place]),
            autoregressive_seconds=statistics.median(plain[place]),
            hardware=describe_hardware(pair),
            sampling=arithmetic_of(sampling),
            rounds=LOOKAHEAD,
            batch_size=1,
            context=length,
        )
        for place, length in enumerate(lengths)
    ]
    return replace(found[0], points=tuple(found[1:]))


def _sizes(pair: Pair, context: int, largest: int | None) -> list[int]:
    """Sizes to time behind the longest context, ascending."""
    room = pair.target.context_limit - context - _GROWTH  # columns that a window can have at the end of a text
    if room < 1:
        raise ValueError(
            f"a context of {context} tokens leaves {pair.target.name}, whose context is {pair.target.context_limit}, "
            f"no room for Lookahead rounds to be timed, which takes {_GROWTH + 1} tokens; give a shorter prompt or "
            "shorter contexts"
        )
    if largest is None:
        fitting = [size for size in _SIZES if _columns(size) <= room]
        if fitting[-1] < _SIZES[-1]:
            _LOG.warning(
                "Lookahead rounds of %s are timed up to %d tokens, not %d, since its context of %d has no room for "
                "more behind %d; larger ones are charged in proportion",
                pair.target.name, fitting[-1], _SIZES[-1], pair.target.context_limit, context,
            )  # fmt: skip
        return fitting
    if _columns(largest) > room:
        raise ValueError(
            f"a pass over {largest} tokens behind a context of {context} does not fit in {pair.target.name}, whose "
            f"context is {pair.target.context_limit}; give a max_target_tokens of at most {max(1, 2 * room)}, a "
            "shorter prompt or shorter contexts"
        )
    return [*(size for size in _SIZES if size < largest), largest]


def _ngram(size: int) -> int:
    return 3 if size % 2 == 0 else 2  # two rows as by default on a small device; an odd number needs a single one


def _columns(size: int) -> int:
    return size // (_ngram(size) - 1)


def _round_of(text: EndlessText, size: int) -> Round | None:
    """A round that reads so many tokens; the first rounds of a text, whose window lacks rows, are passed over."""
    for _ in range(_TRIES):
        cycle = text.step({"window": _columns(size), "ngram": _ngram(size), "guesses": 0})
        if cycle.target_tokens == size:
            return cycle
    return None
