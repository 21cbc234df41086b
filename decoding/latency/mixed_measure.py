"""Measured mixed profiles: passes of the target and of every draft of a pair, interleaved, and kept on disk.

All drafts, the target and plain decoding are timed turn by turn, so that a slow spell of the machine hits all alike.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..decoder import synchronise
from ..decoders.autoregressive import AutoregressiveDecoder
from ..decoders.chain import SpeculativeDecoder
from ..decoders.threshold import ThresholdDecoder
from ..drafts.drafter import Drafter, DraftSession, Proposal, is_free
from ..drafts.eagle.drafter import EagleDrafter
from ..drafts.mixed import MixedDraftSession, draft_models, drafts_of
from ..errors import ArgumentError, number, whole_number
from ..files import cache_folder, file_name
from ..loading.pair import Pair, require_draft
from ..models.captured import MOST_TOKENS
from ..models.early_exit import ExitModel
from ..sampling import GREEDY, Sampling
from .batch_grid import StopwatchDrafter
from .interleaved import (
    EndlessText,
    describe_hardware,
    fingerprint,
    growth_of,
    repeating_prompt,
    rotated,
    turns,
    typical,
)
from .measure import LONGEST_DRAFT, REPEATS
from .mixed_profile import DraftCosts, MixedProfile
from .probe import MOST_SPREAD, TRIES, Uncertainty, measured_together, spread_of
from .profile import LatencyProfile, LatencyProfileError, arithmetic_of

READINGS = (1, 2, 4, 8, 16, 32, 64)
"""Unread tokens that drafts are timed with."""
_LOG = logging.getLogger(__name__)
_known: dict[Path, MixedProfile] = {}


def measure_mixed(
    pair: Pair,
    *,
    max_draft_length: int | None = None,
    repeats: int | None = None,
    prompt: Sequence[int] | None = None,
    sampling: Sampling = GREEDY,
    time_limit: float = 40.0,
    tries: int = TRIES,
) -> MixedProfile:
    """Time the drafts of a pair, passes of its target, and plain decoding, all interleaved.

    A draft is timed through the session that drafts live, from the same place of a text again and again: it reads so
    many unread tokens and proposes one. The target's passes verify drafts of the first draft that is a model (and, if
    there is another, no early exit), or else of the first. Machines that are busy are treated as by
    `specgym.decoding.measure`.

    Args:
        pair: a target with a draft, or several.
        max_draft_length: tokens of the longest draft that is verified, by default 16.
        repeats: how often every size is timed, by default 40 times.
        prompt: token ids to continue; by default ids that repeat themselves, so that copying drafts have matches.
        sampling: drawing tokens costs more than taking the likeliest.
        time_limit: seconds after which fewer repeats have to do, but at least 3, in every try.
        tries: measurements at most, where the machine is busy.

    Raises:
        ArgumentError: the pair has no draft, a number is out of range, or a draft proposes nothing after the prompt.
    """
    require_draft(pair, "a mixed latency profile")
    measure_once = partial(
        _measure_once,
        pair,
        whole_number("max_draft_length", LONGEST_DRAFT if max_draft_length is None else max_draft_length),
        repeats=whole_number("repeats", REPEATS if repeats is None else repeats),
        prompt=repeating_prompt(pair) if prompt is None else AutoregressiveDecoder(pair).check_prompt(prompt),
        sampling=sampling,
        time_limit=number("time_limit", time_limit, at_least=0),
    )
    with pair.capturing(after=1):
        profiles = measured_together(measure_once, tries=whole_number("tries", tries))
    first = profiles[0]
    return MixedProfile(
        pair=pair.name,
        drafts=tuple(
            DraftCosts(draft.name, is_free(draft), {size: time for size, time in profile.draft_seconds.items() if size})
            for draft, profile in zip(drafts_of(pair.draft), profiles, strict=True)
        ),
        target_seconds=first.target_seconds,
        autoregressive_seconds=first.autoregressive_seconds,
        hardware=first.hardware,
        sampling=first.sampling,
        context=first.context,
        spread=max(map(spread_of, profiles)),
        doubts=tuple(dict.fromkeys(doubt for profile in profiles for doubt in profile.doubts)),
    )


def measured_mixed(pair: Pair, refresh: bool = False, *, sampling: Sampling = GREEDY) -> MixedProfile:
    """Return the mixed profile of a pair on this hardware: measured at the first call, then read from the cache folder.

    One that contradicts itself, or was measured on a busy machine, is used but not kept.

    Args:
        pair: a target with a draft, or several.
        refresh: measure again, for instance because the machine was busy the last time.
        sampling: greedy decoding, sampling, and sampling with top-k or top-p each have their own profile.

    Raises:
        ArgumentError: the pair has no draft.
    """
    require_draft(pair, "a mixed latency profile")
    kind = f"mixed-{MOST_TOKENS}-{arithmetic_of(sampling)}"
    path = cache_folder() / "latency" / f"{file_name(pair.name)[-60:]}-{kind}-{fingerprint(pair)}.json"
    if refresh or path not in _known:
        _known[path] = (None if refresh else _kept(path)) or _measured_now(pair, path, sampling)
    return _known[path]


def _kept(path: Path) -> MixedProfile | None:
    if not path.exists():
        return None
    try:
        return MixedProfile.load(path)
    except LatencyProfileError as error:
        _LOG.warning("%s; doing so now", error)
        return None


def _measured_now(pair: Pair, path: Path, sampling: Sampling) -> MixedProfile:
    _LOG.info("measuring the latency of %s and all its drafts, once for this hardware", pair.name)
    profile = measure_mixed(pair, sampling=sampling)
    if profile.doubts or profile.spread > MOST_SPREAD:
        _LOG.warning("the latency profile of %s is used now but not kept; a later run measures again", pair.name)
        return profile
    try:
        profile.save(path)
        _LOG.info("latency profile of %s kept in %s", pair.name, path)
    except OSError as error:
        _LOG.warning("cannot keep the latency profile in %s (%s); set SPECGYM_CACHE to a folder you own", path, error)
    return profile


def _measure_once(
    pair: Pair,
    longest: int,
    *,
    repeats: int,
    prompt: Sequence[int],
    sampling: Sampling,
    time_limit: float,
) -> list[LatencyProfile]:
    """Time everything once; a profile for each draft, whose drafting is reading so many tokens and proposing one."""
    drafts = drafts_of(pair.draft)
    # What a verification costs that goes on from an early exit's states is no measure of those of other drafts.
    models = sorted(
        (draft for draft in drafts if draft_models(draft) or isinstance(draft, EagleDrafter)),
        key=lambda draft: any(isinstance(model, ExitModel) for model in draft_models(draft)),
    )
    stopwatch = StopwatchDrafter((models or drafts)[0])
    timed = Pair(pair.target, stopwatch, pair.tokenizer, name=pair.name)
    growth = growth_of(pair) if pair.target.restores_states else None  # otherwise a text ends with its turn
    verified = EndlessText(ThresholdDecoder(timed, longest, "never"), prompt, sampling, growth=growth)
    plain = EndlessText(AutoregressiveDecoder(pair), prompt, sampling, growth=growth)
    session = SpeculativeDecoder(pair).start(prompt, max_new_tokens=2**20, sampling=sampling, seed=0)
    if any(isinstance(draft, EagleDrafter) for draft in drafts):  # its target has read what a head reads in one pass
        session.target.read(_followed(prompt)[len(prompt) - 1 :])
    live = session.draft
    sessions = live.sessions if isinstance(live, MixedDraftSession) else (live,)
    readers = [
        _Reader(draft, session, prompt, pair.target.device) for draft, session in zip(drafts, sessions, strict=True)
    ]
    # The longest pass that is captured, too: behind it a pass takes longer at once, and what lies between is linear.
    sizes = {0, longest, *(2**power for power in range(longest.bit_length())), MOST_TOKENS - 1}
    lengths = sorted(length for length in sizes if length <= longest)
    readings: list[defaultdict[int, list[float]]] = [defaultdict(list) for _ in drafts]
    target: defaultdict[int, list[float]] = defaultdict(list)
    autoregressive: list[float] = []
    for turn, counts in turns(repeats, time_limit):
        if growth is None:
            verified.restart()
            plain.restart()
        for length in rotated(lengths, turn):
            stopwatch.length = length
            round_, plain_round = verified.step(), plain.step()
            if counts:
                target[round_.drafted + 1].append(round_.verify_seconds)
                autoregressive.append(plain_round.verify_seconds)
        for reader, seconds in zip(readers, readings, strict=True):
            for size in rotated(reader.sizes, turn):
                taken, _ = reader.read(size)
                if counts:
                    seconds[size].append(taken)
    return [
        LatencyProfile(
            pair=pair.name,
            draft_seconds={0: 0.0, **typical(seconds, pair.target)},
            target_seconds=typical(target, pair.target),
            autoregressive_seconds=statistics.median(autoregressive),
            hardware=describe_hardware(pair),
            sampling=arithmetic_of(sampling),
            context=len(prompt),
            uncertainty=Uncertainty.of(seconds, target, autoregressive),
        )
        for seconds in readings
    ]


def _followed(prompt: Sequence[int]) -> list[int]:
    """A prompt and what is read behind it, which is the prompt again."""
    following = READINGS[-1] - 1
    return [*prompt, *(list(prompt) * (following // len(prompt) + 1))[:following]]


class _Reader:
    """A draft at the end of a prompt, which reads what follows there again and again."""

    def __init__(self, draft: Drafter, session: DraftSession, prompt: Sequence[int], device: torch.device) -> None:
        self._session = session
        self._device = device
        self._prompt = list(prompt)
        self._context = _followed(prompt)
        self.sizes = [size for size in READINGS if self.read(size)[1]]
        if not self.sizes:
            if not is_free(draft):
                raise ArgumentError(
                    f"draft {draft.name} proposes nothing after the prompt of {len(prompt)} tokens that it is timed on"
                    "; give another"
                )
            self.sizes = list(READINGS)  # a look-up that finds nothing takes its time, too

    def read(self, size: int) -> tuple[float, bool]:
        """Seconds of reading so many tokens and proposing one, and whether one was proposed."""
        self._propose(self._prompt)
        self._session.truncate(len(self._prompt) - 1)
        context = self._context[: len(self._prompt) - 1 + size]
        synchronise(self._device)
        started = time.perf_counter()
        proposed = self._propose(context)
        return time.perf_counter() - started, proposed

    def _propose(self, context: Sequence[int]) -> bool:
        steps = list(self._session.steps(context, 1))
        Proposal.of(steps, self._device)  # it belongs to a draft's time
        synchronise(self._device)
        return bool(steps)
