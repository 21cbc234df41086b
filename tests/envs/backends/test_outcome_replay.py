"""TraceWalk by outcomes: what is exact, what is interpolated, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.decoding import EXACT, Pair, SpeculativeDecoder, traits_of
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TokenPrompts, Workload
from specgym.envs.backends.gaussian_process import Surface, fitted
from specgym.envs.backends.live import summarise
from specgym.envs.backends.outcome_replay import OutcomeReplay
from specgym.envs.backends.replay_table import ReplayTable
from specgym.envs.backends.trace_replay import TraceWalk
from specgym.envs.profiles import profile_of
from specgym.envs.recordings.find import find_recording, shipped_trace
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, design, record_outcomes
from specgym.envs.recordings.outcomes import QUANTITIES, OutcomeError, OutcomeInfo, Outcomes, RecordedKnob, totals
from specgym.envs.tuning.knob_space import KnobMoves
from tests.helpers.recorded_outcomes import lengths_alone

Floats = NDArray[np.float64]
Text = Sequence[tuple[int, int, int]]
"""Rounds as tokens emitted, drafted and accepted."""
LOOKAHEAD = OutcomeSettings().knobs
LENGTH = (RecordedKnob("draft_length", 1, 16, True),)


def smooth(settings: Floats) -> Floats:
    """Something like seconds per token: they fall with what is verified, and rise with what is read."""
    window, ngram, guesses = settings.T
    gain = 1 + 0.8 * (1 - np.exp(-window / 6)) * (1 - np.exp(-guesses / 4)) * np.exp(-((ngram - 4) ** 2) / 8)
    return 0.01 * (1 + 0.01 * (ngram - 1) * (window + guesses)) / gain


def built(decoder: str, knobs: tuple[RecordedKnob, ...], settings: Floats, texts: Sequence[Text]) -> Outcomes:
    about = dict.fromkeys(("target", "target_sha256", "draft", "draft_sha256", "prompts_sha256"), "")
    about |= dict.fromkeys(("specgym", "torch", "transformers"), "")
    numbers = {"draft_length": 16, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "tokens": 32, "seed": 0}
    info = OutcomeInfo(workload="made/up", split="train", decoder=decoder, knobs=knobs, **about, **numbers)  # type: ignore[arg-type]
    emitted, drafted, accepted = np.array([round_ for text in texts for round_ in text]).T
    lossless = np.zeros(len(emitted), np.float32)
    starts = np.cumsum([0, *map(len, texts)])
    return Outcomes(info, settings, starts, emitted, drafted, accepted, drafted, drafted + 1, lossless)


def from_trace(replay: TraceWalk, lengths: Sequence[int]) -> Outcomes:
    """The outcomes of draft lengths as the trace of a greedy pair replays them, which is exactly."""
    random, paths = np.random.default_rng(0), replay.table.paths[:, 0, 0]
    texts = [
        [(taken, drafted, kept) for _, drafted, kept, taken, _ in replay.walk(int(path), 0, EXACT, 1.0, length, random)]
        for length in lengths
        for path in paths
    ]
    return built("speculative", LENGTH, np.array(lengths, np.float64)[:, None], texts)


@pytest.fixture(scope="module")
def exact(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every draft length of a toy pair."""
    work = Workload(pair, TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], [[11]]))
    settings = OutcomeSettings("speculative", prompts=4, tokens=20, draft_length=4)
    with lengths_alone():
        return record_outcomes(work, "train", tmp_path_factory.mktemp("exact") / "toy.npz", settings)


@pytest.mark.parametrize("tokens", [1, 5, 12, 20])
def test_texts_cut_shorter_cost_what_decoding_fewer_tokens_costs(
    exact: Outcomes, pair: Pair, profile: LatencyProfile, tokens: int
) -> None:
    result = totals(exact, profile, tokens)
    decoder = SpeculativeDecoder(pair, 4)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    for number, (length,) in enumerate(exact.settings):
        for place, prompt in enumerate(prompts):
            text = decoder.generate(prompt, max_new_tokens=tokens, knobs={"draft_length": length})
            live = summarise(decoder, [text], profile)
            for name in ("tokens", "rounds", "drafted", "accepted", "seconds"):
                assert getattr(result, name)[number, place] == pytest.approx(live[name]), name


def test_a_recorded_setting_is_replayed_text_by_text(exact: Outcomes, profile: LatencyProfile) -> None:
    replay = OutcomeReplay([exact], [profile], max_new_tokens=20)
    random, prompts = np.random.default_rng(0), np.tile(np.arange(4), 10)
    for number, (length,) in enumerate(exact.settings):
        values = {"draft_length": np.full(len(prompts), length)}
        result = replay.sums(prompts, np.zeros_like(prompts), values, random)
        assert set(result["tokens"]) == {20.0}
        means = replay.means(0, exact.settings[[number]])
        for name in QUANTITIES:
            recorded = getattr(replay.recorded[0], name)[number]
            assert result[name] == pytest.approx(recorded[prompts]), name
            assert means[name][0] == pytest.approx(recorded.sum() / 80), name


