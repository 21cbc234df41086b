"""The company of learned knobs: how simpler ways to decode are chosen, and the verdict on which to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.agents import Row
from specgym.agents.evaluation.contenders import (
    DO_NOT_SPECULATE,
    FIXED,
    LIVE_LENGTHS,
    ONE_FOR_ALL,
    STOP_RULE,
    TrainingReplay,
    contenders,
    fixed_length,
    live_verdict,
    replays,
    settings_of_others,
)
from specgym.agents.evaluation.results import LEARNED, PLAIN, mean_rows
from specgym.decoding import LatencyProfile, SpeculativeDecoder
from specgym.envs import RewardSettings, workload
from tests.helpers.small_runs import record_traces

PROFILE = LatencyProfile("pair", {0: 0.0, 16: 0.016}, {1: 0.010, 17: 0.014}, 0.010, {"name": "made up"})
EXACT = {"fallback": 0.0, "rollback": 1.0}


def test_the_fixed_length_is_the_fastest_on_recorded_training_prompts(
    small_workloads: tuple[str, str], tmp_path: Path
) -> None:
    chosen = workload(small_workloads[0])
    folder = record_traces(small_workloads[:1], tmp_path)
    (recording,) = folder.glob("*train*")
    replay = TrainingReplay("speculative", chosen, recording, PROFILE, {"max_draft_length": 4, "stop": "never"}, 12)
    speedups = replay.measure(replay.grid)["speedup"]
    assert len(speedups) == 5
    assert fixed_length(chosen, recording, PROFILE, 4, 12) == np.argmax(speedups)
    dear = LatencyProfile("pair", {0: 0.0, 1: 0.1}, {1: 0.010}, 0.010, {"name": "made up"})
    assert fixed_length(chosen, recording, dear, 4, 12) == 0
    fixed = contenders(SpeculativeDecoder(chosen.load(), 4), {}, exact_length=0)[0]
    assert fixed.decoder is not None
    assert fixed.decoder.generate([1, 2], max_new_tokens=4, knobs=fixed.knobs).draft_acceptance_rate == 0


def test_where_nothing_is_recorded_a_few_lengths_are_decoded(
    small_workloads: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    generate = SpeculativeDecoder.generate

    def watched(self: SpeculativeDecoder, prompt: Any, **options: Any) -> Any:
        tried.append(options["knobs"]["draft_length"])
        return generate(self, prompt, **options)

    monkeypatch.setattr(SpeculativeDecoder, "generate", watched)
    assert fixed_length(workload(small_workloads[0]), None, PROFILE, 4, 4) in LIVE_LENGTHS[:4]
    assert list(dict.fromkeys(tried)) == [1, 2, 3, 4]


def test_one_setting_for_all_is_the_best_of_the_others_within_the_bound(
    small_workloads: tuple[str, str], tmp_path: Path
) -> None:
    folder = record_traces(small_workloads, tmp_path)
    recordings = [folder / name for name in sorted(path.name for path in folder.glob("*train*"))]
    chosen = [workload(name) for name in small_workloads]
    if "@1.0" in recordings[0].name:
        recordings.reverse()
    options = {"max_draft_length": 4}
    measured = replays("threshold", chosen, recordings, [PROFILE] * 2, options, 12)
    free = settings_of_others(measured, RewardSettings(range_weight=0.0), None, None)
    for name, other in zip(small_workloads, reversed(measured), strict=True):
        values = other.measure(other.grid)
        worth = values["speedup"] + RewardSettings().acceptance_weight * values["draft_acceptance_rate"]
        assert free[name] == other.grid[int(np.argmax(worth))]
    bound = 0.1
    for exact in (None, EXACT):
        bounded = settings_of_others(measured, RewardSettings(), bound, exact)
        for name, other in zip(small_workloads, reversed(measured), strict=True):
            tried = [*other.grid, *([exact] if exact else [])]
            values = other.measure(tried)
            kept = values["divergence"] <= bound
            best = np.where(kept, values["speedup"], -np.inf) if kept.any() else -values["divergence"]
            assert bounded[name] == tried[int(np.argmax(best))]
    assert settings_of_others(measured[:1], RewardSettings(), None, None) == {}
    assert replays("threshold", chosen, [recordings[0], tmp_path / "none.npz"], [PROFILE] * 2, options, 12) == []


def row(method: str, speedup: float, clock: float | None = None, divergence: float = 0.0, **more: Any) -> Row:
    values = {"speedup": speedup, "wall_speedup": clock or speedup, "reward": speedup, "divergence": divergence,
              "target_tokens_per_token": 2.0}  # fmt: skip
    return Row(more.pop("workload", "a/prose"), method, values=values, **more)


FIXED_ROW = row(FIXED, 1.3, rule="length 3")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [FIXED_ROW, row(STOP_RULE, 1.44), row(LEARNED, 1.61, 1.55, 0.031)],
            "learned thresholds, 1.61 x plain (clock 1.55), 1.12 x the best exact; divergence 0.031 (bound 0.05)",
        ),
        (
            [FIXED_ROW, row(STOP_RULE, 1.4, 1.35), row(LEARNED, 1.2, 1.22, 0.031)],
            "exact decoding with the stop rule, 1.40 x plain (clock 1.35); the learned setting is no better (1.20 x, "
            "clock 1.22)",
        ),
        (
            [FIXED_ROW, row(STOP_RULE, 1.2), row(LEARNED, 1.5, divergence=0.06)],
            "exact decoding, length 3, 1.30 x plain (clock 1.30); the learned setting breaks the bound (divergence "
            "0.060)",
        ),
        (
            [FIXED_ROW, row(STOP_RULE, 1.2), row(LEARNED, 1.6, 0.97, 0.02)],
            "exact decoding, length 3, 1.30 x plain (clock 1.30); the learned setting is not faster than plain "
            "decoding (1.60 x, clock 0.97)",
        ),
        (
            [row(STOP_RULE, 1.2), row(ONE_FOR_ALL, 1.5, 1.45, 0.02), row(LEARNED, 1.0, rule=DO_NOT_SPECULATE)],
            "one setting for all, 1.50 x plain (clock 1.45), 1.25 x the best exact; divergence 0.020 (bound 0.05); "
            "what was learned is not to speculate",
        ),
        (
            [row(STOP_RULE, 1.2), row(LEARNED, 1.2)],
            "learned thresholds, 1.20 x plain (clock 1.20), 1.00 x the best exact; divergence 0.000 (bound 0.05)",
        ),
        (
            [row(STOP_RULE, 0.97, 0.95), row(LEARNED, 1.0, rule=DO_NOT_SPECULATE)],
            "do not speculate: nothing is faster than plain decoding (best 1.00 x, clock 1.00)",
        ),
        (
            [row(STOP_RULE, 0.97, 0.95), row(LEARNED, 1.4, divergence=0.2)],
            "do not speculate: nothing within the bound is faster than plain decoding (best 0.97 x, clock 0.95)",
        ),
    ],
)
def test_the_verdict_of_a_workload_is_what_is_fastest_within_the_bound(rows: list[Row], line: str) -> None:
    strayed = row("default", 0.5, divergence=0.4)
    lines = live_verdict([row(PLAIN, 1.0), strayed, *rows], "thresholds", 0.05).splitlines()
    assert lines[0] == f"a/prose: {line}"
    assert len(lines) == 2


def test_the_last_line_is_about_all_workloads() -> None:
    def of(name: str, fixed: float, stop: float, learned: float, divergence: float) -> list[Row]:
        return [
            row(PLAIN, 1.0, workload=name),
            row(FIXED, fixed, workload=name),
            row(STOP_RULE, stop, workload=name),
            row("default", 0.8, divergence=0.3, workload=name),
            row(LEARNED, learned, 1.1, divergence, workload=name),
        ]

    rows = [*of("a/prose", 1.1, 1.3, 1.5, 0.04), *of("b/code", 1.5, 1.2, 1.7, 0.03)]
    last = live_verdict([*rows, *mean_rows(rows)], "thresholds", 0.05).splitlines()[-1]
    assert last == (
        "The bound of 0.05 on the divergence is kept on the held-out prompts of 2 of 2 workloads. Mean speedup over 2 "
        "workloads, by the profile and (by the clock): plain 1.00 (1.00), best exact 1.40 (1.40), default 0.80 (0.80), "
        "learned 1.60 (1.10). To be preferred overall: learned thresholds."
    )
    broken = [*of("a/prose", 1.1, 1.3, 1.5, 0.06), *of("b/code", 1.5, 1.2, 1.7, 0.03)]
    last = live_verdict(broken, "thresholds", 0.05).splitlines()[-1]
    assert "of 1 of 2 workloads, not on a/prose." in last
    assert last.endswith("To be preferred overall: exact decoding.")
    slow = [*of("a/prose", 0.9, 0.8, 1.5, 0.06), *of("b/code", 0.9, 0.9, 1.7, 0.03)]
    assert live_verdict(slow, max_divergence=0.05).endswith("Overall plain decoding is to be preferred.")
    assert "train with --max-divergence" in live_verdict([row("default", 1.1), row(LEARNED, 1.5, divergence=0.3)])
    assert "The text is the target's own" in live_verdict([row("default", 1.1), row(LEARNED, 1.5)])
