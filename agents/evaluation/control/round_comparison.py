"""The comparison of ways to set a decoder's knobs: chosen on training prompts, judged live on test prompts.

Throughput is relative to plain decoding: all tokens over all seconds, in units of plain decoding's seconds per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from specgym.decoding import (
    Decoder,
    FollowAcceptance,
    KnobRule,
    LatencyProfile,
    Split,
    TextRequest,
    build_decoder,
    generate_texts,
)
from specgym.envs import Outcomes, TraceError, Workload, find_recording, totals, workload

from ..live import whole_numbers
from ..results import ALL, LEARNED, PLAIN, Column, Row
from .method_rows import Derived, MethodRows, Samples
from .side_by_side import Decoded

if TYPE_CHECKING:
    from ...experiments.control.round_knobs_settings import RoundKnobSettings

DEFAULT, FIXED, ADAPTIVE = "default", "fixed", "adaptive"
METHODS = (PLAIN, DEFAULT, FIXED, ADAPTIVE, LEARNED)
OVER_FIXED, OVER_ADAPTIVE = "learned / fixed", "learned / adaptive"
ADAPTIVE_OVER_FIXED = "adaptive / fixed"
TABLE = (
    (
        *(Column("throughput", method, ".3f", method not in (PLAIN, DEFAULT), (method,)) for method in METHODS),
        Column(OVER_FIXED, "learned\n/ fixed", ".3f", True, (LEARNED,)),
        Column(OVER_ADAPTIVE, "learned\n/ adaptive", ".3f", True, (LEARNED,)),
        Column(ADAPTIVE_OVER_FIXED, "adaptive\n/ fixed", ".3f", True, (ADAPTIVE,)),
    ),
    ("throughput",),
)
"""Columns of the comparison, and those that are compared with a stored one."""
CAPTION = (
    "Tokens over charged seconds, relative to plain decoding, of test prompts decoded live. Default is the decoder's "
    "own setting; fixed the best setting on the training prompts, of the recorded ones where there are some; adaptive "
    "the best rule there between that and another setting, by the tokens that recent rounds brought. Learned is the "
    "mean over the seeds. ± is half a 95 % interval over prompts, and for learned policies over seeds."
)
_SWEEPS: Final = 2
_BEST: Final = 3
"""Settings that the best is paired with for adaptive rules: the next best ones."""
_BANDS: Final = ((1.0, 2.0), (1.0, 4.0), (2.0, 4.0))
"""Tokens a round between which an adaptive rule goes from one setting to the other."""
_ROUNDS: Final = (4, 16)
_TOGETHER: Final = 32
"""Texts decoded at the same time."""

Setting = dict[str, float]
Tried = dict[tuple[float, ...], float]
"""Throughputs of settings, by their values in the decoder's order."""
Knobs = Mapping[str, float] | KnobRule


@dataclass(frozen=True)
class LivePrompts:
    """Prompts of a workload, to be decoded live with any knobs.

    Attributes:
        decoder: on the workload's pair.
        profile: what time is charged by.
        named: the workload, whose sampling counts.
        prompts: token ids.
        tokens: of each text, at most.
        passes: over the prompts.
        decision_seconds: charged for every round of a rule.
    """

    decoder: Decoder[Any]
    profile: LatencyProfile
    named: Workload
    prompts: Sequence[Sequence[int]]
    tokens: int
    passes: int
    decision_seconds: float = 0.0

    def decode(self, several: Sequence[Knobs]) -> list[Decoded]:
        """Decode every prompt with all settings and rules, and return what each brought, in order."""
        requests = [
            TextRequest(self.decoder, prompt, self.tokens, self.named.sampling, 10_000 * number + place, knobs)
            for knobs in several
            for number in range(self.passes)
            for place, prompt in enumerate(self.prompts)
        ]
        texts = generate_texts(requests, batch_size=_TOGETHER)
        decided = [self.decision_seconds * isinstance(request.knobs, KnobRule) for request in requests]
        sums = np.array(
            [
                (
                    len(text.tokens),
                    self.profile.charge(text.rounds) + seconds * len(text.rounds),
                    sum(round_.drafted for round_ in text.rounds),
                    sum(round_.accepted for round_ in text.rounds),
                    len(text.rounds),
                )
                for text, seconds in zip(texts, decided, strict=True)
            ],
            np.float64,
        )
        sums[:, 1] /= self.profile.autoregressive_seconds
        by_prompt = sums.reshape(len(several), self.passes, len(self.prompts), -1).sum(1)
        return [Decoded(*columns.T) for columns in by_prompt]

    def throughputs(self, several: Sequence[Knobs]) -> list[float]:
        """Throughput with each of some settings and rules, relative to plain decoding."""
        return [decoded.throughput for decoded in self.decode(several)]


