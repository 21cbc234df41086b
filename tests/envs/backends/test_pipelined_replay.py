"""The replay of pipelined decoding is what live decoding does, round by round, and is charged as its parts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from specgym.decoding import LatencyProfile, Pair, PipelinedDecoder, Round, Sampling, roofline, traits_of
from specgym.decoding.latency.model_shapes import MODEL_SHAPES
from specgym.envs import PipelinedReplay, TokenPrompts, Trace, Workload, replay_backend
from specgym.envs.record import RecordSettings, record
from tests.helpers.inline_drafts import work_in_line

K, TOKENS = 6, 24
PROMPTS = [[1, 2, 3], [4, 5], [6, 2, 9, 9], [7]]
DRAFT = {tokens: 1e-3 + 2e-3 * tokens for tokens in range(1, 9)}  # as it is measured: of no tokens nothing is known
TARGET = {tokens: 5e-3 + 1e-4 * tokens for tokens in range(1, 10)}
PLAIN = 4e-3
PROFILE = LatencyProfile("toy", DRAFT, TARGET, PLAIN, {}, kind="pipelined", overlaps=True)
KNOBS = [(4, 1), (4, 0), (1, 1), (1, 0), (0, 1), (6, 1), (5, 0)]


@pytest.fixture(scope="module", params=[0.0, 0.8])
def recorded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> tuple[Workload, Trace]:
    target = make_model("llama", layers=1, vocabulary=24, hidden=32, context=128, spread=0.6)
    pair = Pair(target, make_noisy(target, 0.1), name="model")
    work = Workload(pair, TokenPrompts(PROMPTS, PROMPTS), Sampling(request.param))
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    return work, record(work, "train", path, RecordSettings(K, 4, TOKENS, detour_prompts=0))


def replay(work: Workload, trace: Trace) -> PipelinedReplay:
    return PipelinedReplay(traits_of("pipelined"), [trace], [work], [PROFILE], TOKENS, {"max_draft_length": K})


def metrics(backend: PipelinedReplay, prompts: Any, knobs: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    arrays = {
        name: np.full(len(prompts), float(value))
        for name, value in zip(("draft_length", "pre_verify"), knobs, strict=True)
    }
    which = np.array(prompts)
    return backend.decode(which, np.zeros(len(which), int), arrays, np.random.default_rng(seed))._asdict()


def test_the_replay_is_live_decoding(recorded: tuple[Workload, Trace], monkeypatch: pytest.MonkeyPatch) -> None:
    """Round for round when greedy; on average over seeds when sampling, on texts that are not the recorded ones.

    Where a draft works changes nothing about its rounds, which `test_pipelined` shows.
    """
    work_in_line(monkeypatch)
    work, trace = recorded
    backend = replay(work, trace)
    decoder = PipelinedDecoder(work.load(), K)
    for window, pre_verify in KNOBS:
        knobs = {"draft_length": window, "pre_verify": pre_verify}
        if not work.sampling.greedy and (window, pre_verify) != (4, 1):
            continue
        rounds: list[list[Round]] = []
        seeds = range(1 if work.sampling.greedy else 12)
        for prompt in PROMPTS:
            for seed in seeds:
                text = decoder.generate(prompt, max_new_tokens=TOKENS, sampling=work.sampling, seed=seed, knobs=knobs)
                rounds.append(text.rounds)
        live: dict[str, list[Any]] = {
            "tokens": [sum(len(round_.tokens) for round_ in text) for text in rounds],
            "rounds": [len(text) for text in rounds],
            "drafted": [sum(round_.drafted for round_ in text) for text in rounds],
            "accepted": [sum(round_.accepted for round_ in text) for text in rounds],
            "seconds": [PROFILE.charge(text) for text in rounds],
        }
        if work.sampling.greedy:
            replayed = metrics(backend, range(len(PROMPTS)), (window, pre_verify))
            for name, values in live.items():
                assert replayed[name] == pytest.approx(values), (name, knobs)
        else:
            replayed = metrics(backend, list(range(len(PROMPTS))) * 100, (window, pre_verify))
            for name, values in live.items():
                assert np.mean(replayed[name]) == pytest.approx(np.mean(values), rel=0.15), name


def test_many_texts_are_what_each_is_alone(recorded: tuple[Workload, Trace]) -> None:
    backend = replay(*recorded)
    for knobs in KNOBS[:2]:
        together = metrics(backend, list(range(4)) * 100, knobs)
        alone = [metrics(backend, [prompt], knobs, seed) for prompt in range(4) for seed in range(50)]
        for name in ("tokens", "rounds", "drafted", "accepted", "seconds"):
            mean = np.mean([values[name] for values in alone])
            assert np.mean(together[name]) == pytest.approx(mean, rel=1e-9 if trace_is_greedy(recorded) else 0.05)
    assert (together["accepted"] <= together["drafted"]).all()
    assert together["total_variation"].sum() == 0


def trace_is_greedy(recorded: tuple[Workload, Trace]) -> bool:
    return recorded[1].info.sampling.greedy


def test_two_devices_take_the_longer_of_both_times() -> None:
    shapes = MODEL_SHAPES["opt-6.7b"], MODEL_SHAPES["opt-125m"]
    profile = roofline(*shapes, "h100-sxm", decoder="pipelined", contexts=(512,))
    turns = roofline(*shapes, "h100-sxm", contexts=(512,))
    assert (profile.kind, profile.overlaps) == (traits_of("pipelined").cost_kind(True), True)
    assert profile.round_of(4, 5) == max(turns.draft(4), turns.target(5)) < turns.round_of(4, 5)


def test_a_profile_of_rounds_in_turns_is_refused() -> None:
    turns = LatencyProfile("tiny", DRAFT, TARGET, 4e-3, {})
    with pytest.raises(ValueError, match="was made for chain rounds, and pipelined rounds are to be charged"):
        replay_backend("pipelined", "tiny/prose", None, split="test", profile=turns)
