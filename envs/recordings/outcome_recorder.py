"""Recorder of outcomes: every prompt of a workload decoded with a designed set of settings of a decoder's knobs.

A design spreads settings over all the ranges, and leaves few for the corner in which the fastest lie. There a surface
through the others may be off by more than the fastest differ from one another, so more can be recorded there.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import (
    Decoder,
    DecoderTraits,
    Knob,
    LatencyProfile,
    Split,
    build_decoder,
    check_fields,
    decoder_names,
    read_sealed,
    seed_number,
    traits_of,
    whole_number,
    write_sealed,
)

from ..backends.outcome_replay import OutcomeReplay
from ..profiles import profile_of
from ..tuning.knob_space import env_ranges
from ..workloads import Workload, workload
from .archive import claim_parts, parts_of, provenance_of, read_part, write_part
from .find import is_traced
from .outcomes import COUNTS, OutcomeError, OutcomeInfo, Outcomes, RecordedKnob

Floats = NDArray[np.float64]
_REFINED = "specgym-refined-1"
_REFINED_AT_A_TIME = 6
_POINTS = 64  # of the sequence, drawn at a time
_WIDE = 8  # a whole-number knob of a larger range is spread by its logarithm
_CORNERS_SHARE = 4  # corners are left out where they would be more than one in so many settings
_COMPARED = 20_000  # settings at most: all there are, or so many that are spread over the ranges
_MOST_SETTINGS = 100_000


@dataclass(frozen=True)
class OutcomeSettings:
    """Decoder to record, and amount of what is recorded.

    Raises:
        OutcomeError: a number is out of range, or the decoder is not known by name.
    """

    decoder: str = field(default_factory=lambda: next(name for name in decoder_names() if not is_traced(name)))
    """Registered name of the decoder; by default the first that traces cannot replay."""
    settings: int = 48
    """Settings of the knobs; fewer where there are not as many. The decoder's default and its presets come first."""
    refine: int = 0
    """Settings beyond those, a few at a time where the recorded ones say that decoding is fastest."""
    prompts: int = 12
    """Prompts of the split, at most; the first ones."""
    tokens: int = 64
    """Tokens decoded of each prompt with each setting, at most."""
    draft_length: int = 16
    """Longest draft (K), in tokens, for a decoder that drafts chains."""
    seed: int = 0
    """Seed of the design and of all sampling."""

    def __post_init__(self) -> None:
        if self.decoder not in decoder_names():
            raise OutcomeError(f"no decoder {self.decoder!r} can be recorded; there are: {', '.join(decoder_names())}")
        whole = partial(whole_number, error=OutcomeError)
        check_fields(self, whole, "prompts", "tokens", "draft_length")
        check_fields(self, partial(whole, at_least=0, at_most=_MOST_SETTINGS), "refine")
        check_fields(self, partial(seed_number, error=OutcomeError), "seed")
        least, hint = len(self._always(self.usual_knobs)), f"{self.decoder}'s default and its presets are among them"
        check_fields(self, partial(whole, at_least=least, at_most=_MOST_SETTINGS, hint=hint), "settings")

    @property
    def traits(self) -> type[DecoderTraits]:
        """Traits of the decoder."""
        return traits_of(self.decoder)

    @property
    def options(self) -> dict[str, Any]:
        """Build options of the decoder."""
        return self.traits.accepted_options(max_draft_length=self.draft_length)

    @property
    def usual_knobs(self) -> tuple[Knob, ...]:
        """Knobs that the decoder has whatever the target."""
        return self.traits.knobs_without_pair(**self.options)

    @property
    def knobs(self) -> tuple[RecordedKnob, ...]:
        """`usual_knobs` with the ranges in which environments move them."""
        return recorded_knobs(self.usual_knobs)

    def designed(self, knobs: Sequence[Knob] | None = None) -> Floats:
        """Return the settings to record, shape (settings, knobs).

        Args:
            knobs: of the decoder at work, whose ranges may depend on the target; by default `usual_knobs`.
        """
        present = self.usual_knobs if knobs is None else knobs
        return design(recorded_knobs(present), self.settings, self._always(present), self.seed)

    def _always(self, knobs: Sequence[Knob]) -> list[tuple[float, ...]]:
        """The default and the presets, in the order of the knobs."""
        default = {knob.name: float(knob.default) for knob in knobs}
        presets = (
            default | {name: value for name, value in preset.items() if name in default}
            for preset in self.traits.presets.values()
        )
        return list(dict.fromkeys(tuple(map(float, setting.values())) for setting in (default, *presets)))