def compare_rounds(
    settings: RoundKnobSettings,
    learned: Sequence[KnobRule],
    profiles: Sequence[LatencyProfile],
    report: Callable[[str], None],
) -> list[Row]:
    """Choose the simpler ways on training prompts, decode the test prompts with all, and return the rows of a table.

    Args:
        settings: of the run.
        learned: the policies.
        profiles: of each workload.
        report: called with what is being done.
    """
    rows = MethodRows(_ratios, (), len(learned), settings.comparison.resamples)
    for name, profile in zip(settings.workloads, profiles, strict=True):
        train, test = (_prompts(settings, name, profile, split) for split in ("train", "test"))
        report(f"{name}: the best fixed setting, by training prompts")
        tried = recorded_settings(train) or swept_settings(train, settings.comparison.levels)
        fixed = _named(train.decoder, max(tried, key=tried.__getitem__))
        report(f"{name}: the best adaptive rule, by training prompts")
        adaptive = best_adaptive(train, fixed, tried)
        report(f"{name}: test prompts")
        default, with_fixed, with_adaptive, *with_learned = test.decode([{}, fixed, adaptive, *learned])
        methods = {DEFAULT: [default], FIXED: [with_fixed], ADAPTIVE: [with_adaptive], LEARNED: with_learned}
        decoder = test.decoder
        rules = {
            DEFAULT: _words(decoder, decoder.resolve_knobs()),
            FIXED: _words(decoder, fixed),
            ADAPTIVE: f"{_words(decoder, adaptive.few)} at {adaptive.low:g} tokens a round to "
            f"{_words(decoder, adaptive.many)} at {adaptive.high:g}, mean of {adaptive.rounds}",
            LEARNED: LEARNED,
        }
        rows.add(name, rules, methods, rows.resampled(len(test.prompts)))
    return rows.rows()


def _prompts(settings: RoundKnobSettings, name: str, profile: LatencyProfile, split: Split) -> LivePrompts:
    named, comparison = workload(name), settings.comparison
    decoder = build_decoder(settings.decoder, named.load())
    decoder.charge_by(profile)
    most = comparison.training_prompts if split == "train" else comparison.prompts
    passes = 1 if named.sampling.greedy else comparison.passes
    prompts = named.prompt_ids(split)[:most]
    return LivePrompts(decoder, profile, named, prompts, settings.max_new_tokens, passes, settings.decision_seconds)


def recorded_settings(prompts: LivePrompts) -> Tried:
    """Throughputs of the settings whose outcomes are recorded; empty where no recording of the prompts ships that fits.

    Args:
        prompts: whose workload and split count; all recorded prompts do.
    """
    decoder, named = prompts.decoder, prompts.named
    try:
        outcomes, _ = find_recording(decoder.name, None, named.name, named.split)
    except TraceError:
        return {}
    if not isinstance(outcomes, Outcomes) or outcomes.info.tokens < prompts.tokens:
        return {}
    seconds = totals(outcomes, prompts.profile, prompts.tokens).per_token("seconds")
    names = [knob.name for knob in outcomes.info.knobs]
    settings = [dict(zip(names, values, strict=True)) for values in outcomes.settings.tolist()]
    reached = (prompts.profile.autoregressive_seconds / seconds).tolist()
    return {tuple(decoder.resolve_knobs(setting).values()): x for setting, x in zip(settings, reached, strict=True)}