def test_a_recorded_setting_is_replayed_as_it_was_recorded_however_rough(profile: LatencyProfile) -> None:
    """A setting like (1, 2, 0) of tiny-3m/code, where live decoding always emits one token a round."""
    settings = np.array([[1.0, 2.0, 0.0], [1.0, 3.0, 2.0], [4.0, 3.0, 2.0], [16.0, 6.0, 16.0]])
    texts: list[Text] = []
    for rounds_of_both in ((32, 32), (20, 12), (16, 11), (8, 16)):
        for count in rounds_of_both:
            texts.append([(1, 5, 0)] * (count - 1) + [(33 - count, 40, 32 - count)])
    replay = OutcomeReplay([built("lookahead", LOOKAHEAD, settings, texts)], [profile], max_new_tokens=32)
    prompts, workloads = np.tile([0, 1], 100), np.zeros(200, np.int64)
    for number, setting in enumerate(settings):
        values = {knob.name: np.full(200, value) for knob, value in zip(LOOKAHEAD, setting, strict=True)}
        result = replay.sums(prompts, workloads, values, np.random.default_rng(0))
        assert result["rounds"] == pytest.approx(replay.recorded[0].rounds[number][prompts]), setting


def test_whatever_is_replayed_could_have_been_decoded() -> None:
    """Lookahead emits what it accepts and one token more each round; the shipped recordings are of it."""
    outcomes, result = find_recording("lookahead", None, "tiny-3m/code", "train")
    assert isinstance(outcomes, Outcomes)
    charged = profile_of(result, None, replayed=True, decoder="lookahead").at()
    replay, random = OutcomeReplay([outcomes], [charged], max_new_tokens=64), np.random.default_rng(0)
    moves = KnobMoves(traits_of("lookahead").knobs_without_pair(), None, None)
    values = moves.values(moves.drawn(random, (4_000,)))
    prompts = random.integers(0, outcomes.prompts, 4_000)
    sums = replay.sums(prompts, np.zeros_like(prompts), values, random)
    assert (sums["rounds"] <= sums["tokens"] + 1e-9).all()
    assert (sums["rounds"] > 0).all()
    assert (sums["accepted"] <= sums["drafted"]).all()
    beyond = sums["accepted"] + sums["rounds"] - sums["tokens"]
    assert beyond.min() > -1e-9
    assert beyond.max() < 1 + 1e-9  # a text may end with what was accepted
    assert sums["accepted"].std() > 1  # and it is not all the same


def test_over_all_prompts_the_mean_is_the_surface() -> None:
    outcomes, result = find_recording("lookahead", None, "tiny-3m/code", "train")
    assert isinstance(outcomes, Outcomes)
    charged = profile_of(result, None, replayed=True, decoder="lookahead").at()
    replay, random = OutcomeReplay([outcomes], [charged], max_new_tokens=64), np.random.default_rng(0)
    prompts = np.tile(np.arange(outcomes.prompts), 200)
    for setting in ([1, 4, 1], [2, 2, 0], [7, 3, 9], [16, 6, 16]):
        values = {
            knob.name: np.full(len(prompts), float(value)) for knob, value in zip(LOOKAHEAD, setting, strict=True)
        }
        sums = replay.sums(prompts, np.zeros_like(prompts), values, random)
        means = replay.means(0, np.array([setting], np.float64))
        for name in ("rounds", "seconds"):
            per_token = sums[name].sum() / sums["tokens"].sum()
            assert per_token == pytest.approx(min(float(means[name][0]), 1.0 if name == "rounds" else 1e9), rel=0.02)


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.01), (0.02, 0.025)])
def test_a_smooth_surface_is_recovered_from_few_settings(noise: float, bound: float) -> None:
    known = design(LOOKAHEAD, 48, [], seed=1)
    values = smooth(known) * np.exp(np.random.default_rng(0).normal(0, noise, len(known)))
    surface, elsewhere = Surface(LOOKAHEAD, known, values), design(LOOKAHEAD, 500, [], seed=2)
    error = np.abs(surface(elsewhere) / smooth(elsewhere) - 1)
    assert error.mean() < bound
    # What is said of the error, from the recorded settings alone, is about right.
    said = np.abs(surface.left_out / values - 1).mean()
    assert 0.4 * error.mean() < said < 4 * error.mean() + noise


