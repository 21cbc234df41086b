"""Around where a policy rests the best recorded setting is found, by the training prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from specgym.agents import KnobSettings, default_settings
from specgym.agents.export import recommend as nearby
from specgym.agents.export.knob_policy import KnobRange
from specgym.agents.export.recommend import FEWEST, REACH, best_nearby
from specgym.decoding import traits_of
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.outcomes import Outcomes, OutcomeTotals, outcomes_name, totals
from specgym.envs.tuning.knob_space import default_scales, env_ranges
from tests.helpers.small_runs import record_little, target_alone

TOKENS = 12


@pytest.fixture(scope="module")
def name(small_workloads: tuple[str, str]) -> str:
    return target_alone(small_workloads)[0]


@pytest.fixture(scope="module")
def settings(name: str, tmp_path_factory: pytest.TempPathFactory) -> KnobSettings:
    folder = record_little("lookahead", [name], tmp_path_factory.mktemp("outcomes"), settings=18)
    usual = default_settings("lookahead", workloads=(name,))
    return replace(usual, environment=replace(usual.environment, recordings=folder, max_new_tokens=TOKENS))


@pytest.fixture(scope="module")
def profile() -> LatencyProfile:
    """A token more in a pass costs a twentieth of a pass over one."""
    return LatencyProfile("toy", {0: 0.0}, {1: 0.010, 160: 0.0895}, 0.010, {}, kind="lookahead")


@pytest.fixture(scope="module")
def recorded(settings: KnobSettings, name: str) -> Outcomes:
    assert settings.environment.recordings is not None
    return Outcomes.load(settings.environment.recordings / outcomes_name(name, "lookahead", "train"))


def ranges() -> list[KnobRange]:
    knobs = traits_of("lookahead").knobs_without_pair()
    ends = env_ranges(knobs)
    steps = default_scales(knobs, ends)
    return [
        KnobRange(knob.name, *ends[knob.name], knob.default, steps[knob.name], knob.integer, knob.logarithmic)
        for knob in knobs
    ]


def moves(item: Sequence[float], other: Sequence[float]) -> float:
    """Moves of the agent from a setting to another, in the knob that takes most."""
    window = abs(math.log2(item[0] / other[0])) / 0.4
    guesses = abs(math.log2((1 + item[2]) / (1 + other[2]))) / (math.log2(17) / 10)
    return max(window, abs(item[1] - other[1]) / 0.4, guesses)


def test_from_every_recorded_setting_the_fastest_within_reach_or_of_the_nearest_dozen_is_found(
    settings: KnobSettings, name: str, profile: LatencyProfile, recorded: Outcomes
) -> None:
    seconds = totals(recorded, profile, TOKENS).per_token("seconds").tolist()
    settings_recorded = recorded.settings.tolist()
    moved = stayed = beyond = 0
    for place, mine in zip(settings_recorded, seconds, strict=True):
        away = [moves(place, other) for other in settings_recorded]
        reach = max(REACH, sorted(away)[FEWEST - 1]) + 1e-6
        least = min(spent for distance, spent in zip(away, seconds, strict=True) if distance <= reach)
        rest = dict(zip(("window", "ngram", "guesses"), place, strict=True))
        result = best_nearby(settings, name, rest, ranges(), profile)
        values = list(result.values())
        assert moves(place, values) <= reach
        assert seconds[settings_recorded.index(values)] == pytest.approx(least)  # several may be as fast
        assert all(type(value) is int for value in values)
        moved += least < mine
        stayed += values == place
        beyond += moves(place, values) > REACH + 1e-6
    assert min(moved, beyond) > 2
    assert stayed


def test_around_a_place_that_was_not_recorded_a_recorded_setting_is_recommended(
    settings: KnobSettings, name: str, profile: LatencyProfile, recorded: Outcomes
) -> None:
    rest = {"window": 7, "ngram": 3, "guesses": 9}
    assert list(rest.values()) not in recorded.settings.tolist()
    result = best_nearby(settings, name, rest, ranges(), profile)
    assert list(map(float, result.values())) in recorded.settings.tolist()


def test_where_no_outcomes_were_replayed_the_policy_has_the_last_word(
    settings: KnobSettings, name: str, profile: LatencyProfile
) -> None:
    live = replace(settings, environment=replace(settings.environment, backend="live", recordings=None))
    rest = {"window": 16, "ngram": 6, "guesses": 16}
    assert best_nearby(settings, name, rest, ranges(), profile) != rest
    assert best_nearby(live, name, rest, ranges(), profile) == rest


def test_with_a_bound_on_the_divergence_only_what_keeps_it_is_recommended(
    settings: KnobSettings, name: str, profile: LatencyProfile, recorded: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearby, "REACH", 100.0)
    astray = 0.01

    def straying(result: Outcomes, charged: LatencyProfile, tokens: int) -> OutcomeTotals:
        """The more guesses, the further from the target."""
        sums = totals(result, charged, tokens)
        return replace(sums, total_variation=sums.tokens * (astray + result.settings[:, 2:] / 16))

    monkeypatch.setattr(nearby, "totals", straying)
    spent = totals(recorded, profile, TOKENS).per_token("seconds").tolist()
    seconds = dict(zip(map(tuple, recorded.settings.tolist()), spent, strict=True))
    for bound in (0.1, 0.3):
        bounded = SimpleNamespace(
            replayed=True,
            decoder=settings.decoder,
            environment=settings.environment,
            build=settings.build,
            traits=settings.traits,
            reward=replace(settings.reward, max_divergence=bound),
        )
        rest = {"window": 16, "ngram": 6, "guesses": 16}  # it does not keep the bound itself
        result = best_nearby(bounded, name, rest, ranges(), profile)  # type: ignore[arg-type]
        keeping = [spent for setting, spent in seconds.items() if astray + setting[2] / 16 <= bound]
        assert astray + result["guesses"] / 16 <= bound
        assert seconds[tuple(map(float, result.values()))] == pytest.approx(min(keeping))
    bounded.reward = replace(settings.reward, max_divergence=0.0)  # nothing keeps it: the policy has the last word
    assert best_nearby(bounded, name, rest, ranges(), profile) == rest  # type: ignore[arg-type]
