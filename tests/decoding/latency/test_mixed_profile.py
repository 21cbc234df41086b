"""Profiles of pairs with several drafts: what they say between measured numbers, files, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specgym.decoding import BINS, LEVELS, DraftCosts, KeepChances, LatencyProfileError, MixedProfile
from specgym.decoding.latency.profile import LatencyProfile
from tests.helpers.made_up_mixed import made_up_costs, made_up_mixed


@pytest.fixture
def profile() -> MixedProfile:
    return made_up_costs(made_up_mixed())


def test_seconds_between_and_beyond_measured_numbers_are_linear(profile: MixedProfile) -> None:
    steep = replace(profile, drafts=(DraftCosts("m", False, {1: 0.1, 4: 0.4, 8: 0.6}),))
    assert steep.reading(0, 1) == 0.1
    assert steep.reading(0, 2) == pytest.approx(0.2)
    assert steep.reading(0, 6) == pytest.approx(0.5)
    assert steep.reading(0, 12) == pytest.approx(0.8)
    assert steep.target(2) == pytest.approx(1.02)
    with pytest.raises(ValueError, match="at least 1 tokens, got 0"):
        steep.reading(0, 0)


def test_a_profile_is_read_back_as_it_was_written(profile: MixedProfile, tmp_path: Path) -> None:
    busy = replace(profile, spread=0.1, doubts=("a doubt",), hardware={"device": "cpu"}, sampling="sampled")
    busy.save(tmp_path / "m.json")
    assert MixedProfile.load(tmp_path / "m.json") == busy


def test_chances_are_written_with_the_profile_and_counted_ones_are_kept(profile: MixedProfile, tmp_path: Path) -> None:
    first, second = (KeepChances(np.full((LEVELS, BINS), kept), np.full(LEVELS, kept)) for kept in (0.25, 0.75))
    assert (profile.chances == KeepChances.assumed().exact).all()
    counted = profile.with_chances([first, None, None, None])
    assert counted.chances[:, 0].tolist() == [0.25, *profile.chances[1:, 0]]
    counted.with_chances([second] * 4).save(tmp_path / "m.json")
    assert MixedProfile.load(tmp_path / "m.json").chances[:, -1].tolist() == [0.25, 0.75, 0.75, 0.75]


def test_a_profile_of_other_drafts_is_refused(profile: MixedProfile) -> None:
    names = tuple(draft.name for draft in profile.drafts)
    assert profile.require_drafts(names) is profile
    with pytest.raises(LatencyProfileError, match=r"of the drafts model-0, model-1, .* charged are to be model-1"):
        profile.require_drafts(names[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda profile: replace(profile, drafts=()), "toy has no draft"),
        (lambda profile: DraftCosts("m", False, {}), "reading_seconds must have an entry"),
        (lambda profile: DraftCosts("m", False, {0: 0.1}), "none below 1 tokens"),
        (lambda profile: DraftCosts("m", False, {1: 0.0}), "seconds are finite and positive"),
        (lambda profile: DraftCosts("m", 1, {1: 0.1}), "is free or not, got 'm' and 1"),  # type: ignore[arg-type]
        (lambda profile: replace(profile, target_seconds={1: float("nan")}), r"target_seconds\[1\]"),
        (lambda profile: replace(profile, autoregressive_seconds=0.0), "autoregressive_seconds"),
        (lambda profile: replace(profile, context=0), "context"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(
    profile: MixedProfile, make: Callable[[MixedProfile], object], message: str
) -> None:
    with pytest.raises(LatencyProfileError, match=message):
        make(profile)


def test_a_profile_of_one_draft_is_no_mixed_one(profile: MixedProfile, tmp_path: Path) -> None:
    LatencyProfile("toy", {0: 0.0}, {1: 1.0}, 1.0, {}).save(tmp_path / "single.json")
    with pytest.raises(
        LatencyProfileError, match=re.escape("single.json is not a mixed latency profile of this version")
    ):
        MixedProfile.load(tmp_path / "single.json")
    profile.save(tmp_path / "mixed.json")
    with pytest.raises(LatencyProfileError, match=re.escape("mixed.json is not a latency profile of this version")):
        LatencyProfile.load(tmp_path / "mixed.json")
    with pytest.raises(LatencyProfileError, match=r"there is no mixed latency profile .*envs\.profiles"):
        MixedProfile.load(tmp_path / "missing.json")
