"""Replayed decoding: exact where it is meant to be, and the same for one text as for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from specgym.decoding import (
    EXACT,
    AutoregressiveDecoder,
    Decoder,
    LatencyProfile,
    NGramDrafter,
    Pair,
    PromptLookupDrafter,
    Sampling,
    SpeculativeDecoder,
    ThresholdDecoder,
)
from specgym.envs import TokenPrompts, Workload
from specgym.envs.backends.replay_table import COPIES, ReplayTable
from specgym.envs.backends.trace_replay import TraceWalk
from specgym.envs.record import RecordSettings, record
from specgym.envs.recordings import trace_recorder
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.trace import Trace

K, TOKENS, DETOUR_TOKENS = 5, 24, 16
TAKEN_BACK = (1, 4)  # of the detours; those that ship take back the rejected token alone
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 7, 8, 9, 7]]
COST = 0.010 + 0.002 * np.arange(K + 1.0)[None]
PROFILE = LatencyProfile("any", {0: 0.0, K: 0.001 * K}, {1: 0.010, K + 1: 0.010 + 0.001 * K}, 0.010, {}, context=4)
KINDS = ("model", "model eos", "ngram", "ngram eos", "lookup", "lookup eos", "model sampled", "lookup sampled")
GREEDY = [kind for kind in KINDS if "sampled" not in kind]
SUMS = ("tokens", "rounds", "drafted", "accepted", "total_variation", "seconds")
Recorded = dict[str, tuple[Pair, Trace]]


class SameDraw:
    """A generator that always draws the same number, however many are asked for."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, size: int | None = None) -> Any:
        return self.value if size is None else np.full(size, self.value)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> Recorded:
    """Pairs with every kind of draft, with texts that end early and without, and their traces with detours."""
    result: Recorded = {}
    for kind in KINDS:
        draft, _, option = kind.partition(" ")
        target = make_model("llama", layers=1, vocabulary=24, hidden=32, context=128, spread=0.6)
        plain = AutoregressiveDecoder(Pair(target))
        texts = [plain.generate(prompt, max_new_tokens=TOKENS).tokens for prompt in PROMPTS]
        drafters: dict[str, Callable[[], Any]] = {
            "model": partial(make_noisy, target, 0.1),
            "ngram": partial(NGramDrafter.fit, [text[:15] for text in texts], 24, order=3),
            "lookup": lambda: PromptLookupDrafter(24, longest=2),
        }
        pair = Pair(target, drafters[draft](), name=kind)
        if option == "eos":
            pair.eos_token_ids = frozenset({texts[0][9], texts[1][4]})
        sampling = Sampling(1.0) if option == "sampled" else Sampling(0.0)
        work = Workload(pair, TokenPrompts(PROMPTS, PROMPTS), sampling)
        how = RecordSettings(K, prompts=4, tokens=TOKENS, detour_prompts=3, detour_tokens=DETOUR_TOKENS)
        path = tmp_path_factory.mktemp("trace") / "trace.npz"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trace_recorder, "TAKEN_BACK", TAKEN_BACK)
            result[kind] = pair, record(work, "train", path, how, profile=PROFILE)
    return result


def replay_of(trace: Trace, tokens: int, detours: bool = True, by_gain: bool = True) -> TraceWalk:
    table = ReplayTable([trace], detours=detours, profiles=[PROFILE] if by_gain else None)
    return TraceWalk(table, COST, tokens, by_gain=by_gain)


def charged(decoder: Decoder[Any], trace: Trace) -> Decoder[Any]:
    """Let drafts end where those of the replay do."""
    decoder.charge_by(replace(PROFILE, chances=trace.chances))
    return decoder


def decode(replay: TraceWalk, prompt: int, *rule: Any) -> dict[str, float]:
    """Sums of a single text, by name."""
    return dict(zip(SUMS, replay.decode(prompt, 0, *rule), strict=True))


