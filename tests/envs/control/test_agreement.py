"""Control of the draft length: live and replayed decoding are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.decoding.decoders.autoregressive import AutoregressiveDecoder
from specgym.decoding.decoders.chain import SpeculativeDecoder
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.envs import Workload
from specgym.envs.control.env import DraftLengthEnv
from specgym.envs.control.live import UNKNOWN
from specgym.envs.recordings.trace import Trace
from tests.helpers.drafted_texts import GO, LONGEST, PLACE, PRODUCT, PROMPTS, STOP, TOKENS, play

Recorded = Callable[[str], tuple[Workload, Path]]
MakeEnv = Callable[..., DraftLengthEnv]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every session that live environments start."""
    seen: list[Any] = []
    real = SpeculativeDecoder.start

    def spy(self: SpeculativeDecoder, *arguments: Any, **more: Any) -> Any:
        seen.append(real(self, *arguments, **more))
        return seen[-1]

    monkeypatch.setattr(SpeculativeDecoder, "start", spy)
    return seen


@pytest.mark.parametrize("kind", ["model", "ngram", "lookup", "model eos", "ngram eos", "lookup eos"])
def test_greedy_replay_is_live_decoding(make_env: MakeEnv, recorded: Recorded, sessions: list[Any], kind: str) -> None:
    options = {"rate": 1.3, "batch_size": 1, "decision_seconds": 0.0004}
    live, replay = make_env("live", kind, **options), make_env("replay", kind, **options)
    pair = recorded(kind)[0].load()
    rounds_without_a_draft = 0
    for prompt in range(4):
        expected = AutoregressiveDecoder(pair).generate(PROMPTS.train[prompt], max_new_tokens=TOKENS).tokens
        for seed in range(4):
            truth, copy = (play(env, prompt, np.random.default_rng(seed)) for env in (live, replay))
            assert sessions[-1].tokens == expected
            assert len(truth) == len(copy)
            for (observed, reward, ended, info), (observed2, reward2, ended2, info2) in zip(truth, copy, strict=True):
                allowed = np.full(11, 0.005)  # a recorded number keeps eight bits
                allowed[PRODUCT] *= LONGEST
                assert (abs(observed2 - observed) <= allowed * abs(observed) + 1e-6).all()
                assert reward2 == reward
                assert ended2 == ended
                assert info.pop("remaining_acceptable") == UNKNOWN
                assert info2.pop("remaining_acceptable") != UNKNOWN
                assert info2 == info
                rounds_without_a_draft += max(info["rounds"] - 1, 0)
    assert rounds_without_a_draft > 0 or "eos" in kind  # where one token remained, and where the draft knew none


def test_texts_that_end_by_themselves_are_among_those_replayed(recorded: Recorded) -> None:
    for kind in ("model eos", "ngram eos", "lookup eos"):
        assert Trace.load(recorded(kind)[1]).ended.any()


def test_a_draft_that_knows_nothing_at_first_is_observed_as_none(make_env: MakeEnv) -> None:
    for backend in ("live", "replay"):
        env = make_env(backend, "lookup")
        observation, info = env.reset(seed=0, options={"prompt": 2})  # a single token, so nothing to copy
        assert observation[PLACE] == 0
        assert info["rounds"] == 0
        observation, reward, _, _, info = env.step(GO)
        assert info["drafted"] == 0
        assert info["rounds"] == info["tokens"] >= 1
        assert observation[PLACE] == 1
        assert reward == pytest.approx(info["tokens"] - info["rounds"])  # plain decoding at a rate of 1


def test_replay_loads_no_model(make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workload) -> Pair:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Workload, "load", refuse)
    assert len(play(make_env("replay"), 0, STOP)) > 1


def test_a_trace_alone_says_which_workload_it_is_of(recorded: Recorded, profile: LatencyProfile) -> None:
    env = DraftLengthEnv(
        backend="replay",
        recording=recorded("model")[1],
        max_new_tokens=TOKENS,
        max_draft_length=LONGEST,
        profile=profile,
    )
    assert env.reset(seed=0)[1]["workload"] == env.workload.name == "model/ids"
