import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgym.decoding.latency.probe import (
    MOST_SPREAD,
    Uncertainty,
    contradictions,
    measured_together,
    measured_with_care,
    relative_spread,
    smoothed,
    standard_error,
    warn_of_spread,
)
from specgym.decoding.latency.profile import LatencyProfile

QUIET = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99]
BUSY = [1.0, 1.9, 1.0, 2.1, 1.1, 1.8, 1.0, 2.0]
PROFILE = LatencyProfile("toy", {0: 0.0, 1: 0.2, 4: 0.8}, {1: 1.05, 2: 1.1, 5: 1.3}, 1.0, {"device": "imaginary"})


def sure(profile: LatencyProfile, error: float = 0.001, spread: float = 0.05) -> LatencyProfile:
    """The profile with the same error of every number."""
    draft, target = (dict.fromkeys(table, error) for table in (profile.draft_seconds, profile.target_seconds))
    return replace(profile, uncertainty=Uncertainty(draft, target, error, spread))


ZERO_FASTER = sure(replace(PROFILE, autoregressive_seconds=1.17))
FALLING = sure(replace(PROFILE, target_seconds={1: 1.05, 2: 1.4, 5: 1.2}))
UNQUIET = sure(PROFILE, spread=0.4)
WITHIN_NOISE = sure(replace(PROFILE, target_seconds={1: 1.0, 2: 0.95, 5: 1.3}, autoregressive_seconds=1.02))


def test_the_spread_of_samples_tells_a_busy_machine_from_a_quiet_one() -> None:
    assert relative_spread(QUIET) < MOST_SPREAD < relative_spread(BUSY)
    assert relative_spread([3.0]) == 0


def test_one_slow_spell_is_no_busy_machine() -> None:
    assert relative_spread([*QUIET, 30.0]) < MOST_SPREAD


def test_more_samples_are_surer_and_few_are_never_sure() -> None:
    assert standard_error(QUIET * 8) < standard_error(QUIET) < standard_error(BUSY)
    assert standard_error([1.0, 1.0, 1.0]) > 0.05
    assert standard_error([2.0]) > 0.1


def test_samples_make_an_uncertainty() -> None:
    uncertainty = Uncertainty.of({1: QUIET}, {2: BUSY, 1: BUSY}, QUIET)
    assert list(uncertainty.target) == [1, 2]
    assert uncertainty.autoregressive == standard_error(QUIET)
    assert uncertainty.spread == relative_spread(BUSY)


@pytest.mark.parametrize("profile", [PROFILE, sure(PROFILE), WITHIN_NOISE, UNQUIET])
def test_consistent_times_are_not_contradicted(profile: LatencyProfile) -> None:
    assert contradictions(profile) == []


def test_a_round_without_a_draft_is_not_faster_than_plain_decoding() -> None:
    (clause,) = contradictions(ZERO_FASTER)
    assert clause == "a round that drafts nothing takes 1.05e+03 ms, and a step of plain decoding 1.17e+03 ms"
    assert contradictions(replace(ZERO_FASTER, uncertainty=None)) == [clause]
    assert contradictions(sure(ZERO_FASTER, error=0.1)) == []


def test_a_larger_pass_is_not_cheaper() -> None:
    (clause,) = contradictions(FALLING)
    assert clause == "a pass over 5 tokens takes 1.2e+03 ms, and a pass over 2 1.4e+03 ms"
    assert contradictions(sure(FALLING, error=0.1)) == []
    assert contradictions(FALLING, ordered=False) == []


def test_a_draft_that_is_small_beside_a_plain_step_may_fall() -> None:
    assert contradictions(replace(PROFILE, draft_seconds={0: 0.0, 8: 0.02, 16: 0.01})) == []
    assert contradictions(replace(PROFILE, draft_seconds={0: 0.0, 8: 1.0, 16: 0.5})) != []


def test_points_are_judged_too() -> None:
    grid = replace(PROFILE, context=10, points=(replace(ZERO_FASTER, batch_size=4, context=10),))
    (clause,) = contradictions(grid)
    assert clause.endswith("at batch size 4 and context 10")
    assert len(smoothed(grid).doubts) == 1


def test_noise_is_smoothed() -> None:
    result = smoothed(WITHIN_NOISE)
    assert result.target_seconds == {1: 1.02, 2: 1.02, 5: 1.3}
    assert result.doubts == ()
    assert smoothed(result) == result