def test_what_was_fitted_before_is_not_fitted_again() -> None:
    known = design(LOOKAHEAD, 20, [], seed=1)
    first = fitted(LOOKAHEAD, known, smooth(known))
    assert fitted(LOOKAHEAD, known.copy(), smooth(known)) is first
    assert first(known).tolist() == Surface(LOOKAHEAD, known, smooth(known))(known).tolist()
    assert fitted(LOOKAHEAD, known, 2 * smooth(known)) is not first
    narrower = (RecordedKnob("window", 1, 17, True), *LOOKAHEAD[1:])
    assert fitted(narrower, known, smooth(known)) is not first


def test_constant_and_zero_quantities_stay_what_they_are() -> None:
    known, elsewhere = design(LOOKAHEAD, 20, [], seed=1), design(LOOKAHEAD, 50, [], seed=2)
    assert Surface(LOOKAHEAD, known, np.zeros(20))(elsewhere).tolist() == [0.0] * 50
    assert Surface(LOOKAHEAD, known, np.full(20, 0.3))(elsewhere) == pytest.approx(np.full(50, 0.3))
    with_zeros = Surface(LOOKAHEAD, known, np.maximum(known[:, 2] - 8, 0))
    assert with_zeros(elsewhere).min() >= 0
    assert with_zeros(elsewhere).max() > 4


