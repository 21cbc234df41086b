"""Choosing and judging stop rules of a draft that goes on while the target verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from specgym.agents import ResultTable, Row
from specgym.agents.evaluation.control.overlapping_comparison import (
    OVER_FIXED,
    OVER_RULE,
    InTurns,
    compare_overlapping,
    overlapping_verdict,
)
from specgym.agents.evaluation.results import ALL
from specgym.agents.experiments.control.control_settings import ComparisonSettings
from specgym.agents.experiments.control.stop_drafts_settings import StopSettings
from specgym.agents.experiments.control.stop_policy import RoundEpisodes
from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.decoding import FixedLength, LatencyProfile
from specgym.envs import DraftLengthVectorEnv, Trace

SETTINGS = StopSettings(
    workloads=("tiny/prose",),
    max_draft_length=8,
    max_new_tokens=48,
    comparison=ComparisonSettings(passes=1, resamples=20),
    overlap="pipelined",
)
STEP = {tokens: 0.25 * tokens for tokens in range(1, 10)}
PASS = dict.fromkeys(range(1, 11), 1.0)
BESIDE = LatencyProfile("toy", STEP, PASS, 1.0, {}, kind="pipelined", overlaps=True)
TURNS = LatencyProfile("toy", {0: 0.0, **STEP}, PASS, 1.0, {})


def compared(train: Trace, test: Trace, in_turns: InTurns | None) -> list[Row]:
    return compare_overlapping(SETTINGS, [FixedLength(4), FixedLength(8)], [BESIDE], [train], [test], in_turns)


def test_windows_and_the_way_to_begin_are_chosen_on_training_prompts(make_drafted_trace: Callable[..., Trace]) -> None:
    """Drafts that are always right pay as far as they are hidden; those that never are cost nothing."""
    rich = make_drafted_trace(np.ones((96, 8)), 0.5, prompts=2)
    poor = make_drafted_trace(np.zeros((96, 8)), 0.5, prompts=2, split="test")
    rows = compared(rich, poor, InTurns([FixedLength(1)], [TURNS]))
    row = {it.method: it for it in rows if it.workload == "tiny/prose"}
    assert row["fixed"].rule == "length 4"
    assert row["turns fixed"].rule == "length 7"  # 6 rounds of 8 tokens; drafting 8 would not save one
    assert row["turns learned"].values["throughput"] == pytest.approx(1 / 1.25, rel=0.01)
    assert row["fixed"].values["throughput"] == pytest.approx(1.0)
    assert row["learned"].by_seed == pytest.approx([1.0, 1.0])  # nobody waits for a draft that is never right
    rows = compared(rich, rich, None)
    row = {it.method: it for it in rows if it.workload == "tiny/prose"}
    assert "turns fixed" not in row
    assert row["fixed"].values["throughput"] == pytest.approx(48 / 13, rel=0.01)  # a token, then four a round
    assert row["learned"].values[OVER_FIXED] == pytest.approx(np.mean(row["learned"].by_seed) / (48 / 13), rel=0.01)
    rows = compare_overlapping(SETTINGS, [FixedLength(1)], [BESIDE], [rich], [rich], None)
    assert "The chosen rule beats it on tiny/prose (length 4, 3.69" in overlapping_verdict(rows)


def test_the_verdict_sets_the_best_beside_decoding_in_turns() -> None:
    reached = {"fixed": 1.2, "confidence": 1.3, "rule": 1.3, "learned": 1.4, "turns rule": 1.25, "turns learned": 1.2}
    ratios = {OVER_FIXED: 1.4 / 1.2, OVER_RULE: 1.4 / 1.3}
    rows = [
        Row(name, method, {}, {"throughput": value} | (ratios if method == "learned" else {}), rule=method)
        for name in ("tiny/prose", ALL)
        for method, value in reached.items()
    ]
    verdict = overlapping_verdict(rows)
    assert "1.167 times the throughput of the best fixed window" in verdict
    assert "1.120 times as much" in verdict
    assert "beats it" not in verdict
    assert ResultTable(rows).by_workload()[ALL]["learned"].values[OVER_RULE] > 1


def test_an_episode_ends_where_nothing_is_left_to_verify(make_drafted_trace: Callable[..., Trace]) -> None:
    """The worth of a draft shows in the next round, which belongs to the same episode."""
    trace = make_drafted_trace(np.ones((96, 8)), 0.5, prompts=2)
    env = DraftLengthVectorEnv(
        1, recording=trace, profile=BESIDE, max_draft_length=4, max_new_tokens=12, decoder="pipelined"
    )
    episodes: VecEnv = RoundEpisodes(VectorEnvAdaptor(env))
    episodes.reset()
    ends = []
    for action in (0, 0, 1, 1, 1):  # three tokens, a bet of one on two of them, a bet of one on nothing
        _, _, done, _ = episodes.step(np.array([action]))
        ends.append(bool(done[0]))
    assert ends == [False, False, False, True, True]
    assert replace(SETTINGS, overlap=None).begins_by is None