def recorded_knobs(knobs: Sequence[Knob]) -> tuple[RecordedKnob, ...]:
    """Return a decoder's knobs with the ranges in which environments move them."""
    ranges = env_ranges(knobs)
    return tuple(RecordedKnob(knob.name, *ranges[knob.name], knob.integer) for knob in knobs)


def record_outcomes(
    name: str | Workload,
    split: Split,
    path: str | Path,
    settings: OutcomeSettings | None = None,
    progress: bool = False,
    profile: LatencyProfile | None = None,
) -> Outcomes:
    """Decode a workload's prompts with many settings, and write the outcomes.

    Args:
        name: a workload; its pair needs a draft if the decoder does.
        split: of the prompts.
        path: the file to write, ending in ``.npz``. Finished texts are kept beside it, in ``<path>.parts``, until all
            are; called again, a recording goes on from there.
        settings: how much to record.
        progress: show a progress bar.
        profile: charges decoding, to know where it is fastest; by default the pair's reference profile.

    Raises:
        TraceError: the parts found are those of another recording; the message says in what it differs.
        ValueError: the pair does not suit the decoder. Loading errors as for `load_pair` and `load_prompts`.
    """
    settings = settings or OutcomeSettings()
    named, path = workload(name).with_split(split), Path(path)
    decoder = build_decoder(settings.decoder, named.load(), **settings.options)
    prompts = named.prompt_ids()[: settings.prompts]
    info, chosen = _info(named, split, settings, prompts, decoder), settings.designed(decoder.knobs)
    parts = parts_of(path)
    claim_parts(parts, {**asdict(info), **asdict(settings)})
    if settings.refine and profile is None:
        profile = profile_of(named, None, replayed=True, decoder=settings.decoder).at()
    bar = tqdm(
        total=(len(chosen) + settings.refine) * len(prompts),
        desc=f"{named} {split} {settings.decoder}",
        unit="text",
        disable=not progress,
    )
    total, done = len(chosen) + settings.refine, 0
    while True:
        for number, place in itertools.product(range(done, len(chosen)), range(len(prompts))):
            part = _part(parts, number, place)
            if not part.is_file():
                seed = int(np.random.SeedSequence((settings.seed, number, place)).generate_state(1)[0])
                write_part(part, _decoded(decoder, named, chosen[number], prompts[place], settings.tokens, seed))
            bar.update()
        done = len(chosen)
        outcomes = _joined(info, chosen, [_part(parts, *text) for text in np.ndindex(done, len(prompts))])
        if done >= total:
            break
        assert profile is not None
        more = _refined(parts, outcomes, profile, min(_REFINED_AT_A_TIME, total - done))
        if not len(more):
            break
        chosen = np.concatenate([chosen, more])
    bar.close()
    outcomes.save(path)
    shutil.rmtree(parts)
    return Outcomes.load(path)


def _refined(parts: Path, outcomes: Outcomes, profile: LatencyProfile, count: int) -> Floats:
    """Choose the next settings to record. They are kept, since a recording that goes on may have another profile."""
    file = parts / f"refined-{len(outcomes.settings):04}.json"
    if not file.is_file():
        write_sealed(file, {"format": _REFINED, "settings": fastest(outcomes, profile, count).tolist()})
    try:
        return np.array(read_sealed(file, _REFINED)["settings"])
    except (OSError, ValueError, KeyError) as error:
        raise OutcomeError(f"{file} is damaged ({error}); remove it, and the recording goes on without it") from error


def _part(parts: Path, number: int, place: int) -> Path:
    return parts / f"{number:04}-{place:04}.npz"


def _decoded(
    decoder: Decoder[Any], named: Workload, setting: Floats, prompt: Sequence[int], tokens: int, seed: int
) -> dict[str, NDArray[np.generic]]:
    """Decode a text, and return its rounds."""
    knobs = {knob.name: value for knob, value in zip(decoder.knobs, setting.tolist(), strict=True)}
    rounds = decoder.generate(prompt, max_new_tokens=tokens, sampling=named.sampling, seed=seed, knobs=knobs).rounds
    emitted = np.array([len(round_.tokens) for round_ in rounds])
    others = {name: np.array([getattr(round_, name) for round_ in rounds]) for name in COUNTS[1:]}
    return {"emitted": emitted, **others, "divergence": np.array([round_.divergence for round_ in rounds], np.float32)}