def prompts_apart() -> Outcomes:
    """The first prompt needs twice the rounds of the second, and both the fewer the larger the window."""
    settings = np.array([[w, 3.0, 5.0] for w in (1, 3, 6, 9, 12, 16)])
    texts: list[Text] = []
    for count in (16, 8, 8, 4, 4, 2):
        texts += [[(32 // count, 40, 32 // count - 1)] * count, [(64 // count, 40, 64 // count - 1)] * (count // 2)]
    return built("lookahead", LOOKAHEAD, settings, texts)


def test_prompts_stay_as_different_as_they_were(profile: LatencyProfile) -> None:
    replay = OutcomeReplay([prompts_apart()], [profile], max_new_tokens=32)
    values = {"window": np.full(200, 7.0), "ngram": np.full(200, 3.0), "guesses": np.full(200, 5.0)}
    hard, easy = (
        replay.sums(np.full(200, prompt), np.zeros(200, np.int64), values, np.random.default_rng(0))
        for prompt in (0, 1)
    )
    # With the same setting drawn for both, either the rounds of both shrink, or what both save does.
    rounds, saved = hard["rounds"] / easy["rounds"], (32 - hard["rounds"]) / (32 - easy["rounds"])
    fewer, alike = np.isclose(rounds, 2), np.isclose(saved[:, None], [(32 - n) / (32 - n / 2) for n in (16, 8, 4, 2)])
    assert (fewer | alike.any(1)).all()
    assert fewer.any()
    assert alike.any()
    assert hard["seconds"] / hard["rounds"] == pytest.approx(easy["seconds"] / easy["rounds"])  # each round reads 41
    assert (hard["accepted"] <= hard["drafted"]).all()


def test_workloads_together_are_each_as_alone(exact: Outcomes, profile: LatencyProfile) -> None:
    fewer = replace(exact, settings=exact.settings[:3], starts=exact.starts[: 3 * 4 + 1])
    rounds = int(fewer.starts[-1])
    names = ("emitted", "drafted", "accepted", "draft_steps", "target_tokens", "divergence")
    fewer = replace(fewer, **{name: getattr(exact, name)[:rounds] for name in names})
    slow = replace(profile, target_seconds={1: 0.1, 2: 0.11})
    together = OutcomeReplay([exact, fewer], [profile, slow], max_new_tokens=20)
    alone = OutcomeReplay([fewer], [slow], max_new_tokens=20)
    assert together.first_prompts.tolist() == [0, 4]
    values = {"draft_length": np.tile([1.0, 2.0, 3.0, 4.0], 10)}
    local, second = np.tile(np.arange(4), 10), np.ones(40, np.int64)
    ours = together.sums(local + 4, second, values, np.random.default_rng(1))
    theirs = alone.sums(local, second - 1, values, np.random.default_rng(1))
    for name, item in theirs.items():
        assert ours[name] == pytest.approx(item), name


@pytest.mark.parametrize("workload", ["tiny/prose", "tiny-10m-ngram/code"])
def test_exact_decoding_is_replayed_as_a_trace_replays_it(workload: str, profile: LatencyProfile) -> None:
    truth = TraceWalk(
        ReplayTable([shipped_trace(workload, "train")], detours=False), profile.round_seconds(16)[None], 32
    )
    recorded, others = [1, 2, 4, 6, 8, 11, 14, 16], [3, 5, 7, 9, 10, 12, 13, 15]
    replay = OutcomeReplay([from_trace(truth, recorded)], [profile], max_new_tokens=32)
    means = replay.means(0, np.array(others, np.float64)[:, None])
    held_out = totals(from_trace(truth, others), profile, 32)
    for name, bound in (("seconds", 0.015), ("rounds", 0.02), ("drafted", 0.02), ("accepted", 0.02)):
        assert np.abs(means[name] / held_out.per_token(name) - 1).max() < bound, name
    assert replay.leave_one_out[0].mean < 0.02


def test_thresholds_are_replayed_nearly_as_a_trace_replays_them(profile: LatencyProfile) -> None:
    table = ReplayTable([shipped_trace("tiny/prose", "train")], detours=True)
    truth = TraceWalk(table, profile.round_seconds(16)[None], 32)
    knobs, random, prompts = OutcomeSettings("threshold").knobs, np.random.default_rng(0), table.prompts[0]

    def outcomes(settings: Floats, times: int = 1) -> Outcomes:
        texts: list[Text] = []
        for fallback, rollback in settings:
            for prompt in np.repeat(prompts, times):
                path = truth.choose_path(int(prompt), 0, fallback, rollback, random)
                walk = truth.walk(path, 0, float(np.float32(fallback)), rollback, 16, random)
                texts.append([(taken, drafted, kept) for _, drafted, kept, taken, _ in walk])
        return built("threshold", knobs, settings, texts)

    replay = OutcomeReplay([outcomes(design(knobs, 48, [], seed=0))], [profile], max_new_tokens=32)
    elsewhere = design(knobs, 20, [], seed=5)
    means, held_out = replay.means(0, elsewhere), totals(outcomes(elsewhere, times=10), profile, 32)
    error = np.abs(means["seconds"] / held_out.per_token("seconds") - 1)
    assert error.mean() < 0.06
    assert error.mean() < 1.5 * replay.leave_one_out[0].mean
    values = {"fallback": elsewhere[:, 0], "rollback": elsewhere[:, 1]}
    result = replay.sums(np.zeros(20, np.int64), np.zeros(20, np.int64), values, random)
    assert all(np.isfinite(item).all() for item in result.values())


def test_what_was_not_recorded_is_refused(exact: Outcomes, profile: LatencyProfile) -> None:
    with pytest.raises(OutcomeError, match=r"max_new_tokens is 21, and the speculative outcomes of toy/ids \(train\)"):
        OutcomeReplay([exact], [profile], max_new_tokens=21)
    other = replace(exact, info=replace(exact.info, draft_length=5))
    with pytest.raises(OutcomeError, match="record them alike"):
        OutcomeReplay([exact, other], [profile, profile], max_new_tokens=20)
    with pytest.raises(OutcomeError, match=r"draft_length goes from 1 to 9, .* recorded from 0 to 4; .*--decoder"):
        OutcomeReplay([exact], [profile], max_new_tokens=20).check_ranges({"draft_length": (1.0, 9.0)})


def test_a_file_is_read_back_into_the_same_replay(exact: Outcomes, profile: LatencyProfile, tmp_path: Path) -> None:
    exact.save(tmp_path / "toy.npz")
    ours, theirs = (OutcomeReplay([single], [profile], 20) for single in (exact, Outcomes.load(tmp_path / "toy.npz")))
    assert ours.leave_one_out == theirs.leave_one_out


def test_all_settings_at_an_end_where_nothing_is_drafted_are_one() -> None:
    knobs = (RecordedKnob("depth", 0, 4, True), RecordedKnob("budget", 0, 16, True), RecordedKnob("least", 0, 1, False))
    settings = np.array([[0, 8, 0.5], [0, 16, 0.1], [2, 0, 0.5], [2, 8, 0.0], [4, 16, 0.0], [1, 4, 0.0], [3, 8, 0.1]])
    plain: Text = [(1, 0, 0)] * 32
    drafted: Text = [(2, 4, 1)] * 16
    texts = [plain if not depth or not budget else drafted for depth, budget, _ in settings for _ in range(2)]
    profile = LatencyProfile("made", {0: 0.0, 8: 0.001}, {1: 0.010, 17: 0.011}, 0.010, {}, kind="draft-tree")
    replay = OutcomeReplay([built("draft-tree", knobs, settings, texts)], [profile], 32)
    asked = np.array([[0, 5, 0.9], [0, 0, 0.0], [0, 8, 0.5], [1, 5, 0.0]])
    seconds = replay.means(0, asked)["seconds"]
    assert seconds[:3].tolist() == [pytest.approx(0.010)] * 3
    assert seconds[3] < 0.009
    values = {knob.name: np.repeat(asked[:2, place], 2) for place, knob in enumerate(knobs)}
    single = replay.sums(np.array([0, 1, 0, 1]), np.zeros(4, np.int64), values, np.random.default_rng(0))
    assert single["rounds"].tolist() == single["tokens"].tolist() == [32.0] * 4
    assert not single["drafted"].any()
    # A single setting at the budget's end may draft nothing for another reason.
    assert replay.means(0, np.array([[4, 0, 0.2]]))["seconds"] != pytest.approx(0.010, rel=1e-6)
