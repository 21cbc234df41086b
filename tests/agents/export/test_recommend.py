"""Around where policies rest the best setting is found, by the training prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from specgym.agents import KnobSettings, default_settings
from specgym.agents.export import recommend as nearby
from specgym.agents.export.knob_policy import KnobRange
from specgym.agents.export.recommend import (
    CONFIDENCE,
    FEWEST,
    LIVE_SHARES,
    REACH,
    Recommendation,
    best_nearby,
    fastest_within,
    likely_divergence,
    paying,
)
from specgym.decoding import traits_of
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import Metrics
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


@pytest.mark.parametrize(("seconds", "advised"), [(0.9, True), (1.0, False), (1.1, False)])
def test_knobs_that_do_not_pay_on_the_training_prompts_are_not_recommended(seconds: float, advised: bool) -> None:
    knobs = {"window": 7.0}

    def decode(tried: Sequence[Mapping[str, float]]) -> Metrics[NDArray[np.float64]]:
        assert list(tried) == [knobs]
        ones = np.ones((1, 3))
        return Metrics(ones, ones, ones, ones, 0 * ones, seconds * ones, ones)

    result = paying(knobs, decode)
    assert result.knobs == (knobs if advised else None)
    assert result.reason == f"{1 / seconds:.2f} times plain speed on the training prompts"


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


# With a bound: the fastest setting that keeps it.

KNOBS = (KnobRange("fallback", 0.0, 1.0, 0.3, 0.2), KnobRange("rollback", 1.0, 16.0, 1.0, 1.5))
LOSSLESS = {"fallback": 0.0, "rollback": 1.0}
RESTS = ({"fallback": 0.9, "rollback": 4.0}, {"fallback": 0.6, "rollback": 1.0})
OTHERS = 12
Curve = Callable[[Any], Any]  # of arrays of fallbacks


class Decoded:
    """Made-up training prompts: how fast they are and how far they stray depends on the fallback.

    Attributes:
        tried: settings that were decoded.
    """

    def __init__(self, speed: Curve, divergence: Curve, prompts: int = 24, spread: float = 0.4) -> None:
        self.speed, self.divergence = speed, divergence
        self.share = 1 + spread * np.linspace(-1, 1, prompts)  # prompts stray more or less, with a mean of 1
        self.tried: list[dict[str, float]] = []
        self.sums: Metrics[NDArray[np.float64]]

    def __call__(self, tried: Sequence[Mapping[str, float]]) -> Metrics[NDArray[np.float64]]:
        self.tried = [dict(setting) for setting in tried]
        fallback = np.array([setting["fallback"] for setting in tried])[:, None]
        tokens = np.full((len(tried), len(self.share)), 32.0)
        variation, seconds = tokens * self.divergence(fallback) * self.share, tokens / self.speed(fallback)
        self.sums = Metrics(tokens, tokens, tokens, tokens, variation, seconds, tokens)
        return self.sums

    def of(self, knobs: Mapping[str, float]) -> tuple[float, float, float]:
        """Speedup, divergence, and the highest divergence that may be expected, of a setting that was tried."""
        place, sums = self.tried.index(dict(knobs)), self.sums
        highest = likely_divergence(sums.total_variation, sums.tokens, OTHERS)[place]
        return (
            float(sums.plain_seconds[place].sum() / sums.seconds[place].sum()),
            float(sums.total_variation[place].sum() / sums.tokens[place].sum()),
            float(highest),
        )


def within(decoded: Decoded, bound: float = 0.05) -> Recommendation:
    return fastest_within(bound, LOSSLESS, RESTS, KNOBS, decoded, OTHERS)


@pytest.mark.parametrize("spread", [0.0, 0.4, 0.9])
def test_the_fastest_setting_that_keeps_the_bound_with_a_margin_is_recommended(spread: float) -> None:
    decoded = Decoded(lambda fallback: 1.1 + fallback, lambda fallback: 0.2 * fallback, spread=spread)
    result = within(decoded)
    assert result.knobs
    speed, divergence, highest = decoded.of(result.knobs)
    assert divergence <= highest <= 0.05
    assert 0 < result.knobs["fallback"] < 0.25 + 1e-9
    assert (highest > divergence + 0.001) == (spread > 0)  # the margin is for prompts that differ
    for setting in decoded.tried:
        other = decoded.of(setting)
        assert other[0] <= speed or other[2] > 0.05
    assert result.reason.startswith(f"{speed:.2f} times plain speed at a divergence of {divergence:.3f}")
    assert f"at most {highest:.3f} be expected of {OTHERS} others" in result.reason


def test_the_more_prompts_differ_the_more_careful_it_is() -> None:
    chosen = []
    for spread in (0.0, 0.4, 0.9):
        knobs = within(Decoded(lambda fallback: 1.1 + fallback, lambda fallback: 0.2 * fallback, spread=spread)).knobs
        assert knobs
        chosen.append(knobs["fallback"])
    assert chosen[0] > chosen[1] > chosen[2] > 0


def test_where_nothing_else_keeps_the_bound_the_lossless_setting_is_recommended() -> None:
    result = within(Decoded(lambda fallback: 1.2 + fallback, lambda fallback: 0.5 * (fallback > 0)))
    assert result.knobs == LOSSLESS
    assert "1.20 times plain speed at a divergence of 0.000" in result.reason


@pytest.mark.parametrize("lossless", [0.9, 1.0])
def test_where_what_keeps_the_bound_is_no_faster_than_plain_decoding_it_says_not_to_speculate(lossless: float) -> None:
    result = within(Decoded(lambda fallback: lossless + 2 * (fallback > 0), lambda fallback: 0.5 * (fallback > 0)))
    assert result.knobs is None
    assert result.reason == f"the fastest setting within the bound decodes at {lossless:.2f} times plain speed"


def test_where_nothing_pays_it_says_not_to_speculate_however_near_the_text_is() -> None:
    assert within(Decoded(lambda fallback: 0.8 - 0.1 * fallback, lambda fallback: 0 * fallback)).knobs is None


@given(
    slope=st.floats(-1, 2), lossless=st.floats(0.5, 1.5), straying=st.floats(0, 1), power=st.floats(0.3, 3),
    prompts=st.integers(1, 30), bound=st.floats(0.001, 1),
)  # fmt: skip
def test_no_recommendation_is_slower_than_plain_decoding_or_beyond_the_bound(
    slope: float, lossless: float, straying: float, power: float, prompts: int, bound: float
) -> None:
    decoded = Decoded(
        lambda fallback: np.maximum(lossless + slope * fallback, 0.1),
        lambda fallback: straying * fallback**power,
        prompts,
    )
    result = within(decoded, bound)
    if result.knobs is None:
        assert all(speed <= 1 or highest > bound for speed, _, highest in map(decoded.of, decoded.tried))
    else:
        speed, _, highest = decoded.of(result.knobs)
        assert speed > 1
        assert highest <= bound


def test_compared_are_the_ways_from_the_lossless_setting_to_every_rest_and_to_the_defaults() -> None:
    decoded = Decoded(lambda fallback: 1 + fallback, lambda fallback: fallback)
    within(decoded)
    tried = [(setting["fallback"], setting["rollback"]) for setting in decoded.tried]
    assert len(set(tried)) == len(tried)
    assert {(0.0, 1.0), (0.9, 4.0), (0.45, 2.5), (0.6, 1.0), (0.3, 1.0), (0.9, 1.0)} <= {
        (round(fallback, 9), round(rollback, 9)) for fallback, rollback in tried
    }
    for knob, values in zip(KNOBS, zip(*tried, strict=True), strict=True):
        assert min(values) >= knob.low
        assert max(values) <= knob.high
    assert max(tried)[0] == 1.0  # a little beyond where the policy stays, and no further than the knob goes
    few = Decoded(lambda fallback: 1 + fallback, lambda fallback: fallback)
    fastest_within(0.05, LOSSLESS, RESTS[:1], KNOBS[:1], few, OTHERS, LIVE_SHARES)
    assert len(few.tried) < 10


# What is to be expected of other prompts.


@pytest.mark.parametrize(("decoded", "others"), [(24, 12), (24, 1), (60, 60), (8, 24)])
@pytest.mark.parametrize("kind", ["even", "lopsided"])
def test_the_limit_covers_the_mean_of_other_prompts_about_as_often_as_it_says(
    kind: str, decoded: int, others: int
) -> None:
    rng, trials = np.random.default_rng(0), 4000

    def prompts(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shape = trials, count
        tokens = rng.integers(10, 33, shape).astype(np.float64)
        strays = rng.normal(0.05, 0.015, shape) if kind == "even" else rng.beta(2, 38, shape)
        return tokens * strays, tokens

    limit = likely_divergence(*prompts(decoded), others)
    variation, tokens = prompts(others)
    covered = (variation.sum(1) / tokens.sum(1) <= limit).mean()
    # A normal quantile is low for few prompts, and for lopsided ones.
    assert CONFIDENCE - (0.04 if decoded > 8 else 0.08) < covered < CONFIDENCE + 0.01


def test_the_limit_is_the_mean_where_prompts_do_not_differ_and_higher_for_fewer_others() -> None:
    tokens = np.array([[10.0, 20.0, 30.0]])
    assert likely_divergence(0.1 * tokens, tokens, 5) == pytest.approx([0.1])
    uneven = tokens * np.array([[0.05, 0.1, 0.15]])
    limits = [float(likely_divergence(uneven, tokens, others)[0]) for others in (1, 5, 50)]
    assert limits[0] > limits[1] > limits[2] > uneven.sum() / tokens.sum()


def test_of_a_single_prompt_that_strayed_nothing_can_be_expected() -> None:
    tokens = np.full((2, 1), 32.0)
    assert likely_divergence(np.array([[0.0], [0.1]]), tokens, 12).tolist() == [0.0, math.inf]