def swept_settings(prompts: LivePrompts, levels: int) -> Tried:
    """Throughputs of settings that are decoded live, knob by knob from the best of the decoder's own.

    Args:
        prompts: to decode.
        levels: values of a knob that are tried, at most, spread evenly over its search range (`Knob.at_share`).
    """
    decoder, tried = prompts.decoder, Tried()

    def best_of(settings: Sequence[Mapping[str, float]]) -> Setting:
        values = [tuple(decoder.resolve_knobs(setting).values()) for setting in settings]
        new = [value for value in dict.fromkeys(values) if value not in tried]
        named = [_named(decoder, value) for value in new]
        tried.update(zip(new, prompts.throughputs(named) if named else [], strict=True))
        return _named(decoder, max(values, key=tried.__getitem__))

    ranges = {knob.name: (knob.low, knob.high) for knob in decoder.knobs}
    presets = [
        preset
        for preset in decoder.presets.values()
        if all(name in ranges and ranges[name][0] <= value <= ranges[name][1] for name, value in preset.items())
    ]
    best = best_of([{}, *presets])
    for _ in range(_SWEEPS):
        for knob in decoder.knobs:
            places = [knob.at_share(share) for share in np.linspace(0, 1, levels)]
            values = {round(place) if knob.integer else place for place in places} | {best[knob.name]}
            best = best_of([{**best, knob.name: value} for value in sorted(values)])
    return tried


def best_adaptive(prompts: LivePrompts, fixed: Setting, tried: Tried) -> FollowAcceptance:
    """Find the best rule between two settings: the best that stays, and another of the best, in either order.

    Args:
        prompts: by which it is chosen.
        fixed: the best setting that stays.
        tried: throughputs of settings.
    """
    decoder = prompts.decoder
    order = sorted(tried, key=tried.__getitem__, reverse=True)
    others = [setting for value in order if (setting := _named(decoder, value)) != fixed][:_BEST] or [fixed]
    pairs = chain.from_iterable(((fixed, other), (other, fixed)) for other in others)
    rules = [FollowAcceptance(few, many, *_BANDS[0], _ROUNDS[0]) for few, many in pairs]
    first = _best_of(prompts, rules)
    return _best_of(
        prompts,
        [FollowAcceptance(first.few, first.many, *band, rounds) for band, rounds in product(_BANDS, _ROUNDS)],
    )


def round_verdict(rows: Sequence[Row]) -> str:
    """Say in words whether following the text paid, and whether learning did."""
    methods = {row.method: row for row in rows if row.workload == ALL}
    reached = {method: methods[method].values["throughput"] for method in (FIXED, ADAPTIVE, LEARNED)}
    learned = methods[LEARNED]
    low, high = learned.intervals[OVER_FIXED]
    sentence = (
        f"Learned knobs have {learned.values[OVER_FIXED]:.3f} times the throughput of the best fixed setting "
        f"({low:.3f} to {high:.3f}) and {learned.values[OVER_ADAPTIVE]:.3f} times that of the best adaptive rule. "
    )
    if low > 1 and reached[LEARNED] >= reached[ADAPTIVE]:
        return sentence + "Knobs that follow the text pay, and learning them does."
    best = max(reached, key=lambda method: reached[method])
    wins = "does as well" if low <= 1 <= high else "wins"
    words = {
        FIXED: f"The simpler way {wins}: a fixed setting, chosen on training prompts.",
        ADAPTIVE: f"The simpler way {wins}: the adaptive rule, chosen on training prompts.",
        LEARNED: "That is within what prompts and seeds scatter: a fixed setting does as well.",
    }
    return sentence + words[best]


def _best_of(prompts: LivePrompts, rules: Sequence[FollowAcceptance]) -> FollowAcceptance:
    return rules[int(np.argmax(prompts.throughputs(rules)))]


def _named(decoder: Decoder[Any], values: tuple[float, ...]) -> Setting:
    return {knob.name: value for knob, value in zip(decoder.knobs, values, strict=True)}


def _words(decoder: Decoder[Any], setting: Mapping[str, float]) -> str:
    numbers = whole_numbers(decoder.knobs, decoder.resolve_knobs(setting)).values()
    return f"({', '.join(f'{value:g}' for value in numbers)})"


def _ratios(reached: Mapping[str, Samples]) -> Derived:
    """Ratios of the methods that follow the text to simpler ones."""
    learned, adaptive, fixed = (reached[method] for method in (LEARNED, ADAPTIVE, FIXED))
    return {
        (LEARNED, OVER_FIXED): learned / fixed,
        (LEARNED, OVER_ADAPTIVE): learned / adaptive,
        (ADAPTIVE, ADAPTIVE_OVER_FIXED): adaptive / fixed,
    }