def live_rounds(decoder: Decoder, prompt: list[int], tokens: int, **knobs: float) -> list[tuple[int, int, int]]:
    rounds = decoder.generate(prompt, max_new_tokens=tokens, knobs=knobs).rounds
    return [(round_.drafted, round_.accepted, len(round_.tokens)) for round_ in rounds]


def replayed_rounds(
    replay: TraceWalk, prompt: int, fallback: float, rollback: float = 1, longest: int = K
) -> list[tuple[int, int, int]]:
    draws = np.random.default_rng(0)
    limit = float(np.float32(fallback))
    path = replay.choose_path(prompt, 0, limit, rollback, draws)
    return [round_[1:4] for round_ in replay.walk(path, 0, limit, rollback, longest, draws)]


# Exactness.


@pytest.mark.parametrize("tokens", [1, 2, 7, TOKENS])
@pytest.mark.parametrize("kind", GREEDY)
def test_exact_greedy_decoding_is_replayed_round_by_round(recorded: Recorded, kind: str, tokens: int) -> None:
    pair, trace = recorded[kind]
    for stop in ("never", "expected-gain"):
        replay = replay_of(trace, tokens, detours=False, by_gain=stop == "expected-gain")
        decoder = charged(SpeculativeDecoder(pair, K, stop), trace)
        for number, prompt in enumerate(PROMPTS):
            text, start = decoder.generate(prompt, max_new_tokens=tokens).tokens, int(trace.starts[number])
            for longest in (1, 3, K):
                replayed = replayed_rounds(replay, number, EXACT, longest=longest)
                assert replayed == live_rounds(decoder, prompt, tokens, draft_length=longest)
                assert trace.text[start : start + sum(taken for _, _, taken in replayed)].tolist() == text


@pytest.mark.parametrize("rollback", [1, 3, K])
@pytest.mark.parametrize("kind", GREEDY)
def test_thresholds_at_a_fallback_of_zero_are_replayed_exactly(recorded: Recorded, kind: str, rollback: int) -> None:
    pair, trace = recorded[kind]
    replay, decoder = replay_of(trace, DETOUR_TOKENS), charged(ThresholdDecoder(pair, K), trace)
    for number in replay.table.prompts[0]:
        live = live_rounds(decoder, PROMPTS[number], DETOUR_TOKENS, fallback=0, rollback=rollback)
        assert replayed_rounds(replay, number, 0.0, rollback) == live


@pytest.mark.parametrize("tokens", [6, DETOUR_TOKENS])
@pytest.mark.parametrize("kind", GREEDY)
def test_recorded_thresholds_are_replayed_exactly(recorded: Recorded, kind: str, tokens: int) -> None:
    pair, trace = recorded[kind]
    replay = replay_of(trace, tokens)
    compared = 0
    for number, (fallback, rollback) in zip(trace.detour_prompts, trace.detour_knobs, strict=True):
        row_ids = trace.detour_rows[(trace.detour_prompts == number) & (trace.detour_knobs[:, 0] == fallback)]
        distance = trace.distance[row_ids[row_ids >= 0]]
        path = replay.choose_path(number, 0, fallback, rollback, np.random.default_rng(0))
        near = (np.abs(distance - fallback) < 0.004 * fallback).any()
        if near or replay.table.lengths[path] < tokens < DETOUR_TOKENS:
            # So near to the threshold, the file's rounding may decide otherwise. And a draft cut short by the budget
            # may keep what the recorded one did not, and so miss the end of the recorded text.
            continue
        decoder = charged(ThresholdDecoder(pair, K), trace)
        knobs = {"fallback": float(fallback), "rollback": float(rollback)}
        live = live_rounds(decoder, PROMPTS[number], tokens, **knobs)
        assert replayed_rounds(replay, number, fallback, rollback) == live
        generation = decoder.generate(PROMPTS[number], max_new_tokens=tokens, knobs=knobs)
        result = decode(replay, number, fallback, rollback, K, np.random.default_rng(0))
        divergence = sum(round_.divergence for round_ in generation.rounds)
        assert result["total_variation"] == pytest.approx(divergence, rel=0.005, abs=1e-6)
        compared += 1
    assert compared >= 3  # of 12


