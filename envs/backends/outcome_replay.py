"""Replay of outcomes: decoding with any setting of a decoder's knobs, from the recorded rounds of some settings.

A trace (`specgym.envs.backends.trace_replay`) knows what a draft proposes at every position, whatever the knobs.
Outcomes know only what came of the settings that were recorded, so what lies between them is made up of two parts:

* the *mean* over the prompts of each quantity, rounds, accepted tokens and divergence per emitted token, drafted tokens
  and seconds per round: the recorded mean at a setting that was recorded, and elsewhere a smooth surface over the knobs
  near all recorded means (`specgym.envs.backends.gaussian_process`). What a round costs has steps, which a surface
  rounds off;
* the *residual*: how a prompt differs from that mean. It is taken from one of the recorded settings nearest to the one
  asked for, drawn at random, the nearer the likelier; a setting that was recorded itself takes its own. All quantities
  take the same one, so that they stay correlated, and a hard prompt stays hard. Where fewer rounds are saved than at
  that setting, the prompt's saving shrinks in proportion, where more are saved its rounds do, so that there are never
  more rounds than tokens, and over all prompts the mean is the surface.

So: a recorded setting is replayed as it was recorded. At any other the tokens of a text are exact, as many as were
decoded at the setting that was drawn, and everything else is exact only on average, and only as far as the surface is
right, which `OutcomeReplay.leave_one_out` estimates for the speedup. There the number of rounds, and of tokens drafted
and accepted, need not be whole, and decoding one prompt twice with the same knobs gives results that differ, as much as
those of neighbouring settings do. What comes out is possible: a round emits what it accepted and, where the recorded
text did so, one token of the target's own.

Where all knobs are whole numbers there are few settings, and what is known of each is tabulated once. Where the
recorded settings say that nothing is drafted at a knob's low end, whatever the others are (a tree without levels, no
heads), all settings there are one: a smooth surface would round that step off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import Knob, LatencyProfile

from ..recordings.find import outcome_command
from ..recordings.outcomes import QUANTITIES, OutcomeError, Outcomes, OutcomeTotals, RecordedKnob, totals
from ..workloads import Workload
from .backend import Floats, Integers, ReplayBackend
from .gaussian_process import fitted, matern

_UNITS = {
    "rounds": "tokens",
    "drafted": "rounds",
    "accepted": "tokens",
    "total_variation": "tokens",
    "seconds": "rounds",
}
"""Unit per which each of `QUANTITIES` is interpolated. Per round, what is read and charged follows from the knobs
nearly alone, and is smoother than per token."""
_NEAREST = 4  # recorded settings, of which one lends its residuals
_TABULATED = 20_000  # settings at most; beyond that they are computed when asked for


@dataclass(frozen=True)
class SpeedupError:
    """Relative error of a workload's interpolated speedup where it was not recorded."""

    mean: float
    """Mean of the absolute relative error over the settings; 0.01 is one per cent."""
    worst: float
    """The largest."""


@dataclass(frozen=True)
class _Places:
    """Means and neighbours of some settings of a workload; arrays begin with the dimension of the settings."""

    means: Floats
    """Per token, shape (settings, quantities)."""
    near: Integers
    """The nearest recorded settings, shape (settings, nearest)."""
    shares: Floats
    """The probabilities of those, added up from the first, shape (settings, nearest)."""


