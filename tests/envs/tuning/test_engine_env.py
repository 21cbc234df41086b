"""Tuning on an engine: what Gymnasium and Stable-Baselines3 ask, what is measured, what is stopped and refused."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import (
    ArgumentError,
    EngineError,
    EngineOptions,
    EngineText,
    KnobError,
    PromptSet,
    SettingIgnoredError,
)
from specgym.decoding.engines import engine as engines
from specgym.envs import EngineEnv, ObserveContext, VectorObserveContext, VectorWorkloadMark
from tests.helpers.fake_engine import Behaviour, FakeEngine, FakeServed

ID = "specgym/Engine-v0"
TEXTS = PromptSet("texts", tuple(f"train {place}" for place in range(8)), ("test 0", "test 1"), "made up", "CC0")
OTHERS = PromptSet("others", tuple(f"other {place}" for place in range(3)), ("test 2",), "made up", "CC0")
STILL = np.zeros(1, np.float32)


def single(behaviour: Behaviour | None = None, **arguments: Any) -> gymnasium.Env:
    return gymnasium.make(ID, engine=FakeEngine(behaviour=behaviour), prompts=TEXTS, **arguments)


def together(behaviour: Behaviour | None = None, prompts: Any = TEXTS, **arguments: Any) -> gymnasium.vector.VectorEnv:
    return gymnasium.make_vec(ID, engine=FakeEngine(behaviour=behaviour), prompts=prompts, **arguments)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """Behaviour of the engine that is opened by the name of llama.cpp."""
    behaviour = Behaviour()

    class Named(FakeEngine):
        def __init__(self, target: str, draft: str | None, options: EngineOptions | None) -> None:
            behaviour.opened.append(options)
            super().__init__(target, draft, options, behaviour)

    monkeypatch.setattr(engines.pkgutil, "resolve_name", lambda name: Named)
    return behaviour


def test_passes_both_checkers_without_a_warning(named: Behaviour) -> None:
    env = gymnasium.make(ID, engine="llama.cpp", target="t.gguf", draft="d.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        check_env_sb3(env.unwrapped)
    env.close()
    assert named.open == 0


def test_a_step_compares_the_setting_with_plain_decoding() -> None:
    behaviour = Behaviour(alpha=1.0)
    env = single(behaviour, max_new_tokens=21, prompts_per_step=2)
    start, info = env.reset(seed=0, options={"knobs": {"num_tokens": 4}})
    assert start.tolist() == [4.0]
    assert behaviour.asked == []  # reset starts nothing
    _, reward, _, _, seen = env.step(STILL)
    assert seen.keys() == info.keys()
    assert {name: seen[name] for name in ("tokens", "rounds", "drafted", "accepted", "knobs/num_tokens")} == {
        "tokens": 40,
        "rounds": 8,
        "drafted": 32,
        "accepted": 32,
        "knobs/num_tokens": 4,
    }
    assert seen["speedup"] == pytest.approx(20 / (4 * 1.4))
    assert seen["equal_texts"] == 1.0
    assert info["equal_texts"] == info["speedup"] == 0.0
    assert reward == pytest.approx(seen["speedup"] + 0.1)
    assert env.get_wrapper_attr("workload").name == "fake+target+draft/texts"
    assert behaviour.asked == [None, {"num_tokens": 4.0}]


def test_text_that_differs_is_reported_and_costs_what_it_is_asked_to() -> None:
    rewards = dict[bool, float]()
    for strays in (False, True):
        env = single(Behaviour(strays=strays), unequal_weight=2.0)
        env.reset(seed=0, options={"knobs": {"num_tokens": 4}})
        _, reward, _, _, info = env.step(STILL)
        rewards[strays] = float(reward)
        assert info["equal_texts"] == float(not strays)
        assert info["reward/equality"] == -2.0 * strays
    assert rewards[False] - rewards[True] == pytest.approx(2.0)


def test_a_seed_fixes_the_prompts_and_the_knobs_to_start_from() -> None:
    def episode(seed: int) -> tuple[Any, list[list[str]]]:
        behaviour = Behaviour()
        env = single(behaviour, start="random")
        first = env.reset(seed=seed)[0].tolist()
        for _ in range(8):
            env.step(STILL)
        return first, behaviour.prompts[:1]

    assert episode(3) == episode(3) != episode(4)
    assert sorted(episode(3)[1][0][1:]) == sorted(TEXTS.train)  # all before any comes again


def test_an_engine_that_remembers_is_restarted_before_it_sees_a_prompt_again() -> None:
    behaviour = Behaviour(remembers=True)
    env = single(behaviour)
    env.reset(seed=0, options={"knobs": {"num_tokens": 4}, "prompt": 1})
    for _ in range(3):
        env.step(STILL)
    drafting = behaviour.prompts[1:]
    assert [texts.count("train 1") for texts in drafting] == [1, 1, 1]
    with pytest.raises(ArgumentError, match="an engine's environment takes the index of one of the 8 train prompts"):
        env.reset(options={"prompt": "words"})


def test_an_engine_that_dies_is_started_anew_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour = Behaviour()
    env = single(behaviour)
    env.reset(seed=0, options={"knobs": {"num_tokens": 4}})
    env.step(STILL)
    for death in (EngineError("fake died: out of memory"), KeyboardInterrupt()):
        with monkeypatch.context() as patched:

            def die(self: FakeServed, *_: Any, death: BaseException = death) -> EngineText:
                raise death

            patched.setattr(FakeServed, "generate", die)
            with pytest.raises(type(death)):
                env.step(STILL)
        assert behaviour.open == 0
        assert env.step(STILL)[4]["speedup"] > 0
    assert behaviour.asked == [None, {"num_tokens": 4.0}] * 3


def test_a_setting_that_is_ignored_ends_the_step() -> None:
    env = single(Behaviour(ignores=True))
    env.reset(seed=0, options={"knobs": {"num_tokens": 8}})
    with pytest.raises(SettingIgnoredError, match="did not follow num_tokens=8"):
        env.step(STILL)


def test_closing_stops_what_was_started_and_nothing_else(named: Behaviour) -> None:
    behaviour = Behaviour()
    lent, opened = single(behaviour), gymnasium.make(ID, engine="llama.cpp", target="t", draft="d", prompts=TEXTS)
    group = together(others := Behaviour())
    for env in (lent, opened, group):
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
        env.close()
    assert behaviour.open == named.open == others.open == 0
    assert (behaviour.closed, named.closed, others.closed) == (0, 2, 0)
    for closed in (lent, opened):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="make another"):
            closed.unwrapped.reset()
        with pytest.raises(gymnasium.error.ClosedEnvironmentError):
            closed.unwrapped.step(STILL)
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        group.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": None}, r"name an engine \(llama.cpp, .*its target and its draft"),
        ({"target": None}, "name an engine .*target='target.gguf'"),
        ({"engine": "llama"}, "engine must be one of 'llama.cpp', .*got 'llama'"),
        ({"draft": None}, "draft: fake has nothing to tune without a draft; .*'prompt-lookup'"),
        ({"prompts": "verse"}, "no prompt set 'verse'"),
        ({"prompts": 5}, r"prompts must be (the name of a set, a file or a PromptSet|a sequence of values), got 5"),
        ({"prompts": []}, "prompts must"),
        ({"max_new_tokens": 1}, "max_new_tokens must be a whole number of at least 2, got 1"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0"),
        ({"temperature": 1.0, "unequal_weight": 1.0}, "unequal_weight is for greedy decoding"),
        ({"unequal_weight": -1.0}, "unequal_weight must"),
        ({"options": {"thread": 2}}, "options: an engine has no option 'thread'; there are: python, program"),
        ({"options": {"threads": 0}}, "threads must be a whole number of at least 1"),
        ({"options": 2}, "options must be a mapping"),
        ({"ranges": {"draft": (1, 2)}}, "ranges: there is no knob 'draft'; the decoder has: num_tokens"),
        ({"split": "dev"}, "split must be one of 'train', 'test'"),
        ({"start": "middle"}, "start must be one of"),
        ({"reward": {"speed_weight": -1}}, "speed_weight"),
        ({"backend": "replay"}, "backend='replay' is for specgym/Speculative-v0"),
        ({"source": "replay"}, "backend='replay' is for specgym/Speculative-v0"),
        ({"backend": "live", "source": "replay"}, "two names of the same argument"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_started(
    named: Behaviour, arguments: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {"engine": "llama.cpp", "target": "t.gguf", "draft": "d.gguf", "prompts": TEXTS}
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(ValueError, match=message):
            make(ID, **(good | arguments))
    assert named.asked == []
    assert named.closed == len(named.opened)


def test_a_single_environment_takes_a_single_set_and_an_engine_its_own_models() -> None:
    with pytest.raises(ArgumentError, match=r"for several sets use gymnasium.make_vec\(..., num_envs=2\)"):
        gymnasium.make(ID, engine=FakeEngine(), prompts=[TEXTS, OTHERS])
    with pytest.raises(ArgumentError, match="an Engine has its models already"):
        gymnasium.make(ID, engine=FakeEngine(), target="t.gguf")


def test_options_come_as_json_has_them(named: Behaviour) -> None:
    options = {"python": "/opt/engine/bin/python", "threads": 2}
    gymnasium.make(ID, engine="llama.cpp", target="t", draft="d", prompts=TEXTS, options=options)
    (opened,) = named.opened
    assert opened is not None
    assert str(opened.python) == "/opt/engine/bin/python"
    assert opened.threads == 2


def test_the_spec_survives_json_and_a_copy_has_the_same_arguments(named: Behaviour) -> None:
    env = gymnasium.make(ID, engine="llama.cpp", target="t", draft="d", ranges={"num_tokens": (0, 5)})
    assert env.spec is not None
    again = gymnasium.make(EnvSpec.from_json(env.spec.to_json()))
    copied = pickle.loads(pickle.dumps(env.unwrapped))
    assert isinstance(copied, EngineEnv)
    for twin in (again, copied):
        assert twin.reset(seed=2)[0].tolist() == env.reset(seed=2)[0].tolist()
        assert twin.observation_space == env.observation_space


class Choosy(FakeEngine):
    """An engine that refuses odd numbers."""

    def nearest(self, knobs: Mapping[str, float]) -> dict[str, float]:
        return {name: value - value % 2 for name, value in knobs.items()}

    def resolve_knobs(self, knobs: Mapping[str, float]) -> dict[str, float]:
        if any(value % 2 for value in knobs.values()):
            raise KnobError("odd")
        return super().resolve_knobs(knobs)


def test_knobs_that_do_not_suit_each_other_are_served_as_the_nearest_that_do() -> None:
    env = gymnasium.make(ID, engine=Choosy(), prompts=TEXTS)
    _, info = env.reset(seed=0, options={"knobs": {"num_tokens": 5}})
    assert info["knobs/num_tokens"] == env.step(STILL)[4]["knobs/num_tokens"] == 4
    vector = gymnasium.make_vec(ID, num_envs=3, engine=Choosy(), prompts=TEXTS)
    _, info = vector.reset(seed=0, options={"knobs": {"num_tokens": np.array([3, 4, 5])}})
    seen = vector.step(np.zeros((3, 1), np.float32))[4]["knobs/num_tokens"]
    assert info["knobs/num_tokens"].tolist() == seen.tolist() == [2, 4, 4]


def test_environments_that_step_together_share_one_engine() -> None:
    behaviour = Behaviour()
    env = together(behaviour, [TEXTS, OTHERS], num_envs=4, max_episode_steps=2, prompts_per_step=2)
    start, infos = env.reset(seed=0, options={"knobs": {"num_tokens": np.array([2, 4, 2, 0])}})
    assert start.tolist() == [[2], [4], [2], [0]]
    assert env.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.SAME_STEP
    _, rewards, terminated, truncated, seen = env.step(np.zeros((4, 1), np.float32))
    assert seen.keys() == infos.keys()
    assert behaviour.asked == [None, {"num_tokens": 2.0}, {"num_tokens": 4.0}]
    assert behaviour.open == 2
    assert seen["equal_texts"].tolist() == [1.0] * 4
    assert seen["tokens"].tolist() == [94.0] * 4  # of two prompts each
    assert seen["workload"].tolist()[:2] == ["fake+target+draft/texts", "fake+target+draft/others"]
    assert rewards.shape == (4,)
    assert seen["speedup"][3] == pytest.approx(1.0)
    *_, truncated, seen = env.step(np.zeros((4, 1), np.float32))
    assert truncated.all()
    assert not terminated.any()
    assert seen["final_info"].keys() == infos.keys()
    env.close()
    assert behaviour.open == 0


def test_environments_in_a_row_share_an_engine_that_is_lent() -> None:
    behaviour = Behaviour()
    env = together(behaviour, num_envs=2, vectorization_mode="sync")
    env.reset(seed=0)
    for _ in range(3):
        *_, infos = env.step(env.action_space.sample())
    assert (infos["speedup"] > 0).all()
    env.close()
    assert behaviour.open == 0


def test_wrappers_of_the_tuner_go_on_an_engine() -> None:
    env = ObserveContext(single())
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert dict(zip(env.state_names, observation, strict=True))["cost_ratio"] == 0
    assert env.observation_space.contains(env.step(STILL)[0])
    vector = VectorWorkloadMark(VectorObserveContext(together(prompts=[TEXTS, OTHERS], num_envs=2)))
    vector.reset(seed=0)
    assert vector.observation_space.contains(vector.step(vector.action_space.sample())[0])


@pytest.mark.parametrize("mode", ["ansi", "human"])
def test_a_step_is_shown_with_its_text(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = single(render_mode=mode)
    env.reset(seed=0, options={"prompt": 3})
    shown = env.render() if mode == "ansi" else capsys.readouterr().out
    assert "nothing decoded yet" in str(shown)
    env.step(STILL)
    shown = str(env.render() if mode == "ansi" else capsys.readouterr().out)
    assert "fake+target+draft/texts" in shown
    assert "train 3" in shown
    assert "equal_texts=1" in shown
    assert "replayed" not in shown


def test_ppo_trains_on_it() -> None:
    behaviour = Behaviour()
    env = single(behaviour, action="place")
    PPO("MlpPolicy", env, n_steps=32, batch_size=16, n_epochs=1, seed=0, device="cpu").learn(32)
    env.close()
    assert behaviour.texts > 60
    assert behaviour.open == 0