def test_some_recorded_texts_end_early(recorded: Recorded) -> None:
    """Otherwise the tests above would not show that ends are replayed."""
    for kind in GREEDY:
        trace = recorded[kind][1]
        assert trace.ended.any() == ("eos" in kind)
    table = ReplayTable([recorded["model eos"][1]], detours=True)
    assert (table.lengths[4:] < DETOUR_TOKENS).any()


def test_sums_charge_every_round_by_its_draft(recorded: Recorded) -> None:
    pair, trace = recorded["lookup"]
    rounds = live_rounds(SpeculativeDecoder(pair, K), PROMPTS[0], TOKENS, draft_length=K)
    result = decode(replay_of(trace, TOKENS, detours=False, by_gain=False), 0, EXACT, 1, K, np.random.default_rng(0))
    assert result == pytest.approx(
        {
            "tokens": sum(taken for _, _, taken in rounds),
            "rounds": len(rounds),
            "drafted": sum(drafted for drafted, _, _ in rounds),
            "accepted": sum(accepted for _, accepted, _ in rounds),
            "total_variation": 0,
            "seconds": sum(0.010 + 0.002 * drafted for drafted, _, _ in rounds),
        }
    )


def test_what_was_not_recorded_goes_on_at_as_many_tokens_of_the_path(recorded: Recorded) -> None:
    trace = recorded["model"][1]
    replay = replay_of(replace(trace, jump=np.full_like(trace.jump, -1)), DETOUR_TOKENS)
    path = int(replay.table.paths[1, 2, 0])
    count = 0
    for row, _, _, taken, _ in replay.walk(path, 0, 0.6, 2.0, K, np.random.default_rng(0)):
        assert row == replay.table.routes[path, count]
        count += taken
    assert count == DETOUR_TOKENS


# One text and many.


def many(replay: TraceWalk, prompts: Any, fallback: Any, rollback: Any, longest: Any, draws: Any) -> dict[str, Any]:
    numbers = np.asarray(prompts)
    return replay.decode_many(
        numbers,
        np.zeros(len(numbers), np.int64),
        np.asarray(fallback, np.float64),
        np.asarray(rollback, np.float64),
        np.asarray(longest),
        draws,
    )


