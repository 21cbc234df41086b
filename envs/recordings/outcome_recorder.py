"""Recording outcomes: every prompt of a workload decoded with a designed set of settings of a decoder's knobs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import (
    Decoder,
    DecoderTraits,
    Knob,
    LatencyProfile,
    Round,
    Split,
    build_decoder,
    decoder_names,
    traits_of,
    write_json,
)

from ..profiles import profile_of
from ..tuning.knobs import env_ranges
from ..workloads import Workload, workload
from .outcome_design import design
from .outcome_refinement import fastest
from .outcomes import COUNTS, OutcomeError, OutcomeInfo, Outcomes, RecordedKnob
from .resumable_parts import claim_parts, parts_of, provenance_of, write_part

Integers = NDArray[np.int64]
_REFINED_AT_A_TIME = 6


@dataclass(frozen=True)
class OutcomeSettings:
    """How much is recorded, and of which decoder.

    Raises:
        OutcomeError: a number is out of range, or the decoder is not known by name.
    """

    decoder: str = "lookahead"
    """Name of a registered decoder."""
    settings: int = 48
    """Settings of the knobs; fewer where there are not as many. The decoder's default and its presets come first."""
    refine: int = 0
    """Settings beyond those, a few at a time where the recorded ones say that decoding is fastest."""
    prompts: int = 12
    """Prompts of the split, at most; the first ones."""
    tokens: int = 64
    """Decoded of each prompt with each setting, at most."""
    draft_length: int = 16
    """K, for a decoder that drafts tokens one after another."""
    seed: int = 0
    """Of the design and of all sampling."""

    def __post_init__(self) -> None:
        if self.decoder not in decoder_names():
            raise OutcomeError(f"no decoder {self.decoder!r} can be recorded; there are: {', '.join(decoder_names())}")
        for name in ("prompts", "tokens", "draft_length"):
            if getattr(self, name) < 1:
                raise OutcomeError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "refine"):
            if getattr(self, name) < 0:
                raise OutcomeError(f"{name} must be at least 0, got {getattr(self, name)}")
        least = len(self._given(self.traits.knobs_without_pair(**self.options)))
        if self.settings < least:
            raise OutcomeError(
                f"settings must be at least {least}, the default of {self.decoder} and its presets, got {self.settings}"
            )

    @property
    def traits(self) -> type[DecoderTraits]:
        """What is known of the decoder without a pair."""
        return traits_of(self.decoder)

    @property
    def options(self) -> dict[str, Any]:
        """Build options of the decoder."""
        return self.traits.accepted_options(max_draft_length=self.draft_length)

    @property
    def knobs(self) -> tuple[RecordedKnob, ...]:
        """The knobs that the decoder has whatever the target, between what values environments move them."""
        return recorded_knobs(self.traits.knobs_without_pair(**self.options))

    def designed(self, knobs: Sequence[Knob] | None = None) -> NDArray[np.float64]:
        """The settings to record, shape (settings, knobs).

        Args:
            knobs: of the decoder at work, whose target may have more or fewer Medusa heads than usual; by default those
                without a pair.
        """
        own = self.traits.knobs_without_pair(**self.options) if knobs is None else knobs
        return design(recorded_knobs(own), self.settings, self._given(own), self.seed)

    def _given(self, knobs: Sequence[Knob]) -> list[tuple[float, ...]]:
        default = tuple(float(knob.default) for knob in knobs)
        presets = (
            tuple(float(preset.get(knob.name, knob.default)) for knob in knobs)
            for preset in self.traits.presets.values()
        )
        return list(dict.fromkeys((default, *presets)))


