"""Acceptance worlds: recorded verdicts come back unwarped, warps do what they say, and counts are those of decoding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specgym.decoding import Split
from specgym.envs.backends.replay import replay_backend
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.find import find_recording
from specgym.envs.recordings.trace import Trace
from specgym.envs.worlds.acceptance import (
    LENGTHS,
    LEVELS,
    LONGEST,
    SETTINGS,
    THRESHOLDS,
    Counts,
    Rows,
    Stop,
    Warp,
    count_rounds,
    length_of,
    rounds_a_token,
    setting_of,
    threshold_of,
    warped,
)
from specgym.envs.worlds.pool import AcceptancePool, Source

GREEDY, SAMPLED = "tiny-3m-1l/definitions", "tiny/prose@1.0"
TEXTS = 5


def trace_of(name: str, split: Split) -> Trace:
    trace, _ = find_recording("speculative", None, name, split)
    assert isinstance(trace, Trace)
    return trace


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows.of(trace_of(GREEDY, "train"), TEXTS)


@pytest.fixture(scope="module")
def sampled() -> Rows:
    return Rows.of(trace_of(SAMPLED, "train"), TEXTS)


def decoded_one_by_one(passing: np.ndarray, seen: np.ndarray, rows: Rows, stop: Stop, setting: int) -> list[tuple]:
    """Rounds of every text, by a loop that follows the words of the rule: text, row, drafted, kept, thrown away."""
    length, threshold = int(length_of(np.array(setting))), float(threshold_of(np.array(setting)))
    rounds = []
    for text in range(TEXTS):
        row, end = int(rows.starts[text]), int(rows.starts[text + 1])
        last = row + rows.room - 1
        while row < end:
            drafted = thrown = 0
            for place in range(min(length, int(rows.drafted[row]), last - row)):
                unsure = threshold > 0 and seen[row, place] < threshold
                if unsure and stop == "before":
                    thrown = 1
                    break
                drafted += 1
                if unsure:
                    break
            kept = min(int(passing[row]), drafted, end - row)
            rounds.append((text, row, drafted, kept, thrown))
            row += kept + 1
    return rounds


def test_settings_are_numbered_both_ways() -> None:
    numbers = np.arange(SETTINGS)
    assert setting_of(length_of(numbers), threshold_of(numbers)).tolist() == numbers.tolist()
    assert setting_of(3.4, 0.07) == setting_of(3, 0.05)
    assert setting_of(99, 2.0) == SETTINGS - 1


def test_without_a_warp_a_greedy_world_is_what_was_recorded(rows: Rows) -> None:
    passing, seen = warped(rows, Warp(), "after", np.random.default_rng(0))
    trace = trace_of(GREEDY, "train")
    matches = np.logical_and.accumulate(trace.match[: len(passing)] & rows.there, 1).sum(1)
    assert passing.tolist() == matches.tolist()
    assert np.array_equal(seen, rows.drawn)


def test_without_a_warp_a_sampled_world_passes_as_often_as_was_recorded(sampled: Rows) -> None:
    draws = [warped(sampled, Warp(), "after", np.random.default_rng(seed))[0] > 0 for seed in range(40)]
    passed, chance = np.mean(draws, 0), sampled.chance[:, 0]
    error = np.sqrt(chance * (1 - chance) / len(draws))
    assert np.abs((passed - chance).sum()) < 4 * np.sqrt((error**2).sum())
    assert np.abs(passed - chance).max() < 5.5 * error.max()


def test_counts_of_fixed_lengths_are_those_of_exact_replay() -> None:
    rows = Rows.of(trace_of(GREEDY, "test"), TEXTS)
    counts = count_rounds(*warped(rows, Warp(), "after", np.random.default_rng(0)), rows, "after")
    replay = replay_backend("speculative", GREEDY, None, split="test", max_new_tokens=64)
    prompts = np.arange(TEXTS)
    for length in (1, 3, 16):
        knobs = {knob.name: np.full(TEXTS, knob.default) for knob in replay.knobs} | {
            "draft_length": np.full(TEXTS, float(length))
        }
        sums = replay.sums(prompts, np.zeros(TEXTS, np.int64), knobs, np.random.default_rng(0))
        setting = setting_of(length, 0.0)
        assert counts.tokens.tolist() == sums["tokens"].tolist()
        assert counts.drafts[setting, :, : LONGEST + 1].sum(1).tolist() == sums["rounds"].tolist()
        assert (counts.drafts[setting, :, : LONGEST + 1] @ LENGTHS).tolist() == sums["drafted"].tolist()


@pytest.mark.parametrize("stop", ["after", "before"])
def test_counts_are_those_of_decoding_one_by_one(rows: Rows, stop: Stop) -> None:
    rng = np.random.default_rng(3)
    passing, seen = warped(rows, Warp(0.6, 0.8, 0.05, 1.2, -0.3), stop, rng)
    counts = count_rounds(passing, seen, rows, stop)
    level = np.minimum((seen * LEVELS).astype(int), LEVELS - 1)
    for setting in rng.choice(SETTINGS, 12, replace=False).tolist():
        drafts, kept, reached = np.zeros((TEXTS, LONGEST + 3)), *np.zeros((2, TEXTS, LONGEST))
        judged, passed, entropy = *np.zeros((2, TEXTS, LEVELS)), np.zeros(TEXTS)
        for text, row, drafted, stays, thrown in decoded_one_by_one(passing, seen, rows, stop, setting):
            drafts[text, [drafted, LONGEST + 1, LONGEST + 2]] += 1, thrown, thrown and drafted == 0
            kept[text, :stays] += 1
            upto = min(stays + 1, drafted)
            reached[text, :upto] += 1
            np.add.at(judged[text], level[row, :upto], 1)
            np.add.at(passed[text], level[row, :stays], 1)
            entropy[text] += rows.entropy[row, :upto].sum()
        for mine, theirs in ((counts.drafts, drafts), (counts.kept, kept), (counts.reached, reached)):
            assert mine[setting].tolist() == theirs.tolist()
        assert counts.judged[setting].tolist() == judged.tolist()
        assert counts.passed[setting].tolist() == passed.tolist()
        assert counts.entropy[setting] == pytest.approx(entropy, rel=2e-3, abs=1e-3)
    share = rounds_a_token(passing, seen, rows, stop)
    assert share == pytest.approx(counts.drafts.sum(1, dtype=np.int64) / counts.tokens.sum())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_first_tokens_pass_as_often_as_the_warp_asks(rows: Rows, share: float) -> None:
    passed = [(warped(rows, Warp(share), "after", np.random.default_rng(seed))[0] > 0).mean() for seed in range(8)]
    assert np.mean(passed) == pytest.approx(share, abs=0.01)


def test_what_passes_in_a_hard_world_passes_in_an_easier_one(rows: Rows) -> None:
    passing = [warped(rows, Warp(share), "after", np.random.default_rng(1))[0] for share in (0.2, 0.5, 0.9)]
    assert (passing[0] <= passing[1]).all()
    assert (passing[1] <= passing[2]).all()
    assert passing[0].sum() < passing[1].sum() < passing[2].sum()


def test_a_slope_wears_long_drafts_out_and_leaves_first_tokens_alone(rows: Rows) -> None:
    flat, worn = (warped(rows, Warp(0.9, 1.0, slope), "after", np.random.default_rng(2))[0] for slope in (0.0, 0.5))
    assert (flat > 0).tolist() == (worn > 0).tolist()
    assert worn.mean() < 0.8 * flat.mean()


def test_an_uninformed_draft_is_right_as_often_whatever_its_probability(rows: Rows) -> None:
    first = rows.drawn[:, 0]
    sure, unsure = first > np.quantile(first, 0.7), first < np.quantile(first, 0.3)
    gaps = []
    for informed in (0.0, 1.5):
        draws = [warped(rows, Warp(0.5, informed), "after", np.random.default_rng(seed))[0] > 0 for seed in range(20)]
        passed = np.mean(draws, 0)
        gaps.append(passed[sure].mean() - passed[unsure].mean())
    assert abs(gaps[0]) < 0.12
    assert gaps[1] > 0.3


def test_a_warp_of_what_rules_see_keeps_its_order(rows: Rows) -> None:
    _, seen = warped(rows, Warp(sharpness=0.6, bias=1.0), "before", np.random.default_rng(0))
    order = np.argsort(rows.likeliest[:, 0])
    assert (np.diff(seen[order, 0]) >= -1e-12).all()
    assert seen[:, 0].mean() > rows.likeliest[:, 0].mean()


def test_a_trace_without_top_ten_is_refused_with_the_command() -> None:
    with pytest.raises(TraceError, match=r"lacks the column top_ten; record it again: `python -m specgym.envs.record"):
        Rows.of(replace(trace_of(GREEDY, "train"), top_ten=None), 1)


def test_a_pool_is_the_same_for_a_seed_and_another_for_another() -> None:
    names = [GREEDY, SAMPLED]
    pools = [AcceptancePool.warped(names, 2, seed) for seed in (0, 0, 1)]
    assert np.array_equal(pools[0].drafts, pools[1].drafts)
    assert np.array_equal(pools[0].rounds, pools[1].rounds)
    assert not np.array_equal(pools[0].drafts, pools[2].drafts)
    assert pools[0].temperatures.tolist() == [0, 1]
    assert pools[0].pairs.tolist() == ["tiny-3m-1l", "tiny"]


def test_held_out_texts_are_not_those_measured() -> None:
    source = Source.find(GREEDY)
    assert not np.array_equal(source.train.chance[:50], source.test.chance[:50])
    pool = AcceptancePool.recorded([GREEDY])
    counts = count_rounds(*warped(source.test, Warp(), "after", np.random.default_rng(0)), source.test, "after")
    after = int(np.flatnonzero(~pool.before)[0])
    assert pool.rounds[after] == pytest.approx(counts.drafts.sum(1, dtype=np.int64) / counts.tokens.sum(), rel=1e-6)


def test_every_round_and_token_is_counted_once(rows: Rows) -> None:
    counts: Counts = count_rounds(*warped(rows, Warp(0.7), "after", np.random.default_rng(5)), rows, "after")
    emitted = counts.drafts[..., : LONGEST + 1].sum(2, dtype=np.int64) + counts.kept.sum(2, dtype=np.int64)
    # A draft that is kept whole to the last token of a text leaves no room for one of the target's own.
    assert (emitted - counts.tokens >= 0).all()
    assert (emitted - counts.tokens <= 1).all()
    assert (counts.drafts[setting_of(0, 0.0), :, 0] == counts.tokens).all()
    assert len(THRESHOLDS) * len(LENGTHS) == SETTINGS