@given(
    kind=st.sampled_from(KINDS),
    prompt=st.sampled_from([0, 1, 2]),
    fallback=st.one_of(st.floats(0, 1), st.just(EXACT)),
    rollback=st.one_of(st.floats(1, K), st.integers(1, K)),
    longest=st.integers(1, K),
    tokens=st.integers(1, DETOUR_TOKENS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=300)
def test_one_text_is_decoded_as_it_is_among_many_given_the_same_generator(
    recorded: Recorded,
    kind: str,
    prompt: int,
    fallback: float,
    rollback: float,
    longest: int,
    tokens: int,
    seed: int,
) -> None:
    replay = replay_of(recorded[kind][1], tokens, detours=fallback != EXACT)
    one_draws, many_draws = np.random.default_rng(seed), np.random.default_rng(seed)
    single = decode(replay, prompt, fallback, rollback, longest, one_draws)
    result = many(replay, [prompt], [fallback], [rollback], [longest], many_draws)
    assert {name: values.item() for name, values in result.items()} == pytest.approx(single, rel=1e-6)
    assert one_draws.random() == many_draws.random()  # and as much was drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [0.0, 0.3, 0.7, 0.999])
def test_many_texts_are_decoded_as_each_is_alone_given_the_same_draws(
    recorded: Recorded, kind: str, draw: float
) -> None:
    replay = replay_of(recorded[kind][1], DETOUR_TOKENS)
    draws: Any = SameDraw(draw)
    grid = np.random.default_rng(0)
    prompts, fallback, rollback = grid.integers(3, size=60), grid.uniform(0, 1, 60), grid.uniform(1, K, 60)
    longest = grid.integers(1, K + 1, 60)
    result = many(replay, prompts, fallback, rollback, longest, draws)
    for place in range(60):
        alone = decode(replay, int(prompts[place]), fallback[place], rollback[place], int(longest[place]), draws)
        assert {name: values[place] for name, values in result.items()} == pytest.approx(alone, rel=1e-6)


def test_several_traces_are_replayed_together_as_each_is_apart(recorded: Recorded) -> None:
    traces = [recorded[kind][1] for kind in ("model", "model sampled", "lookup eos")]
    costs = np.concatenate([COST, 2 * COST, 3 * COST])
    draws: Any = SameDraw(0.4)
    together = TraceWalk(ReplayTable(traces, detours=True), costs, 12)
    apart = [
        TraceWalk(ReplayTable([trace], detours=True), cost[None], 12) for trace, cost in zip(traces, costs, strict=True)
    ]
    # The dice of a table are thrown in one go, so only the first copies of a single sampled trace are the same.
    sampled = apart[1].table
    start = int(together.table.places[apart[0].table.drafted.size])
    sampled.needed[:] = together.table.needed[start : start + len(sampled.needed)]
    texts = [(prompt, trace) for trace in range(3) for prompt in range(3)]
    prompts = np.array([prompt for prompt, _ in texts]) + together.table.first_prompts[[trace for _, trace in texts]]
    numbers = np.array([trace for _, trace in texts])
    fallback, rollback = np.full(9, 0.45), np.full(9, 2.5)
    result = together.decode_many(prompts, numbers, fallback, rollback, np.full(9, K), draws)
    for place, (prompt, trace) in enumerate(texts):
        alone = decode(apart[trace], prompt, 0.45, 2.5, K, draws)
        assert {name: values[place] for name, values in result.items()} == pytest.approx(alone, rel=1e-6)


# Chance.


def test_dice_accept_as_often_as_the_exact_test_would(recorded: Recorded) -> None:
    trace = recorded["model sampled"][1]
    table = ReplayTable([trace], detours=True)
    first = (table.needed[:, 0].reshape(-1, COPIES) == EXACT).mean(1)
    local = len(trace.text)
    expected = np.minimum(1, trace.p[:, 0] / trace.q[:, 0])
    # 16 throws for each of 96 rows: the mean's standard deviation is at most 0.013
    assert first[:local].mean() == pytest.approx(expected.mean(), abs=0.05)
    assert np.corrcoef(first[:local], expected)[0, 1] > 0.8
    assert first[local:].mean() == pytest.approx(1 - trace.distance[local:, 0].mean(), abs=0.05)


def test_sampled_decoding_is_replayed_in_distribution(recorded: Recorded) -> None:
    pair, trace = recorded["model sampled"]
    replay = replay_of(trace, TOKENS, detours=False, by_gain=False)
    result = many(replay, np.tile(range(4), 500), np.full(2000, EXACT), np.ones(2000), np.full(2000, 3),
                 np.random.default_rng(0))  # fmt: skip
    decoder = SpeculativeDecoder(pair, 3)
    lives = [
        decoder.generate(prompt, max_new_tokens=TOKENS, sampling=Sampling(1.0), seed=seed, knobs={"draft_length": 3})
        for prompt in PROMPTS
        for seed in range(10)
    ]
    live = sum(len(text.rounds) for text in lives) / len(lives)
    # The four recorded texts are as many draws from the many there are, so this is a coarse comparison.
    assert result["rounds"].mean() == pytest.approx(live, rel=0.15)


def test_a_path_is_drawn_by_how_near_its_thresholds_are(recorded: Recorded) -> None:
    table = ReplayTable([recorded["model"][1]], detours=True)
    replay = TraceWalk(table, COST, 8)
    fallbacks, rollbacks = table.tolerances[0], np.exp(table.log_taken_back[0])
    assert fallbacks == pytest.approx([0, *trace_recorder.TOLERANCES])
    assert rollbacks == pytest.approx(TAKEN_BACK)
    count = 4000
    paths = replay.choose_paths(
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.full(count, 0.7, np.float32),
        np.full(count, 2.0),
        np.random.default_rng(0),
    )
    # 0.7 is a quarter of the way from 0.6 to 1, and 2 half-way from 1 to 4 for the logarithm.
    for fallback, rollback, share in ((3, 0, 0.375), (3, 1, 0.375), (4, 0, 0.125), (4, 1, 0.125)):
        assert (paths == table.paths[0, fallback, rollback]).mean() == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999])
