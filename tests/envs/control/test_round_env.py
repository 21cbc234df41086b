"""Knobs that an agent moves before every round: like a rule at work in live decoding, alone and side by side."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from specgym.decoding import (
    AutoregressiveDecoder,
    KnobRule,
    LatencyProfile,
    LookaheadDecoder,
    Pair,
    RoundTracker,
    Sampling,
    SpeculativeDecoder,
    build_decoder,
    round_features,
)
from specgym.envs import KnobMoves, RoundKnobsEnv, RoundKnobsVectorEnv, TokenPrompts, Workload
from specgym.envs.control.live import LiveRounds

NAME = "specgym/RoundKnobs-v0"
TOKENS = 14
PROMPTS = TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], [[11, 12], [13]])
CHAINS = LatencyProfile("toy", {0: 0.0, 1: 0.001}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"})
WINDOWS = LatencyProfile("toy", {0: 0.0}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"}, kind="lookahead")
PROFILES = {"speculative": CHAINS, "lookahead": WINDOWS}
Options = Callable[..., dict[str, Any]]


@pytest.fixture
def options(pair: Pair) -> Options:
    """Arguments of environments on random models, by decoder and samplings."""

    def make(decoder: str, *samplings: Sampling, **changes: Any) -> dict[str, Any]:
        works = [
            Workload(Pair(pair.target, pair.draft, name=f"toy-{number}"), PROMPTS, sampling)
            for number, sampling in enumerate(samplings or (Sampling(0.0),))
        ]
        workload: Any = works if len(works) > 1 else works[0]
        common = {"decoder": decoder, "workload": workload, "profile": PROFILES[decoder], "max_new_tokens": TOKENS}
        return common | changes

    return make


def single(**arguments: Any) -> RoundKnobsEnv:
    env = gymnasium.make(NAME, **arguments).unwrapped
    assert isinstance(env, RoundKnobsEnv)
    return env


def together(num_envs: int, **arguments: Any) -> RoundKnobsVectorEnv:
    env = gymnasium.make_vec(NAME, num_envs=num_envs, **arguments)
    assert isinstance(env, RoundKnobsVectorEnv)
    return env


def reaction(features: np.ndarray, knobs: int) -> np.ndarray:
    """Some action that depends on every feature."""
    return np.sin(np.outer(np.arange(1, knobs + 1), 1 + np.arange(len(features))) @ (3 * features)).astype(np.float32)


class Reacting(KnobRule):
    """A rule for live decoding that does as `reaction`, by the moves of an environment."""

    def __init__(self, moves: KnobMoves) -> None:
        self.moves = moves
        self.seen: list[list[float]] = []

    def __call__(self, text: RoundTracker) -> Mapping[str, float]:
        self.seen.append(text.features.tolist())
        state = self.moves.moved(np.array([*text.values.values()]), reaction(text.features, len(text.knobs)))
        return dict(zip(text.values, state.tolist(), strict=True))


@pytest.mark.parametrize("decoder", ["speculative", "lookahead"])
@pytest.mark.parametrize("action", ["move", "place"])
def test_passes_both_checkers_without_a_warning(options: Options, decoder: str, action: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = single(**options(decoder, action=action))
        check_env(env)
        check_env_sb3(env)


@pytest.mark.parametrize(
    ("decoder", "action"), [("speculative", "move"), ("lookahead", "move"), ("lookahead", "place")]
)
def test_an_episode_is_live_decoding_with_a_rule_that_does_as_the_agent(
    options: Options, decoder: str, action: Any
) -> None:
    arguments = options(decoder, Sampling(0.8), action=action, rate=1.4, decision_seconds=0.002)
    env = single(**arguments)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (len(env.knobs),), np.float32)
    features, info = env.reset(seed=5, options={"prompt": 3})
    assert {name: info[f"knobs/{name}"] for name in (knob.name for knob in env.knobs)} == {
        knob.name: knob.default for knob in env.knobs
    }
    seen, knobs, rewards, infos, ended = [features.tolist()], [], [], [], False
    while not ended:
        features, reward, ended, _, info = env.step(reaction(features, len(env.knobs)))
        seen.append(features.tolist())
        rewards.append(reward)
        infos.append(info)
        knobs.append([info[f"knobs/{knob.name}"] for knob in env.knobs])
    session: Any = env._rounds.sessions[0]

    moves = KnobMoves(env.knobs, action=action)
    rule = Reacting(moves)
    work = arguments["workload"]
    seeded = gymnasium.utils.seeding.np_random(5)[0]  # of the environment, which draws the text's seed first
    text = build_decoder(decoder, work.load()).generate(
        PROMPTS.train[3], max_new_tokens=TOKENS, sampling=work.sampling, seed=int(seeded.integers(2**31)), knobs=rule
    )
    assert text.tokens == session.tokens
    assert rule.seen == seen[:-1]
    assert len({tuple(row) for row in knobs}) > 3
    profile = PROFILES[decoder]
    for round_, reward, info in zip(text.rounds, rewards, infos, strict=True):
        seconds = profile.charge([round_]) + 0.002
        assert (info["tokens"], info["seconds"], info["rounds"]) == (len(round_.tokens), pytest.approx(seconds), 1)
        assert reward == pytest.approx(len(round_.tokens) - 1.4 * seconds / 0.010)
    assert infos[-1]["throughput"] == pytest.approx(TOKENS * 0.010 / sum(info["seconds"] for info in infos))


def play(env: RoundKnobsVectorEnv, arguments: dict[str, Any]) -> set[str]:
    """Play four texts together and one by one, and return what differs."""
    prompts = [0, 1, 2, 3]
    observations, _ = env.reset(seed=0, options={"prompt": prompts})
    rng, singles, works = gymnasium.utils.seeding.np_random(0)[0], [], arguments["workload"]
    for place, prompt in zip(env.workload_of.tolist(), prompts, strict=True):
        alone = single(**arguments | {"workload": works[place] if isinstance(works, list) else works})
        alone.np_random = rng
        alone.reset(options={"prompt": prompt})
        singles.append(alone)
    wrong = set[str]()
    while not env.resting.all():
        resting, actions = env.resting, np.stack([reaction(row, len(env.knobs)) for row in observations])
        observations, rewards, terminated, _, infos = env.step(actions)
        assert env.observation_space.contains(observations)
        for place, alone in enumerate(singles):
            if resting[place]:
                wrong |= {"rest"} if infos["tokens"][place] or infos["seconds"][place] else set()
                continue
            if alone._rounds.over[0]:
                wrong.add("reward or end")
                continue
            observed, reward, ended, _, info = alone.step(actions[place])
            final = infos.get("final_info", {}) if ended else {}
            for name, value in info.items():
                if name in infos and infos[name][place] != value:
                    wrong.add(name)
                if name in final and final[name][place] != pytest.approx(value):
                    wrong.add(f"final {name}")
            if not np.allclose(observations[place], observed, atol=1e-5):
                wrong.add("features")
            if (rewards[place], terminated[place]) != (pytest.approx(reward), ended):
                wrong.add("reward or end")
    for place, alone in enumerate(singles):
        texts: Any = env._rounds.sessions[place], alone._rounds.sessions[0]
        wrong |= {"text"} if texts[0].tokens != texts[1].tokens else set()
    return wrong


@pytest.mark.parametrize("samplings", [(Sampling(0.0),), (Sampling(1.0), Sampling(0.0))])
def test_texts_that_step_together_are_as_many_single_ones(options: Options, samplings: tuple[Sampling, ...]) -> None:
    arguments = options("lookahead", *samplings)
    env = together(4, **arguments)
    assert play(env, arguments) == set()
    plain = AutoregressiveDecoder(env._rounds.sessions[3].decoder.pair)  # type: ignore[union-attr]
    greedy: Any = env._rounds.sessions[3]
    assert greedy.tokens == plain.generate(PROMPTS.train[3], max_new_tokens=TOKENS).tokens


def test_knobs_and_features_of_another_text_would_be_told(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = options("lookahead")
    show, act = LiveRounds._show, LiveRounds._act
    with monkeypatch.context() as patch:
        patch.setattr(LiveRounds, "_show", lambda self, place, session: show(self, place - 1, session))
        assert "features" in play(together(4, **arguments), arguments)
    monkeypatch.setattr(LiveRounds, "_act", lambda self, which, actions, steps: act(self, which, actions[::-1], steps))
    assert "seconds" in play(together(4, **arguments), arguments)


def test_a_text_that_ends_or_is_cut_is_followed_by_another_with_the_defaults(options: Options) -> None:
    env = together(3, **options("speculative", max_episode_steps=9))
    env.reset(seed=1)
    default = [knob.share(knob.default) for knob in env.knobs]
    ended = cut = 0
    for _ in range(40):
        observations, _, terminated, truncated, infos = env.step(np.full((3, len(env.knobs)), 0.7, np.float32))
        assert not env.resting.any()
        for place in np.flatnonzero(terminated | truncated).tolist():
            assert observations[place, -len(default) :].tolist() == pytest.approx(default)
            assert infos["final_obs"][place][-len(default) :].tolist() != pytest.approx(default)
            assert infos["knobs/draft_length"][place] == infos["final_info"]["knobs/draft_length"][place] != 4
        ended, cut = ended + int(terminated.sum()), cut + int(truncated.sum())
    assert min(ended, cut) > 0
    totals = env.totals()
    assert totals.rounds.tolist() == [120]
    env.set_rates(2.0)
    assert env.rates.tolist() == [2.0]


def test_seeds_pickles_and_the_spec(options: Options) -> None:
    def rollout(env: RoundKnobsEnv) -> list[Any]:
        features, _ = env.reset(seed=3)
        seen = [features.tolist()]
        for _ in range(8):
            features, reward, ended, _, _ = env.step(reaction(features, len(env.knobs)))
            seen += [features.tolist(), [reward]]
            if ended:
                env.reset()
        return seen

    env = single(**options("speculative", Sampling(1.0), rate=1.2))
    first = rollout(env)
    assert rollout(env) == first
    again = pickle.loads(pickle.dumps(env))
    assert (again.rate, rollout(again)) == (1.2, first)
    env.set_rate(3.0)
    assert rollout(env) != first
    spec = gymnasium.spec(NAME)
    assert EnvSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "replay"}, "backend='replay' cannot tell what knobs that change from round to round bring"),
        ({"source": "replay"}, "depends on what all rounds before it, with their knobs, have left behind"),
        ({"decoder": "threshold"}, "threshold decoding is lossy.*with a bound on the divergence"),
        ({"decoder": AutoregressiveDecoder}, "has no knobs, so there is nothing to choose"),
        ({"decoder": "lookahaed"}, "lookahaed"),
        ({"action": "jump"}, "action must be one of 'move', 'place', got 'jump'"),
        ({"scales": {"length": 1}}, "there is no knob 'length'"),
        ({"profile": WINDOWS}, "made for lookahead rounds, and chain rounds are to be charged"),
        ({"rate": -1}, "rate must be a finite number of at least 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    options: Options, changes: dict[str, Any], message: str
) -> None:
    arguments = options("speculative") | changes
    for make in (single, lambda **others: together(2, **others)):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


def test_actions_of_another_shape_or_not_finite_are_refused(options: Options) -> None:
    env, many = single(**options("speculative")), together(2, **options("speculative"))
    env.reset(seed=0)
    many.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action has shape \(2,\), one number a knob, got \(3,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"actions have shape \(2, 2\), a move of every knob for each.*got \(2,\)"):
        many.step(np.zeros(2))
    with pytest.raises(ValueError, match="the action for knob stop_threshold of environment 1 is nan"):
        many.step(np.array([[0, 0], [0, np.nan]]))
    with pytest.raises(gymnasium.error.ResetNeeded):
        single(**options("speculative")).step(np.zeros(2))


def test_a_decoder_may_come_from_a_callable(options: Options) -> None:
    env = single(**options("lookahead") | {"decoder": lambda pair: LookaheadDecoder(pair, max_window=3)})
    assert env.knobs[0].high == 3
    assert env.observation_space.shape == (len(round_features(env.knobs)),)
    env = single(**options("speculative") | {"decoder": SpeculativeDecoder, "scales": {"draft_length": 5}})
    env.reset(seed=0)
    info = env.step(np.array([1.0, 0.0]))[4]
    assert info["knobs/draft_length"] == env.knobs[0].default + 5
