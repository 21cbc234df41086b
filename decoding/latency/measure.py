"""Measuring a latency profile: live rounds at one operating point, and passes over batches for the others.

The profile is measured through the same rounds that decode text, once, and kept in specgym's cache folder.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..decoder import GREEDY
from ..decoders.autoregressive import AutoregressiveDecoder
from ..decoders.draft_tree import DraftTreeDecoder
from ..decoders.draft_tree.timing import measure_draft_tree, tree_timed
from ..decoders.lookahead.timing import measure_lookahead
from ..decoders.medusa import MedusaHeads, heads_for
from ..decoders.medusa.timing import heads_timed, measure_medusa
from ..decoders.speculative import require_positive
from ..decoders.threshold import ThresholdDecoder
from ..files import file_name
from ..loading.pair import Pair
from ..loading.smollm2 import cache_folder
from ..sampling import Sampling
from .batch_grid import measure_points, plan_grid
from .host import describe_hardware, fingerprint
from .interleaved import Timing, timed_models
from .profile import LatencyProfile, LatencyProfileError, arithmetic_of
from .repeated_rounds import EndlessText, medians, repeating_prompt, rotated, turns
from .round_kinds import CHAIN, DRAFT_TREE, LOOKAHEAD, OF_HEADS, largest_size, timed_as
from .stopwatch import StopwatchDrafter

_LOG = logging.getLogger(__name__)
_known: dict[Path, LatencyProfile] = {}


def measure(
    pair: Pair,
    *,
    rounds: str = CHAIN,
    max_draft_length: int | None = None,
    max_target_tokens: int | None = None,
    repeats: int = 40,
    prompt: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    time_limit: float = 40.0,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
    heads: MedusaHeads | str | Path | None = None,
    tree_decoder: DraftTreeDecoder | None = None,
) -> LatencyProfile:
    """Time live rounds of several sizes, and plain decoding, all interleaved.

    Each number is a median over the repeats, and a slow spell of the machine hits all numbers alike. The warm-up is
    left out, and an accelerator is synchronised. Chains are threshold decoding's because its verification contains
    that of speculative sampling; the two differ by the distance between the models, a small part of a target pass.
    Lookahead's rounds are timed as a whole, by the tokens that the target's pass reads (`latency_lookahead`); Medusa's
    by the heads that are asked and the tokens that the pass reads (`latency_medusa`); those with draft trees by the
    draft's passes and the tokens that the target's pass reads (`latency_draft_tree`).

    Live rounds are timed at batch size 1 and the prompt's length as the context. Other batch sizes and contexts become
    the profile's `points`, timed as `latency_grid.measure_points` tells; the grid always contains the live point.
    All rounds but chains are timed live at other contexts, and at no other batch size.

    Args:
        pair: a target with a draft, which for draft trees is a model; for Lookahead and Medusa the target is enough.
        rounds: what is timed: `chain`, `lookahead`, `medusa`, `medusa-typical`, which greedy is `medusa`, or
            `draft-tree`.
        max_draft_length: of chains, the longest draft timed, in tokens; by default 16.
        max_target_tokens: of Lookahead, Medusa and draft trees, the most tokens that a timed pass reads; by default
            160, 65 and 65, which is what the decoders read with their knobs as high as they go, or as many as there is
            room for.
        repeats: how often every size is timed.
        prompt: token ids to continue; by default ids that repeat themselves, so that prompt lookup has matches.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3; for the live rounds, and once more
            for the other points of chains together.
        batch_sizes: sequences decoded together, each 1 or more.
        contexts: tokens of each sequence that were read before, each 1 or more; by default the prompt's length alone.
        heads: of Medusa, as `MedusaDecoder` takes them; by default the usual ones of the target.
        tree_decoder: of draft trees, a decoder of this pair whose rule and guidance take part; by default the usual one
            of the pair.

    Raises:
        ValueError: the pair has no draft and one is needed, a number is not positive or does not belong to this kind of
            rounds, a batch is asked for where none can be timed, or a context leaves the models no room
            for the longest draft or the largest pass.
        MedusaHeadsError: the target has no heads, and Medusa's rounds are to be timed; the message says how to train
            some.
    """
    rounds = timed_as(rounds, sampling.greedy)
    longest = largest_size(rounds, max_draft_length, max_target_tokens)
    require_positive("repeats", repeats)
    _require_fitting(heads, tree_decoder, rounds)
    if rounds != CHAIN:
        if set(batch_sizes) - {1}:
            hint = "; for others compute a profile: specgym.decoding.latency.roofline.roofline(target, None, hardware, "
            raise ValueError(
                f"{rounds} rounds are timed at batch size 1 alone, got batch sizes {tuple(batch_sizes)}"
                + (f"{hint}rounds={rounds!r})" if rounds == LOOKAHEAD else "; leave them out")
            )
        # First of all, since a pair without a draft has none to time.
        like = tree_decoder or DraftTreeDecoder.usual(pair) if rounds == DRAFT_TREE else None
        timing = Timing.of(
            pair,
            rounds,
            repeats=repeats,
            prompt=prompt,
            sampling=sampling,
            time_limit=time_limit,
            contexts=contexts or (),
        )
        if rounds in OF_HEADS:
            return measure_medusa(timing, heads_for(pair.target, heads), max_target_tokens)
        if like is not None:
            return measure_draft_tree(timing, like, max_target_tokens)
        return measure_lookahead(timing, max_target_tokens)
    _require_chains(pair)
    assert pair.draft is not None
    prompt = list(prompt) if prompt is not None else repeating_prompt(pair)
    stopwatch = StopwatchDrafter(pair.draft)
    timed = Pair(pair.target, stopwatch, pair.tokenizer, name=pair.name)
    chains = EndlessText(ThresholdDecoder(timed, longest), prompt, sampling)
    plain = EndlessText(AutoregressiveDecoder(pair), prompt, sampling)
    lengths = [0, *(2**power for power in range(longest.bit_length()) if 2**power < longest), longest]
    places = plan_grid(pair, len(prompt), longest, batch_sizes, contexts or ())
    draft: defaultdict[int, list[float]] = defaultdict(list)
    target: defaultdict[int, list[float]] = defaultdict(list)
    autoregressive: list[float] = []
    for turn, counts in turns(repeats, time_limit):
        chains.restart()
        plain.restart()
        for length in rotated(lengths, turn):
            stopwatch.length = length
            cycle = chains.step()
            plainly = plain.step()
            if counts:
                draft[stopwatch.found].append(stopwatch.seconds)
                target[cycle.drafted + 1].append(cycle.verify_seconds)
                autoregressive.append(plainly.verify_seconds)
    profile = LatencyProfile(
        pair=pair.name,
        draft_seconds=medians(draft),
        target_seconds=medians(target),
        autoregressive_seconds=statistics.median(autoregressive),
        hardware=describe_hardware(pair),
        sampling=arithmetic_of(sampling),
        batch_size=1,
        context=len(prompt),
    )
    points = measure_points(pair, profile, places, lengths, sampling=sampling, repeats=repeats, time_limit=time_limit)
    return replace(profile, points=points)


def measured(
    pair: Pair,
    refresh: bool = False,
    *,
    sampling: Sampling = GREEDY,
    rounds: str = CHAIN,
    heads: MedusaHeads | str | Path | None = None,
    tree_decoder: DraftTreeDecoder | None = None,
) -> LatencyProfile:
    """The profile of a pair on this hardware: measured at the first call, then read from specgym's cache folder.

    Args:
        pair: a target with a draft; for Lookahead and Medusa the target is enough, and pairs of one target share a
            profile.
        refresh: measure again, for instance because the machine was busy the last time.
        sampling: greedy decoding, sampling, and sampling with top-k or top-p each have their own profile.
        rounds: what is timed, as for `measure`; each kind has its own profile.
        heads: of Medusa, as for `measure`; each shape of heads has its own profile.
        tree_decoder: of draft trees, as for `measure`; what stands beside the draft there is part of the profile.

    Raises:
        ValueError: the pair has no draft and one is needed, or there is no such kind of rounds.
        MedusaHeadsError: as for `measure`.
    """
    rounds = timed_as(rounds, sampling.greedy)
    _require_fitting(heads, tree_decoder, rounds)
    if rounds == CHAIN:
        _require_chains(pair)
    pair = timed_models(pair, rounds)
    beside: dict[str, object] = {}
    if rounds in OF_HEADS:
        heads = heads_for(pair.target, heads)
        beside = heads_timed(heads)
    if rounds == DRAFT_TREE:
        tree_decoder = tree_decoder or DraftTreeDecoder.usual(pair)
        beside = tree_timed(tree_decoder)
    kind = "" if rounds == CHAIN else f"{rounds}-" + "".join(f"{name}_{value}-" for name, value in beside.items())
    arithmetic = arithmetic_of(sampling)
    path = cache_folder() / "latency" / f"{file_name(pair.name)[-60:]}-{kind}{arithmetic}-{fingerprint(pair)}.json"
    if not refresh and path in _known:
        return _known[path]
    if not refresh and path.exists():
        try:
            _known[path] = LatencyProfile.load(path)
            return _known[path]
        except LatencyProfileError as error:
            _LOG.warning("%s; doing so now", error)
    _LOG.info("measuring the latency of %s (%s rounds, %s), once for this hardware", pair.name, rounds, arithmetic)
    profile = measure(pair, sampling=sampling, rounds=rounds, heads=heads, tree_decoder=tree_decoder)
    try:
        profile.save(path)
        _LOG.info("latency profile of %s kept in %s", pair.name, path)
    except OSError as error:
        _LOG.warning("cannot keep the latency profile in %s (%s); set SPECGYM_CACHE to a folder you own", path, error)
    _known[path] = profile
    return profile


def _require_chains(pair: Pair) -> None:
    if pair.draft is None:
        raise ValueError(
            f"a latency profile of chains needs a draft, and pair {pair.name} has none: give Pair(target, draft) or a "
            "pair's name, or time rounds that need none, with rounds='lookahead' or rounds='medusa' (--rounds "
            "lookahead or --rounds medusa on the command line)"
        )


def _require_fitting(heads: object, tree_decoder: object, rounds: str) -> None:
    if heads is not None and rounds not in OF_HEADS:
        raise ValueError(f"heads are for rounds='medusa', and the rounds are {rounds}; leave them out")
    if tree_decoder is not None and rounds != DRAFT_TREE:
        raise ValueError(f"a tree_decoder is for rounds='draft-tree', and the rounds are {rounds}; leave it out")
