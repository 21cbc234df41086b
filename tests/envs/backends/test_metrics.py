"""Metrics over several prompts."""

from __future__ import annotations

import pytest

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.threshold import ThresholdDecoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.envs import measure_setting


def test_metrics_are_ratios_of_sums(pair: Pair, profile: LatencyProfile) -> None:
    decoder = ThresholdDecoder(pair, 4, "never")
    knobs = {"fallback": 0.2, "rollback": 1.0}
    whole = measure_setting(decoder, knobs, [[1, 2], [3]], 8, seed=4, profile=profile)
    parts = [measure_setting(decoder, knobs, [[1, 2]], 8, seed=4, profile=profile)]
    parts.append(measure_setting(decoder, knobs, [[3]], 8, seed=5, profile=profile))
    total = {name: sum(part[name] for part in parts) for name in ("tokens", "rounds", "drafted", "accepted", "seconds")}
    for name, value in total.items():
        assert whole[name] == pytest.approx(value)
    assert whole["draft_acceptance_rate"] == pytest.approx(total["accepted"] / total["drafted"])
    assert whole["mean_acceptance_length"] == pytest.approx(total["tokens"] / total["rounds"])
    assert whole["speedup"] == pytest.approx(0.010 * total["tokens"] / total["seconds"])


def test_plain_decoding_has_a_speedup_of_exactly_one(pair: Pair, profile: LatencyProfile) -> None:
    result = measure_setting(AutoregressiveDecoder(pair), None, [[1, 2]], 8, seed=0, profile=profile)
    assert result["speedup"] == 1.0
    assert result["mean_acceptance_length"] == 1.0


def test_measuring_nothing_is_refused(pair: Pair, profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match="give at least one prompt"):
        measure_setting(ThresholdDecoder(pair, 4, "never"), None, [], 8, profile=profile)