class OutcomeReplay(ReplayBackend):
    """Outcomes of a decoder replayed, on one or several workloads. See `Backend`.

    Args:
        outcomes: of the same decoder with the same knobs between the same values, one a workload.
        profiles: what every workload's time is charged by, at the operating point.
        max_new_tokens: tokens decoded of each prompt, at most.
        workloads: what was recorded.
        knobs: of the decoder.

    Attributes:
        leave_one_out: how far off the speedup of each workload is at recorded settings, interpolated between all the
            others. `Surface.left_out` says what to make of it; settings that were recorded apart tell more (`means`).
        recorded: what each workload's recorded texts add up to.

    Raises:
        OutcomeError: fewer tokens were recorded, or the outcomes are not alike; the message says how to record others.
    """

    def __init__(
        self,
        outcomes: Sequence[Outcomes],
        profiles: Sequence[LatencyProfile],
        max_new_tokens: int,
        workloads: Sequence[Workload] = (),
        knobs: tuple[Knob, ...] = (),
    ) -> None:
        for recording in outcomes:
            require_tokens(recording, max_new_tokens)
        _require_alike(outcomes)
        counts = np.array([recording.prompts for recording in outcomes])
        super().__init__(workloads, profiles, knobs, list(map(np.arange, counts)), np.cumsum(counts) - counts)
        self._knobs = outcomes[0].info.knobs
        self._infos = [recording.info for recording in outcomes]
        self.recorded = [
            totals(recording, profile, max_new_tokens) for recording, profile in zip(outcomes, profiles, strict=True)
        ]
        self._settings = [recording.settings for recording in outcomes]
        self._plain = [
            _plain_ends(self._knobs, settings, sums.drafted.sum(1) == 0)
            for settings, sums in zip(self._settings, self.recorded, strict=True)
        ]
        self._surfaces = [
            {name: fitted(self._knobs, settings, sums.per(unit, name)) for name, unit in _UNITS.items()}
            for settings, sums in zip(self._settings, self.recorded, strict=True)
        ]
        self.leave_one_out = [
            _speedup_error(sums.per_token("seconds"), surfaces["rounds"].left_out * surfaces["seconds"].left_out)
            for sums, surfaces in zip(self.recorded, self._surfaces, strict=True)
        ]
        # The texts of all workloads one after another: those of a setting side by side, one for each prompt.
        self._counts = counts
        self._first_settings: Integers = np.cumsum([0, *map(len, self._settings)])[:-1]
        self._first_texts: Integers = np.cumsum([0, *(sums.tokens.size for sums in self.recorded)])[:-1]
        self._tokens = np.concatenate([sums.tokens.ravel() for sums in self.recorded])
        self._texts = np.concatenate([_columns(sums, ravelled=True) for sums in self.recorded])
        self._means = np.concatenate([_columns(sums, ravelled=False) for sums in self.recorded])
        self._lowest = np.array([knob.low for knob in self._knobs])
        self._sizes = tuple(int(knob.high - knob.low) + 1 for knob in self._knobs)
        self._table: _Places | None = None
        if all(knob.integer for knob in self._knobs) and math.prod(self._sizes) <= _TABULATED:
            grid = np.indices(self._sizes).reshape(len(self._sizes), -1).T + self._lowest
            self._table = _joined([self._places(number, grid) for number in range(len(outcomes))])

    def sums(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> dict[str, Floats]:
        """Return the sums of `Metrics` but `plain_seconds`, by name."""
        settings = np.stack([knobs[knob.name] for knob in self._knobs], axis=-1)
        places = self._looked_up(settings, workloads)
        which = (rng.random(len(prompts))[:, None] >= places.shares[:, :-1]).sum(1)
        near = np.take_along_axis(places.near, which[:, None], 1)[:, 0]
        text = self._first_texts[workloads] + near * self._counts[workloads] + prompts - self.first_prompts[workloads]
        usual, tokens = self._means[self._first_settings[workloads] + near], self._tokens[text]
        of_text, of_setting, expected = (
            dict(zip(QUANTITIES, columns.T, strict=True)) for columns in (self._texts[text], usual, places.means)
        )
        rounds = _rounds(tokens, of_text["rounds"], of_setting["rounds"], expected["rounds"])
        # A round may end without a token of the target's own, as the last one of a text that was cut does.
        without_own = of_text["accepted"] - (tokens - of_text["rounds"])
        accepted = np.minimum(np.maximum(tokens - rounds + without_own, 0.0), tokens)

        def per_round(name: str) -> Floats:
            recorded, usual, other = (sums[name] / sums["rounds"] for sums in (of_text, of_setting, expected))
            total: Floats = rounds * other * _ratio(recorded, usual)
            return total

        per_token = of_text["total_variation"] / tokens
        variation = tokens * expected["total_variation"] * _ratio(per_token, of_setting["total_variation"])
        return {
            "tokens": tokens,
            "rounds": rounds,
            "drafted": np.maximum(per_round("drafted"), accepted),
            "accepted": accepted,
            "total_variation": np.minimum(variation, tokens),
            "seconds": per_round("seconds"),
        }

    def means(self, workload: int, settings: Floats) -> dict[str, Floats]:
        """Return means of settings over all prompts, per emitted token: recorded, or interpolated.

        Args:
            workload: its place.
            settings: shape (settings, knobs), values in the order of the knobs.

        Returns:
            `QUANTITIES` by name, each of shape (settings,).
        """
        settings = self._settled(workload, settings)
        means = {name: surface(settings) for name, surface in self._surfaces[workload].items()}
        place, known = np.nonzero((settings[:, None] == self._settings[workload]).all(-1))
        for name, unit in _UNITS.items():
            if unit == "rounds":
                means[name] = means[name] * means["rounds"]
        for name, values in means.items():
            values[place] = self.recorded[workload].per_token(name)[known]
        return means

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Refuse ranges beyond the recorded ones, with the way out."""
        for knob in self._knobs:
            low, high = ranges[knob.name]
            if not knob.low <= low <= high <= knob.high:
                info = self._infos[0]
                raise OutcomeError(
                    f"{knob.name} goes from {low:g} to {high:g}, and {info} were recorded from {knob.low:g} to "
                    f"{knob.high:g}; give narrower ranges (or a smaller max_draft_length, if that limits the knob), or "
                    f"record others: {outcome_command(info.workload, info.decoder)}"
                )

    def _looked_up(self, settings: Floats, workloads: Integers) -> _Places:
        """Look up the setting of every text, settings of shape (texts, knobs)."""
        if self._table is not None:
            steps = tuple(np.rint(settings - self._lowest).astype(np.int64).T)
            row = np.ravel_multi_index(steps, self._sizes) + workloads * math.prod(self._sizes)
            return _Places(self._table.means[row], self._table.near[row], self._table.shares[row])
        if len(self._settings) == 1:
            return self._places(0, settings)
        parts, order = [], []
        for workload in np.unique(workloads):
            members = np.flatnonzero(workloads == workload)
            parts.append(self._places(int(workload), settings[members]))
            order.append(members)
        joined, back = _joined(parts), np.argsort(np.concatenate(order))
        return _Places(joined.means[back], joined.near[back], joined.shares[back])

    def _settled(self, workload: int, settings: Floats) -> Floats:
        """Replace settings that draft nothing by one that was recorded; same shape (settings, knobs)."""
        settled = settings.copy()
        for column, setting in self._plain[workload].items():
            settled[settings[:, column] == self._knobs[column].low] = setting
        return settled

    def _places(self, workload: int, settings: Floats) -> _Places:
        known, settings = self._settings[workload], self._settled(workload, settings)
        distances = self._surfaces[workload]["rounds"].scale.distances(settings, known)
        near = np.argsort(distances, axis=1, kind="stable")[:, :_NEAREST]
        weights = matern(np.take_along_axis(distances, near, 1)) + 1e-12  # also where all are far
        recorded = (settings == known[near[:, 0]]).all(1)
        weights[recorded, 1:] = 0.0
        if near.shape[1] < _NEAREST:  # fewer were recorded than are asked of other workloads
            missing = ((0, 0), (0, _NEAREST - near.shape[1]))
            near, weights = np.pad(near, missing), np.pad(weights, missing)
        shares = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
        means = self.means(workload, settings)
        return _Places(np.stack([means[name] for name in QUANTITIES], axis=1), near, shares)


def _plain_ends(knobs: Sequence[RecordedKnob], settings: Floats, undrafted: NDArray[np.bool_]) -> dict[int, Floats]:
    """By the place of a knob a recorded setting at its low end, where no setting that was recorded there drafts.

    One such setting alone proves nothing: another knob may be why it drafts nothing.
    """
    ends = {place: settings[:, place] == knob.low for place, knob in enumerate(knobs) if knob.integer}
    return {place: settings[there][0] for place, there in ends.items() if there.sum() > 1 and undrafted[there].all()}


def _ratio(of_text: Floats, of_setting: Floats) -> Floats:
    """Compare texts with the mean of their setting; 1 where that is 0, which says nothing of how texts differ."""
    none = of_setting == 0
    return np.where(none, 1.0, of_text / (of_setting + none))


def _rounds(tokens: Floats, of_text: Floats, of_setting: Floats, expected: Floats) -> Floats:
    """Return the rounds of texts with another setting than the recorded one.

    Args:
        tokens: of each text, shape (texts,), like the rest.
        of_text: rounds that were recorded.
        of_setting: mean rounds per token of the recorded setting.
        expected: mean rounds per token of the other setting.
    """
    saved, expected_saved = 1 - of_setting, 1 - np.minimum(expected, 1.0)
    shrunk = tokens - (tokens - of_text) * expected_saved / np.where(saved > 0, saved, 1.0)
    fewer: Floats = np.where(expected_saved <= saved, shrunk, of_text * np.minimum(expected, 1.0) / of_setting)
    return fewer


def require_tokens(outcomes: Outcomes, tokens: int) -> None:
    """Raise OutcomeError if the recorded texts are shorter than so many tokens."""
    info = outcomes.info
    if tokens > info.tokens:
        raise OutcomeError(
            f"max_new_tokens is {tokens}, and {info} have texts of {info.tokens} tokens; ask for fewer, or record "
            f"longer ones: {outcome_command(info.workload, info.decoder)} with --tokens {tokens}"
        )


def _require_alike(outcomes: Sequence[Outcomes]) -> None:
    first = outcomes[0].info
    for info in (recording.info for recording in outcomes):
        if (info.decoder, info.knobs, info.draft_length) != (first.decoder, first.knobs, first.draft_length):
            again = outcome_command(info.workload, info.decoder)
            raise OutcomeError(f"{info} and {first} are of other decoders, knobs or ranges; record them alike: {again}")


def _columns(sums: OutcomeTotals, ravelled: bool) -> Floats:
    """Stack the quantities as columns: of every text, or of every setting per token."""
    return np.stack([getattr(sums, name).ravel() if ravelled else sums.per_token(name) for name in QUANTITIES], 1)


def _joined(parts: Sequence[_Places]) -> _Places:
    return _Places(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("means", "near", "shares")))


def _speedup_error(recorded: Floats, interpolated: Floats) -> SpeedupError:
    """Compare seconds per token; a speedup is another number over them."""
    off = np.abs(recorded / interpolated - 1)
    return SpeedupError(float(off.mean()), float(off.max()))
