"""Real pairs as worlds: decoding measures what a replay of the same texts does, and facts are those of the profile."""

from __future__ import annotations

import numpy as np
import pytest

from specgym.decoding import LatencyProfile
from specgym.envs import LivePair, ReplayedPair, find_recording, knobs_of, profile_of, setting_of, workload
from specgym.envs.recordings.trace import Trace
from specgym.envs.worlds import real_pairs
from specgym.envs.worlds.acceptance import LONGEST, Rows, Stop, Warp, count_rounds, warped
from specgym.envs.worlds.worlds import Readings

TEXTS = 2


@pytest.fixture(scope="module")
def profile() -> LatencyProfile:
    """The reference profile of a shipped pair."""
    return profile_of(workload("tiny-3m-1l/prose"), None, replayed=True)


@pytest.mark.parametrize(
    ("engine", "stop", "pair"),
    [
        ("transformers", "after", "tiny-3m-1l"),
        ("llama.cpp", "before", "tiny-3m-1l"),
        ("vllm", None, "tiny-3m-1l"),
        ("transformers", "after", "tiny-3m-ngram"),
    ],
)
def test_decoding_measures_what_the_trace_of_the_same_texts_holds(
    engine: str, stop: str | None, pair: str, profile: LatencyProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_pairs, "PROMPTS", TEXTS)
    named = workload(f"{pair}/prose")
    trace, _ = find_recording("speculative", None, named, "train")
    assert isinstance(trace, Trace)
    world = LivePair(named, engine, profile, trace.info.tokens)
    monkeypatch.setattr(world, "_prompts", world._prompts[:TEXTS])  # in any order, they are the trace's first
    setting = int(setting_of(5, 0.0 if stop is None else 0.5))
    live = world.measure(setting)

    rule: Stop = "before" if stop == "before" else "after"
    rows = Rows.of(trace, TEXTS)
    passing, seen = warped(rows, Warp(), rule, np.random.default_rng(0))
    replayed = count_rounds(passing, seen, rows, rule)
    expected = {name: getattr(replayed, name)[setting].sum(0, dtype=np.int64) for name in Readings._fields[1:6]}
    expected["drafts"] = expected["drafts"][: LONGEST + 1]  # after them comes what is charged and not shown
    for name in ("drafts", "kept", "reached"):
        np.testing.assert_array_equal(getattr(live, name)[0], expected[name], err_msg=name)
    for name in ("judged", "passed"):  # a probability in between two levels may be rounded to either
        assert np.abs(getattr(live, name)[0] - expected[name]).sum() <= 2, name
    entropy = float(replayed.entropy[setting].sum(dtype=np.float64)) / max(int(live.judged.sum()), 1)
    assert float(live.entropy[0]) == pytest.approx(entropy, rel=0.01)
    assert float(live.speedup[0]) > 0


def test_facts_are_the_times_of_two_rounds_and_what_the_engine_does_with_such_drafts(profile: LatencyProfile) -> None:
    plain = profile.autoregressive_seconds
    world = ReplayedPair(workload("tiny-3m-1l/prose"), "llama.cpp", profile)
    assert (world.facts.before.tolist(), world.facts.fixed.tolist()) == ([True], [False])
    assert float(world.facts.short_round[0]) == pytest.approx(profile.round(4) / plain)
    assert float(world.facts.long_round[0]) == pytest.approx(profile.round(16) / plain)
    copied = ReplayedPair(workload("tiny-3m-lookup/prose"), "llama.cpp", profile)
    assert (copied.facts.before.tolist(), copied.facts.fixed.tolist()) == ([False], [True])
    assert knobs_of(int(setting_of(3, 0.4)), copied.threshold) == {"draft_length": 3}
    assert knobs_of(int(setting_of(3, 0.4)), world.threshold) == {"draft_length": 3, "stop_threshold": 0.4}
    with pytest.raises(ValueError, match="engine must be"):
        ReplayedPair(workload("tiny-3m-1l/prose"), "tgi", profile)


def test_what_drafts_nothing_is_plain_decoding(profile: LatencyProfile) -> None:
    readings: Readings = ReplayedPair(workload("tiny-3m-1l/prose"), "vllm", profile).measure(0)
    assert float(readings.speedup[0]) == pytest.approx(1.0)
    assert int(readings.kept.sum()) == 0
