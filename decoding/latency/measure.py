"""Measured latency profiles: live rounds, of one text or of several together.

The profile is measured through the same rounds that decode text, once, and kept in specgym's cache folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..decoder import Decoder
from ..drafts.mixed import drafts_of
from ..errors import ArgumentError, number, sequence_of, whole_number
from ..files import cache_folder, file_name
from ..loading.pair import Pair
from ..registry import build_decoder
from ..sampling import GREEDY, Sampling
from ..traits import CHAIN
from .batch_grid import plan_grid, time_places
from .interleaved import (
    fingerprint,
    repeating_prompt,
    time_rounds,
)
from .probe import MOST_SPREAD, TRIES, contradictions, measured_with_care, smoothed, spread_of
from .profile import LatencyProfile, LatencyProfileError, arithmetic_of

LONGEST_DRAFT = 16
"""Longest chain that is timed by default, in tokens."""
REPEATS = int(os.environ.get("SPECGYM_TIMING_REPEATS", "40"))
"""Times that every size is timed by default."""
_LOG = logging.getLogger(__name__)
_known: dict[Path, LatencyProfile] = {}


def measure(
    pair: Pair,
    decoder: Decoder[Any] | str | None = None,
    *,
    max_draft_length: int | None = None,
    max_target_tokens: int | None = None,
    repeats: int | None = None,
    prompt: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    time_limit: float = 40.0,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
    tries: int = TRIES,
) -> LatencyProfile:
    """Time live rounds of several sizes, and plain decoding, all interleaved.

    Each number is a median over the repeats, and a slow spell of the machine hits all numbers alike. The warm-up is
    left out, and an accelerator is synchronised. A decoder says itself which of its rounds are timed
    (`Decoder.cost_probe`). Chains are threshold decoding's, whatever the decoder, because its verification contains
    that of speculative sampling; the two differ by the distance between the models, a small part of a target pass.

    Rounds are timed at batch size 1 and the prompt's length as the context. Other batch sizes and contexts become the
    profile's `points`, in seconds of the whole batch; the grid always contains the first point. Chains are timed in
    batches of texts (`batch_grid.time_places`); all other rounds at other contexts, and at no other batch size.

    A machine that is busy shows in the spread of the times, and in times that contradict each other. It is then
    measured again, and the best measurement returned, with a warning if that is still a bad one. Within their
    uncertainty times are smoothed, so that none falls with size and drafting nothing never beats plain decoding.

    Args:
        pair: a target, with a draft where the decoder needs one.
        decoder: whose rounds are timed: a decoder of this pair, or the name of one that is built with its default
            options; by default chains.
        max_draft_length: of chains, the longest draft timed, in tokens; by default 16.
        max_target_tokens: of other rounds, the most tokens that a timed pass reads; by default as many as the decoder's
            knobs allow, or as there is room for.
        repeats: how often every size is timed, by default 40 times.
        prompt: token ids to continue; by default ids that repeat themselves, so that prompt lookup has matches.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3; for the live rounds, and once more
            for the other points of chains together, in every try.
        batch_sizes: sequences decoded together, each 1 or more.
        contexts: tokens of each sequence that were read before, each 1 or more; by default the prompt's length alone.
        tries: measurements at most, where the machine is busy.

    Raises:
        ValueError: the pair does not suit the decoder, a number is not positive or does not belong to this kind of
            rounds, a batch is asked for where none can be timed, or a context leaves the models no room.
    """
    repeats = whole_number("repeats", REPEATS if repeats is None else repeats)
    tries = whole_number("tries", tries)
    time_limit = number("time_limit", time_limit, at_least=0)
    batch_sizes = sequence_of("batch_sizes", batch_sizes, whole_number)
    contexts = sequence_of("contexts", () if contexts is None else contexts, whole_number, fewest=0)
    if isinstance(decoder, str):
        decoder = build_decoder(decoder, pair)
    kind = CHAIN if decoder is None else decoder.cost_kind(sampling.greedy)
    limits = {"max_draft_length": max_draft_length, "max_target_tokens": max_target_tokens}
    right, wrong = sorted(limits, reverse=kind != CHAIN)
    if limits[wrong] is not None:
        raise ArgumentError(f"{wrong} is not for {kind} rounds; how large those are timed is {right}")
    largest = None if limits[right] is None else whole_number(right, limits[right])
    if decoder is None or kind == CHAIN:
        _require_draft(pair)
        measure_chains = partial(
            _measure_chains,
            pair,
            largest or LONGEST_DRAFT,
            repeats=repeats,
            prompt=prompt,
            sampling=sampling,
            time_limit=time_limit,
            batch_sizes=batch_sizes,
            contexts=contexts,
        )
        with pair.capturing(after=1):
            return measured_with_care(measure_chains, tries=tries)
    if set(batch_sizes) - {1}:
        raise ArgumentError(
            f"{kind} rounds are timed at batch size 1 alone, got batch sizes {batch_sizes}"
            + (
                "; for others compute a profile: specgym.decoding.roofline.roofline(target, None, hardware, "
                f"decoder={decoder.name!r})"
                if decoder.single_pass
                else "; leave them out"
            )
        )
    probe = decoder.cost_probe() if largest is None else decoder.cost_probe(largest)
    measure_rounds = partial(
        time_rounds,
        _timed_pair(pair, decoder),
        probe,
        kind,
        max_target_tokens=largest,
        repeats=repeats,
        prompt=prompt,
        sampling=sampling,
        time_limit=time_limit,
        contexts=contexts,
    )
    with pair.capturing(after=1):
        return measured_with_care(measure_rounds, ordered=probe.fixed, tries=tries)


def measured(
    pair: Pair, decoder: Decoder[Any] | str | None = None, refresh: bool = False, *, sampling: Sampling = GREEDY
) -> LatencyProfile:
    """Return the profile of a pair on this hardware: measured at the first call, then read from the cache folder.

    A profile that contradicts itself, as `contradictions` finds, is never kept there: it is returned with a warning,
    and the next process measures again. One that an earlier version has kept is measured anew.

    Args:
        pair: a target, with a draft where the decoder needs one; for decoders that need none, pairs of one target share
            a profile.
        decoder: as for `measure`. What its probe tells apart (`CostProbe.detail`) has its own profile, such as every
            shape of heads.
        refresh: measure again, for instance because the machine was busy the last time, or the decoder has changed.
        sampling: greedy decoding, sampling, and sampling with top-k or top-p each have their own profile.

    Raises:
        ValueError: the pair does not suit the decoder.
    """
    if isinstance(decoder, str):
        decoder = build_decoder(decoder, pair)
    kind = CHAIN if decoder is None else decoder.cost_kind(sampling.greedy)
    label, ordered = "", True
    if decoder is None or kind == CHAIN:
        _require_draft(pair)
        decoder = None
    else:
        pair = _timed_pair(pair, decoder)
        probe = decoder.cost_probe()
        ordered = probe.fixed
        sections = probe.detail.values()
        label = f"{kind}-" + "".join(f"{name}_{value}-" for section in sections for name, value in section.items())
    arithmetic = arithmetic_of(sampling)
    path = cache_folder() / "latency" / f"{file_name(pair.name)[-60:]}-{label}{arithmetic}-{fingerprint(pair)}.json"
    if not refresh and path in _known:
        return _known[path]
    kept = None if refresh else _kept(path, ordered)
    if kept is None:
        _LOG.info("measuring the latency of %s (%s rounds, %s), once for this hardware", pair.name, kind, arithmetic)
        kept = measure(pair, decoder, sampling=sampling)
        _keep(kept, path, ordered)
    _known[path] = kept
    return kept


def _kept(path: Path, ordered: bool) -> LatencyProfile | None:
    """The profile in a file of the cache, if there is one to be trusted."""
    if not path.exists():
        return None
    try:
        profile = LatencyProfile.load(path)
    except LatencyProfileError as error:
        _LOG.warning("%s; doing so now", error)
        return None
    if clauses := contradictions(profile, ordered=ordered):
        _LOG.warning("the latency profile %s cannot be right (%s); measuring again now", path, "; ".join(clauses))
        return None
    if profile.uncertainty is None:
        _LOG.info("the latency profile %s does not say how sure it is; measuring again now", path)
        return None
    return smoothed(profile, ordered=ordered)


def _keep(profile: LatencyProfile, path: Path, ordered: bool) -> None:
    """Write a profile to the cache, unless it contradicts itself or was measured on a busy machine."""
    if contradictions(profile, ordered=ordered) or spread_of(profile) > MOST_SPREAD:
        _LOG.warning("the latency profile of %s is used now but not kept; a later run measures again", profile.pair)
        return
    try:
        profile.save(path)
        _LOG.info("latency profile of %s kept in %s", profile.pair, path)
    except OSError as error:
        _LOG.warning("cannot keep the latency profile in %s (%s); set SPECGYM_CACHE to a folder you own", path, error)


def _timed_pair(pair: Pair, decoder: Decoder[Any]) -> Pair:
    return pair if decoder.needs_draft else pair.without_draft()


def _require_draft(pair: Pair) -> None:
    if pair.draft is None:
        raise ArgumentError(
            f"a latency profile of chains needs a draft, and pair {pair.name} has none: give Pair(target, draft) or a "
            "pair's name, or time a decoder that needs none: measured(pair, 'lookahead') (--decoder lookahead on the "
            "command line)"
        )
    if len(drafts_of(pair.draft)) > 1:
        raise ArgumentError(
            f"a latency profile of chains times one draft, and pair {pair.name} has {len(drafts_of(pair.draft))}, each "
            "with costs of its own: name a pair with one of them"
        )


def _measure_chains(
    pair: Pair,
    longest: int,
    *,
    repeats: int,
    prompt: Sequence[int] | None,
    sampling: Sampling,
    time_limit: float,
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
) -> LatencyProfile:
    """Time rounds that draft chains; arguments as for `measure`."""
    prompt = list(prompt) if prompt is not None else repeating_prompt(pair)
    lengths = [0, *(2**power for power in range(longest.bit_length()) if 2**power < longest), longest]
    places = plan_grid(pair, len(prompt), longest, batch_sizes, contexts)
    profiles: list[LatencyProfile] = []
    for part in (places[:1], places[1:]):
        profiles += time_places(pair, part, prompt, lengths, sampling=sampling, repeats=repeats, time_limit=time_limit)
    return replace(profiles[0], points=tuple(profiles[1:]))
