"""Control of live texts that step together: each as if it were alone, in joined passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding import AutoregressiveDecoder, LatencyProfile
from specgym.envs import DraftChoiceEnv, DraftChoiceVectorEnv, Workload
from specgym.envs.control.control_vector_env import ControlVectorEnv
from specgym.envs.control.env import DraftLengthEnv
from specgym.envs.control.live import LiveDrafts
from specgym.envs.recordings.mixed_trace import MixedTrace
from tests.helpers.drafted_texts import LONGEST, PROMPTS, TOKENS
from tests.helpers.made_up_mixed import made_up_costs

Recorded = Callable[[str], tuple[Workload, Path]]
Mixed = Callable[[str], tuple[Workload, MixedTrace]]
Single = DraftLengthEnv | DraftChoiceEnv

LENGTH, CHOICE = "specgym/DraftLength-v0", "specgym/DraftChoice-v0"
STEP = ("tokens", "seconds", "drafted", "accepted", "rounds")
TOTALS = ("total_tokens", "total_seconds", "throughput")


@pytest.fixture
def options(recorded: Recorded, mixed: Mixed, profile: LatencyProfile) -> Callable[..., dict[str, Any]]:
    """Arguments of live environments, by their id and the kinds of their workloads."""

    def make(name: str, *kinds: str) -> dict[str, Any]:
        common = {"backend": "live", "max_draft_length": LONGEST, "max_new_tokens": TOKENS, "rate": 1.3}
        if name == LENGTH:
            return {**common, "workload": [recorded(kind)[0] for kind in kinds], "profile": profile}
        traces = [mixed(kind)[1] for kind in kinds]
        profiles = [made_up_costs(trace).with_chances(trace.chances) for trace in traces]
        return {**common, "workload": [mixed(kind)[0] for kind in kinds], "profile": profiles}

    return make


def together(name: str, num_envs: int, options: dict[str, Any]) -> ControlVectorEnv:
    env = gymnasium.make_vec(name, num_envs=num_envs, **options)
    assert isinstance(env, ControlVectorEnv)
    return env


def singles_of(env: ControlVectorEnv, name: str, options: dict[str, Any], prompts: list[int]) -> list[Single]:
    """Single environments at the prompts of some that step together, each with the seed that its text has there."""
    rng = gymnasium.utils.seeding.np_random(0)[0]
    singles = []
    for place, prompt in zip(env.workload_of.tolist(), prompts, strict=True):
        profile = options["profile"]
        changes = {
            "workload": options["workload"][place],
            "profile": profile[place] if isinstance(profile, list) else profile,
        }
        single: Any = gymnasium.make(name, **(options | changes)).unwrapped
        single.np_random = rng
        single.reset(options={"prompt": prompt})
        singles.append(single)
    return singles


def tokens_of(env: Any, place: int = 0) -> list[int]:
    return list(env._drafts.sessions[place].tokens)


def play(env: ControlVectorEnv, name: str, options: dict[str, Any], passes: list[int]) -> set[str]:
    """Play four texts together and one by one; return what differs, and check that passes were joined."""
    prompts = [0, 1, 2, 3]
    env.reset(seed=0, options={"prompt": prompts})
    singles = singles_of(env, name, options, prompts)
    rng, wrong, ended_at = np.random.default_rng(3), set[str](), list[int]()
    shared = 0
    while not env.resting.all():
        ended_at.append(int(env.resting.sum()))
        resting, actions = env.resting, rng.integers(2 if name == LENGTH else 7, size=4)
        passes.clear()
        observations, rewards, terminated, truncated, infos = env.step(actions)
        verified = int((infos["rounds"] > 0).sum())
        if verified > 1 and len(env.workload_names) == 1:
            shared += 1
            assert verified in passes
        assert not truncated.any()
        assert env.observation_space.contains(observations)
        for place, single in enumerate(singles):
            if resting[place]:
                wrong |= {key for key in STEP if infos[key][place] != 0}
                continue
            observed, reward, ended, _, info = single.step(actions[place])
            if not np.allclose(observations[place], observed, atol=1e-4):
                wrong.add("features")
            if isinstance(single, DraftChoiceEnv) and isinstance(env, DraftChoiceVectorEnv):
                wrong |= {"masks"} if (env.action_masks()[place] != single.action_masks()).any() else set()
            wrong |= {key for key in STEP if infos[key][place] != info[key]}
            if rewards[place] != pytest.approx(reward) or terminated[place] != ended:
                wrong.add("reward or end")
            if ended:
                final = infos["final_info"]
                wrong |= {key for key in (*STEP, *TOTALS) if final[key][place] != pytest.approx(info[key])}
                if not np.allclose(infos["final_obs"][place], observed, atol=1e-4):
                    wrong.add("final_obs")
    if any(tokens_of(env, place) != tokens_of(single) for place, single in enumerate(singles)):
        wrong.add("text")
    assert set(ended_at) >= {0, 1}  # texts went on while others had ended
    assert shared > 2 or len(env.workload_names) > 1
    return wrong


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (LENGTH, ["model eos"]),
        (LENGTH, ["model sampled", "lookup"]),
        (CHOICE, ["eos"]),
        (CHOICE, ["greedy", "sampled"]),
    ],
)
def test_live_texts_that_step_together_are_as_many_single_ones(
    options: Callable[..., dict[str, Any]], joint_passes: list[int], name: str, kinds: list[str]
) -> None:
    arguments = options(name, *kinds)
    env = together(name, 4, arguments)
    assert play(env, name, arguments, joint_passes) == set()
    for place, workload in enumerate(env.workload_of.tolist()):
        work = arguments["workload"][workload]
        if work.sampling.greedy:
            plain = AutoregressiveDecoder(work.load()).generate(PROMPTS.train[place], max_new_tokens=TOKENS)
            assert tokens_of(env, place) == plain.tokens


def test_features_of_another_text_would_be_told(
    options: Callable[..., dict[str, Any]], joint_passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = LiveDrafts._show
    monkeypatch.setattr(LiveDrafts, "_show", lambda self, place, session: show(self, place - 1, session))
    arguments = options(LENGTH, "model eos")
    assert "features" in play(together(LENGTH, 4, arguments), LENGTH, arguments, joint_passes)


def test_charges_of_another_text_would_be_told(
    options: Callable[..., dict[str, Any]], joint_passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    act = LiveDrafts._act

    def mixed_up(self: LiveDrafts, which: Any, actions: Any, steps: Any) -> None:
        act(self, which, actions, steps)
        steps.seconds[which] = np.roll(steps.seconds[which], 1)

    monkeypatch.setattr(LiveDrafts, "_act", mixed_up)
    arguments = options(LENGTH, "model eos")
    assert play(together(LENGTH, 4, arguments), LENGTH, arguments, joint_passes) >= {"seconds", "reward or end"}


@pytest.mark.parametrize(("name", "kind"), [(LENGTH, "model eos"), (CHOICE, "eos")])
def test_a_text_that_ends_or_is_cut_is_followed_by_another(
    options: Callable[..., dict[str, Any]], joint_passes: list[int], name: str, kind: str
) -> None:
    env: Any = together(name, 3, {**options(name, kind), "max_episode_steps": 25})
    plain = AutoregressiveDecoder(options(name, kind)["workload"][0].load())
    env.reset(seed=1)
    rng, ended, cut = np.random.default_rng(0), 0, 0
    for _ in range(80):
        sessions = list(env._drafts.sessions)
        _, _, terminated, truncated, infos = env.step(rng.integers(env.single_action_space.n, size=3))
        assert not env.resting.any()
        for place in np.flatnonzero(terminated | truncated).tolist():
            session = sessions[place]
            assert session is not env._drafts.sessions[place]
            assert infos["final_info"]["total_tokens"][place] == len(session.tokens)
            prompt = session.context[: len(session.context) - len(session.tokens)]
            text = plain.generate(prompt, max_new_tokens=TOKENS).tokens
            assert session.tokens == text[: len(session.tokens)]
            assert terminated[place] == (session.tokens == text)
        ended, cut = ended + int(terminated.sum()), cut + int(truncated.sum())
    assert ended > 3
    assert cut > 3
    assert joint_passes.count(3) > 10


def test_who_has_no_prompt_is_seen_as_in_a_replay(
    options: Callable[..., dict[str, Any]], mixed: Mixed, recorded: Recorded
) -> None:
    recordings = {LENGTH: recorded("model")[1], CHOICE: mixed("greedy")[1]}
    for name, kind in ((LENGTH, "model"), (CHOICE, "greedy")):
        arguments = options(name, kind)
        observed = []
        for changes in ({}, {"backend": "replay", "recording": [recordings[name]]}):
            env = together(name, 3, arguments | changes)
            env.reset(seed=0)
            observations, infos = env.reset(seed=0, options={"prompt": [-1, 2, -1]})
            assert env.resting.tolist() == [True, False, True]
            observed.append(observations)
        np.testing.assert_allclose(observed[0], observed[1], rtol=0.01)
        assert (infos["tokens"] == 0).all()


def test_each_batch_size_is_charged_and_seen(options: Callable[..., dict[str, Any]]) -> None:
    env = together(LENGTH, 4, {**options(LENGTH, "model"), "batch_size": [1, 8]})
    observations, _ = env.reset(seed=0)
    assert observations[:, 7].tolist() == [0, 3, 0, 3]
    infos = env.step(np.ones(4, np.int64))[4]
    np.testing.assert_allclose(infos["seconds"], [0.012, 0.026, 0.012, 0.026])


def test_drafts_are_not_missing_live(options: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="missing_drafts is for backend='replay'"):
        together(CHOICE, 2, {**options(CHOICE, "greedy"), "missing_drafts": 0.5})
    trace = options(CHOICE, "greedy")
    with pytest.raises(ValueError, match="recording is for backend='replay'; the backend is 'live'"):
        together(CHOICE, 2, {**trace, "recording": ["some.npz"]})