def test_recorded_thresholds_always_take_their_own_path(recorded: Recorded, draw: float) -> None:
    table = ReplayTable([recorded["model"][1]], detours=True)
    replay = TraceWalk(table, COST, 8)
    draws: Any = SameDraw(draw)
    for place, fallback in enumerate((0.0, *trace_recorder.TOLERANCES)):
        for number, rollback in enumerate(TAKEN_BACK):
            path = replay.choose_path(2, 0, float(np.float32(fallback)), rollback, draws)
            assert path == table.paths[2, place, number]


def test_a_fraction_of_a_rollback_is_rounded_anew_every_round(recorded: Recorded) -> None:
    table = ReplayTable([recorded["model"][1]], detours=True)
    replay = TraceWalk(table, COST, DETOUR_TOKENS)  # drafts as long as they may be, so that there is much to take back
    path = int(table.paths[0, 2, 0])
    rounds = {tuple(replay.walk(path, 0, 0.5, 2.5, K, np.random.default_rng(seed))) for seed in range(50)}
    assert len(rounds) > 2  # one number for the whole text would give two
    assert tuple(replay.walk(path, 0, 0.5, 2.0, K, np.random.default_rng(0))) in rounds


# What a table refuses, and does without.


def test_without_detours_every_path_is_the_targets_own(recorded: Recorded) -> None:
    trace = recorded["model"][1]
    bare = replace(
        trace,
        detour_prompts=trace.detour_prompts[:0],
        detour_knobs=trace.detour_knobs[:0],
        detour_rows=trace.detour_rows[:0],
    )
    for table in (ReplayTable([bare], detours=True), ReplayTable([bare, trace], detours=True)):
        assert table.prompts[0].tolist() == [0, 1, 2, 3]
        paths = TraceWalk(table, COST, 8).choose_paths(
            np.arange(4),
            np.zeros(4, np.int64),
            np.full(4, 0.7, np.float32),
            np.full(4, 2.0),
            np.random.default_rng(0),
        )
        assert paths.tolist() == [0, 1, 2, 3]


def test_a_missing_detour_is_refused(recorded: Recorded) -> None:
    trace = recorded["model"][1]
    with pytest.raises(TraceError, match=r"the trace of model/ids \(train\) lacks detours"):
        ReplayTable([replace(trace, **{name: getattr(trace, name)[1:] for name in (
            "detour_prompts", "detour_knobs", "detour_rows")})], detours=True)  # fmt: skip


def test_traces_with_detours_of_more_or_fewer_thresholds_are_refused(recorded: Recorded) -> None:
    trace = recorded["model"][1]
    few = trace.detour_knobs[:, 0] < 0.7
    fewer = replace(
        trace,
        detour_prompts=trace.detour_prompts[few],
        detour_knobs=trace.detour_knobs[few],
        detour_rows=trace.detour_rows[few],
    )
    with pytest.raises(TraceError, match="detours of more or fewer thresholds"):
        ReplayTable([trace, fewer], detours=True)