def test_a_sound_profile_is_left_as_it_is() -> None:
    assert smoothed(PROFILE) == PROFILE
    assert smoothed(sure(PROFILE)) == sure(PROFILE)


def test_what_contradicted_itself_is_told_after_smoothing() -> None:
    result = smoothed(ZERO_FASTER)
    assert result.round(0) == pytest.approx(result.autoregressive_seconds)
    assert list(result.doubts) == contradictions(ZERO_FASTER) == contradictions(result)


def test_a_decoder_of_which_nothing_is_known_may_take_longer_for_fewer_tokens() -> None:
    assert smoothed(FALLING, ordered=False).target_seconds == FALLING.target_seconds


def test_drafting_beside_the_pass_is_no_excuse() -> None:
    together = replace(PROFILE, overlaps=True, draft_seconds={0: 0.5}, target_seconds={1: 0.99, 2: 1.2})
    assert smoothed(together).round(0) == pytest.approx(1.0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 10), st.floats(0, 1))
def test_smoothed_times_never_fall_and_never_beat_plain_decoding(
    seconds: list[float], plain: float, nothing: float
) -> None:
    result = smoothed(
        replace(
            PROFILE,
            draft_seconds={0: nothing},
            target_seconds=dict(enumerate(seconds, 1)),
            autoregressive_seconds=plain,
        )
    )
    values = list(result.target_seconds.values())
    assert all(first <= second + 1e-12 for first, second in pairwise(values))
    assert result.round(0) >= plain * (1 - 1e-9)


def measurements(*profiles: LatencyProfile) -> Iterator[LatencyProfile]:
    yield from profiles


@pytest.mark.parametrize("bad", [ZERO_FASTER, FALLING, UNQUIET])
def test_a_bad_measurement_is_made_again(bad: LatencyProfile, caplog: pytest.LogCaptureFixture) -> None:
    rest = measurements(bad, sure(PROFILE), ZERO_FASTER)
    with caplog.at_level(logging.WARNING):
        assert measured_with_care(rest.__next__, tries=3) == sure(PROFILE)
    assert next(rest) is ZERO_FASTER
    assert caplog.text == ""


def test_after_a_few_tries_the_best_one_is_returned_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rest = measurements(ZERO_FASTER, UNQUIET, sure(PROFILE, spread=0.9), sure(PROFILE))
    assert measured_with_care(rest.__next__, tries=3) == UNQUIET
    assert "busy machine" in caplog.text
    assert "--refresh-latency" in caplog.text


def test_a_contradiction_that_stays_is_told_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    result = measured_with_care(lambda: ZERO_FASTER, tries=2)
    assert result.doubts
    assert "cannot be right: a round that drafts nothing" in caplog.text
    assert "measured(pair, refresh=True)" in caplog.text


def test_only_a_busy_machine_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_spread(PROFILE)
    warn_of_spread(sure(PROFILE))
    assert caplog.text == ""
    warn_of_spread(UNQUIET)
    assert "spans 40 % of their median" in caplog.text


def test_the_uncertainty_is_kept_in_files_and_old_files_lack_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    smoothed(ZERO_FASTER).save(path)
    assert LatencyProfile.load(path) == smoothed(ZERO_FASTER)
    PROFILE.save(path)
    assert "uncertainty" not in path.read_text()
    assert LatencyProfile.load(path).uncertainty is None


def test_the_uncertainty_belongs_to_one_operating_point() -> None:
    here, there = (replace(sure(PROFILE, error), context=10, batch_size=size) for size, error in ((1, 0.1), (3, 0.2)))
    grid = replace(here, points=(there,))
    assert grid.at(batch_size=3).uncertainty == there.uncertainty
    assert grid.at(batch_size=2).uncertainty is None


def test_profiles_of_one_measurement_are_judged_together(caplog: pytest.LogCaptureFixture) -> None:
    tries = [(sure(PROFILE), FALLING), (FALLING, FALLING), (sure(PROFILE), sure(PROFILE, 0.002))]
    rest = iter(tries)
    assert measured_together(rest.__next__, tries=3) == [sure(PROFILE), sure(PROFILE, 0.002)]
    assert next(rest, None) is None
    with caplog.at_level(logging.WARNING):
        measured_together(lambda: (FALLING, FALLING), tries=1)
    assert caplog.text.count("a pass over 5 tokens takes") == 1  # what both share is said once