def _joined(info: OutcomeInfo, settings: Floats, parts: Sequence[Path]) -> Outcomes:
    texts = [read_part(part) for part in parts]
    columns = {name: np.concatenate([text[name] for text in texts]) for name in (*COUNTS, "divergence")}
    starts = np.concatenate([[0], np.cumsum([len(text["emitted"]) for text in texts])])
    return Outcomes(info, settings, starts, **columns)


def _info(
    named: Workload, split: Split, settings: OutcomeSettings, prompts: Sequence[Sequence[int]], decoder: Decoder[Any]
) -> OutcomeInfo:
    return OutcomeInfo(
        **provenance_of(named, split, prompts, decoder.needs_draft),
        decoder=settings.decoder,
        knobs=recorded_knobs(decoder.knobs),
        fingerprint=dict(decoder.fingerprint()),
        draft_length=settings.draft_length if decoder.drafts_chains() else 0,
        tokens=settings.tokens,
        seed=settings.seed,
    )


def design(knobs: Sequence[RecordedKnob], count: int, always: Sequence[Sequence[float]], seed: int) -> Floats:
    """Design settings to record: given ones, the corners of the ranges, then a scrambled Sobol sequence over them.

    Sobol's points leave no region empty, however many are taken. Without the corners, a surface through the settings
    would have to guess there, and the best setting is often at an end. Whole-number knobs are rounded, every number
    alike; those of a wide range by their logarithm, since one column or token more matters the less the more there are.
    What occurs twice is replaced by the sequence's next points.

    Args:
        knobs: with their ranges.
        count: how many settings, at least as many as are given; all there are if those are fewer.
        always: settings that are among them, values in the order of the knobs; moved into the ranges, each taken once.
        seed: of the scrambling.

    Returns:
        Shape (settings, knobs), in the knobs' own units.
    """
    low, high = (np.array([getattr(knob, end) for knob in knobs]) for end in ("low", "high"))
    integer = np.array([knob.integer for knob in knobs])
    chosen = dict.fromkeys(tuple(np.clip(setting, low, high).tolist()) for setting in always)
    if integer.all() and count >= np.prod(high - low + 1):
        ranges = [range(int(knob.low), int(knob.high) + 1) for knob in knobs]
        chosen |= dict.fromkeys(tuple(map(float, setting)) for setting in itertools.product(*ranges))
        return np.array(list(chosen))
    if 2 ** len(knobs) * _CORNERS_SHARE <= count:
        chosen |= dict.fromkeys(itertools.product(*zip(low.tolist(), high.tolist(), strict=True)))
    wide = integer & (high - low > _WIDE)
    # The first powers of two of the sequence are the even ones, so that the given settings come on top of its start.
    sequence = torch.quasirandom.SobolEngine(len(knobs), scramble=True, seed=seed)
    while len(chosen) < count:
        points = sequence.draw(_POINTS, dtype=torch.float64).numpy()
        points = np.where(wide, ((high - low + 2) ** points - 1) / (high - low + 1), points)
        spread = np.where(integer, np.floor(low + points * (high - low + 1)), low + points * (high - low))
        for setting in np.minimum(spread, high).tolist():
            if len(chosen) < count:
                chosen.setdefault(tuple(setting))
    return np.array(list(chosen))


def fastest(outcomes: Outcomes, profile: LatencyProfile, count: int) -> Floats:
    """Return settings that were not recorded, those first that would decode fastest.

    Args:
        outcomes: recorded so far.
        profile: charges the rounds.
        count: how many settings, at most; fewer where all others were recorded.

    Returns:
        Shape (settings, knobs), in the knobs' own units.
    """
    knobs = outcomes.info.knobs
    number = min(_COMPARED, math.prod(knob.high - knob.low + 1 if knob.integer else math.inf for knob in knobs))
    candidates = design(knobs, int(number), [], outcomes.info.seed)
    known = set(map(tuple, outcomes.settings.tolist()))
    fresh = np.array([tuple(setting) not in known for setting in candidates.tolist()])
    candidates = candidates[fresh]
    seconds = OutcomeReplay([outcomes], [profile], outcomes.info.tokens).means(0, candidates)["seconds"]
    return candidates[np.argsort(seconds, kind="stable")[:count]]