def recorded_knobs(knobs: Sequence[Knob]) -> tuple[RecordedKnob, ...]:
    """A decoder's knobs, between what values environments move them."""
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
    """Decode a workload's prompts with many settings, and write what came of it.

    Args:
        name: a workload; its pair needs a draft if the decoder does.
        split: whose prompts to take.
        path: the file to write, ending in ``.npz``. Finished texts are kept beside it, in ``<path>.parts``, until all
            are; called again, a recording goes on from there.
        settings: how much to record.
        progress: show a progress bar.
        profile: what decoding is charged by, to know where it is fastest; by default the pair's reference profile.

    Raises:
        TraceError: the parts found are those of another recording; the message says in what it differs.
        ValueError: the pair does not suit the decoder, or has no Medusa heads for it. Loading errors as for `load_pair`
            and `load_prompts`.
    """
    settings = settings or OutcomeSettings()
    found, path = workload(name).with_split(split), Path(path)
    decoder = build_decoder(settings.decoder, found.load(), **settings.options)
    prompts = found.prompt_ids()[: settings.prompts]
    info, chosen = _info(found, split, settings, prompts, decoder), settings.designed(decoder.knobs)
    parts = parts_of(path)
    claim_parts(parts, {**asdict(info), **asdict(settings)})
    if settings.refine and profile is None:
        profile = profile_of(found, None, replayed=True, decoder=settings.decoder).at()
    bar = tqdm(
        total=(len(chosen) + settings.refine) * len(prompts),
        desc=f"{found} {split} {settings.decoder}",
        unit="text",
        disable=not progress,
    )
    wanted, done = len(chosen) + settings.refine, 0
    while True:
        for number, place in itertools.product(range(done, len(chosen)), range(len(prompts))):
            part = _part(parts, number, place)
            if not part.is_file():
                seed = int(np.random.SeedSequence((settings.seed, number, place)).generate_state(1)[0])
                write_part(part, _decoded(decoder, found, chosen[number], prompts[place], settings.tokens, seed))
            bar.update()
        done = len(chosen)
        outcomes = _joined(info, chosen, [_part(parts, *text) for text in np.ndindex(done, len(prompts))])
        if done >= wanted:
            break
        assert profile is not None
        more = _refined(parts, outcomes, profile, min(_REFINED_AT_A_TIME, wanted - done))
        if not len(more):
            break
        chosen = np.concatenate([chosen, more])
    bar.close()
    outcomes.save(path)
    shutil.rmtree(parts)
    return Outcomes.load(path)


def _refined(parts: Path, outcomes: Outcomes, profile: LatencyProfile, count: int) -> NDArray[np.float64]:
    """The next settings to record. They are kept, since a recording that goes on may have another profile."""
    file = parts / f"refined-{len(outcomes.settings):04}.json"
    if not file.is_file():
        write_json(file, fastest(outcomes, profile, count).tolist())
    return np.array(json.loads(file.read_text(encoding="utf-8")))


def _part(parts: Path, number: int, place: int) -> Path:
    return parts / f"{number:04}-{place:04}.npz"


def _decoded(
    decoder: Decoder, found: Workload, setting: NDArray[np.float64], prompt: Sequence[int], tokens: int, seed: int
) -> dict[str, NDArray[np.generic]]:
    """The rounds of one text."""
    knobs = {knob.name: value for knob, value in zip(decoder.knobs, setting.tolist(), strict=True)}
    rounds: list[Round] = decoder.generate(
        prompt, max_new_tokens=tokens, sampling=found.sampling, seed=seed, knobs=knobs
    ).rounds
    emitted = np.array([len(cycle.tokens) for cycle in rounds])
    others = {name: np.array([getattr(cycle, name) for cycle in rounds]) for name in COUNTS[1:]}
    return {"emitted": emitted, **others, "divergence": np.array([cycle.divergence for cycle in rounds], np.float32)}


def _joined(info: OutcomeInfo, settings: NDArray[np.float64], parts: Sequence[Path]) -> Outcomes:
    texts = [dict(np.load(part)) for part in parts]
    columns = {name: np.concatenate([text[name] for text in texts]) for name in (*COUNTS, "divergence")}
    starts = np.concatenate([[0], np.cumsum([len(text["emitted"]) for text in texts])])
    return Outcomes(info, settings, starts, **columns)


def _info(
    found: Workload, split: Split, settings: OutcomeSettings, prompts: Sequence[Sequence[int]], decoder: Decoder
) -> OutcomeInfo:
    return OutcomeInfo(
        **provenance_of(found, split, prompts, settings.traits.needs_draft),
        decoder=settings.decoder,
        knobs=recorded_knobs(decoder.knobs),
        fingerprint=dict(decoder.fingerprint()),
        draft_length=settings.draft_length if settings.traits.drafts_chains() else 0,
        tokens=settings.tokens,
        seed=settings.seed,
    )
