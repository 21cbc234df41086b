"""Control of the draft length, one text at a time: live, replayed, and the two against each other."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from transformers import PreTrainedModel

from specgym.decoding.autoregressive import AutoregressiveDecoder
from specgym.decoding.drafters import Drafter
from specgym.decoding.latency import LatencyProfile
from specgym.decoding.ngram import NGramDrafter
from specgym.decoding.pairs import Pair
from specgym.decoding.prompt_lookup import PromptLookupDrafter
from specgym.decoding.sampling import Sampling
from specgym.decoding.speculative import SpeculativeDecoder
from specgym.decoding.stopping import FEATURES
from specgym.envs import TokenPrompts, Workload, draft_sources
from specgym.envs.draft_length import DraftLengthEnv
from specgym.envs.draft_sources import UNKNOWN
from specgym.envs.record import RecordSettings, record
from specgym.envs.traces import Trace

GO, STOP = 0, 1
LONGEST, TOKENS = 5, 24
PROMPTS = TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 7, 8, 9, 7]], [[11, 12], [13]])
PRODUCT, PLACE = (
    [feature.name for feature in FEATURES].index("product"),
    [feature.name for feature in FEATURES].index("place"),
)

Recorded = Callable[[str], tuple[Workload, Path]]


@pytest.fixture(scope="session")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., PreTrainedModel],
    make_noisy: Callable[..., PreTrainedModel],
) -> Recorded:
    """Workloads of a random target with each kind of draft, and their traces; made when first asked for."""
    known: dict[str, tuple[Workload, Path]] = {}

    def make(kind: str) -> tuple[Workload, Path]:
        if kind not in known:
            draft_kind, _, option = kind.partition(" ")
            model = make_model("llama", layers=1, vocabulary=16, hidden=32, context=128, spread=0.6)
            plain = AutoregressiveDecoder(Pair(model))
            texts = [plain.generate(prompt, max_new_tokens=TOKENS).tokens for prompt in PROMPTS.train]
            draft: PreTrainedModel | Drafter
            if draft_kind == "model":
                draft = make_noisy(model, 0.3)
            elif draft_kind == "ngram":
                draft = NGramDrafter.fit([text[:9] for text in texts], 16, order=3)
            else:
                draft = PromptLookupDrafter(16, longest=2)
            pair = Pair(model, draft, name=kind.replace(" ", "-"))
            if option == "eos":
                # What comes late in one text ends some of the others early.
                pair.eos_token_ids = frozenset({next(t for t in texts[0][8:] if t not in texts[0][:8])})
            sampling = Sampling(1.0) if option == "sampled" else Sampling(0.0)
            workload = Workload(pair, PROMPTS, sampling)
            path = tmp_path_factory.mktemp("traces") / f"{kind}.npz"
            settings = RecordSettings(draft_length=LONGEST + 1, tokens=TOKENS, detour_prompts=0)
            record(workload, "train", path, settings)
            known[kind] = workload, path
        return known[kind]

    return make


@pytest.fixture
def make_env(recorded: Recorded, profile: LatencyProfile) -> Callable[..., DraftLengthEnv]:
    def make(backend: str, kind: str = "model", **changes: Any) -> DraftLengthEnv:
        workload, path = recorded(kind)
        arguments: dict[str, Any] = {"max_draft_length": LONGEST, "tokens": TOKENS, "profile": profile}
        if backend == "replay":
            arguments["trace"] = path
        env = gymnasium.make("specgym/DraftLength-v0", workload=workload, backend=backend, **(arguments | changes))
        assert isinstance(env.unwrapped, DraftLengthEnv)
        return env.unwrapped

    return make


MakeEnv = Callable[..., DraftLengthEnv]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every session that live environments start."""
    seen: list[Any] = []
    real = SpeculativeDecoder.start

    def spy(self: SpeculativeDecoder, *arguments: Any, **more: Any) -> Any:
        seen.append(real(self, *arguments, **more))
        return seen[-1]

    monkeypatch.setattr(draft_sources.SpeculativeDecoder, "start", spy)
    return seen


def play(env: DraftLengthEnv, prompt: int, actions: np.random.Generator | int) -> list[tuple[Any, ...]]:
    """A whole text: (observation, reward, terminated, info) after `reset` and after every step."""
    observation, info = env.reset(seed=0, options={"prompt": prompt})
    seen: list[tuple[Any, ...]] = [(observation, 0.0, False, info)]
    while not seen[-1][2]:
        action = actions if isinstance(actions, int) else int(actions.random() < 0.3)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        seen.append((observation, reward, terminated, info))
    return seen


# Live and replayed decoding are the same.


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
                allowed = np.full(8, 0.005)  # a recorded number keeps eight bits
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
        backend="replay", trace=recorded("model")[1], tokens=TOKENS, max_draft_length=LONGEST, profile=profile
    )
    assert env.reset(seed=0)[1]["workload"] == env.workload.name == "model/ids"


# What a step does.


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize(("action", "length"), [(STOP, 1), (GO, LONGEST)])
def test_stopping_at_once_and_never_stopping_are_fixed_draft_lengths(
    make_env: MakeEnv, backend: str, action: int, length: int
) -> None:
    emitted, rounds = 0, []
    for *_, info in play(make_env(backend), 0, action):
        if info["rounds"]:
            rounds.append((info["drafted"], min(length, TOKENS - emitted - 1)))
        emitted += info["tokens"]
    assert len(rounds) > 4
    assert all(drafted == expected for drafted, expected in rounds)


def test_going_on_emits_nothing_until_the_draft_is_as_long_as_it_may_be(make_env: MakeEnv) -> None:
    seen = play(make_env("live"), 0, GO)[: LONGEST + 1]
    assert [observation[PLACE] for observation, *_ in seen] == [1, 2, 3, 4, 5, 1]
    assert [info["rounds"] for *_, info in seen] == [0, 0, 0, 0, 0, 1]
    assert [info["tokens"] > 0 for *_, info in seen] == [False] * 5 + [True]


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("rate", [0.0, 1.0, 1.7])
def test_the_rewards_of_a_round_are_its_tokens_minus_the_price_of_its_time(
    make_env: MakeEnv, backend: str, rate: float, profile: LatencyProfile
) -> None:
    rewards, tokens = 0.0, 0
    for _, reward, _, info in play(make_env(backend, rate=rate), 1, np.random.default_rng(3))[1:]:
        rewards += reward
        tokens += info["tokens"]
        if info["rounds"] == 1:
            seconds = profile.round(info["drafted"])
            assert rewards == pytest.approx(info["tokens"] - rate * seconds / profile.autoregressive_seconds)
        if info["rounds"]:
            rewards = 0.0
    assert tokens == TOKENS


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_totals_are_sums_over_the_text(make_env: MakeEnv, backend: str, profile: LatencyProfile) -> None:
    seen = play(make_env(backend), 1, np.random.default_rng(3))
    last = seen[-1][3]
    assert last["total_tokens"] == sum(info["tokens"] for *_, info in seen) == TOKENS
    assert last["total_seconds"] == pytest.approx(sum(info["seconds"] for *_, info in seen))
    # 1 ms a drafted token, 10 ms a pass and 1 ms for each token beyond the first
    drafted, rounds = (sum(info[name] for *_, info in seen) for name in ("drafted", "rounds"))
    assert last["total_seconds"] == pytest.approx(0.010 * rounds + 0.002 * drafted)
    assert last["throughput"] == pytest.approx(TOKENS * profile.autoregressive_seconds / last["total_seconds"])
    assert seen[0][3]["throughput"] == 0.0


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_every_decision_about_a_token_is_charged(make_env: MakeEnv, backend: str) -> None:
    free, paid = (play(make_env(backend, "lookup", decision_seconds=cost), 2, GO) for cost in (0.0, 0.002))
    decided = sum(observation[PLACE] > 0 for observation, *_ in free[:-1])
    assert decided == len(free) - 2  # nothing was drafted when the text began
    extra = paid[-1][3]["total_seconds"] - free[-1][3]["total_seconds"]
    assert extra == pytest.approx(0.002 * decided)


def test_a_rate_can_be_changed_while_a_text_is_decoded(make_env: MakeEnv) -> None:
    env = make_env("replay", rate=0.0)
    env.reset(seed=0, options={"prompt": 0})
    assert env.step(GO)[1] == 0.0
    env.set_rate(2.0)
    assert env.rate == 2.0
    assert env.step(GO)[1] == pytest.approx(-2.0 * 0.002 / 0.010)


def test_what_more_is_acceptable_is_what_verification_finds(make_env: MakeEnv) -> None:
    env = make_env("replay")
    dice = np.random.default_rng(0)
    signs = set()
    for prompt in range(4):
        for _ in range(5):
            _, info = env.reset(options={"prompt": prompt})
            ended = False
            while not ended:
                promised = info["remaining_acceptable"]
                action = int(dice.random() < 0.3)
                _, _, ended, _, info = env.step(action)
                if info["rounds"]:
                    assert info["accepted"] == info["drafted"] + min(promised, 0)
                    signs.add(np.sign(promised))
                    assert promised <= LONGEST - info["drafted"]
                else:
                    assert info["remaining_acceptable"] == promised - 1
            assert info["remaining_acceptable"] == 0
    assert signs == {-1, 0, 1}


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_the_operating_point_shows_in_observations_and_charges(
    make_env: MakeEnv, backend: str, profile: LatencyProfile
) -> None:
    two = replace(
        profile, context=8, points=(replace(profile, batch_size=8, context=8, target_seconds={1: 0.02, 2: 0.05}),)
    )
    env = make_env(backend, profile=two, batch_size=8)
    observation, _ = env.reset(seed=0)
    assert observation[-1] == 3.0
    assert observation[-2] == pytest.approx(3.1)  # 1 ms of drafting and 30 ms of the pass, over 10 ms
    assert env.step(STOP)[4]["seconds"] == pytest.approx(0.001 + 0.05)


# Prompts and seeds.


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_every_prompt_comes_before_any_comes_again(
    make_env: MakeEnv, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env(backend)
    begun: list[int] = []
    monkeypatch.setattr(env._drafting, "begin", lambda prompt, generator: begun.append(prompt))
    monkeypatch.setattr(type(env._drafting), "features", np.zeros(8, np.float32))
    env.reset(seed=0)
    for _ in range(7):
        env.reset()
    assert sorted(begun[:4]) == sorted(begun[4:]) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["model", "model sampled"])
def test_a_seed_fixes_everything(make_env: MakeEnv, backend: str, kind: str) -> None:
    def rollout(env: DraftLengthEnv, seed: int) -> list[Any]:
        dice = np.random.default_rng(0)
        observation, info = env.reset(seed=seed)
        seen: list[Any] = [observation.tolist(), info]
        for _ in range(60):
            observation, reward, ended, _, info = env.step(int(dice.random() < 0.3))
            seen += [observation.tolist(), reward, ended, info]
            if ended:
                env.reset()
        return seen

    env = make_env(backend, kind)
    first = rollout(env, 7)
    assert rollout(env, 7) == first  # the second time after other texts
    assert rollout(make_env(backend, kind), 7) == first
    assert any(rollout(env, seed) != first for seed in (8, 9, 10))


# What Gymnasium and Stable-Baselines3 ask of any environment.


@pytest.mark.parametrize("backend", ["live", "replay"])
@pytest.mark.parametrize("kind", ["model", "model sampled", "lookup"])
def test_passes_both_checkers_without_a_warning(make_env: MakeEnv, backend: str, kind: str) -> None:
    env = make_env(backend, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        check_env_sb3(env)


def test_the_spec_survives_json() -> None:
    spec = gymnasium.spec("specgym/DraftLength-v0")
    assert EnvSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_a_pickled_environment_comes_back_with_its_arguments(make_env: MakeEnv, backend: str) -> None:
    env = make_env(backend, rate=1.5)
    again = pickle.loads(pickle.dumps(env))
    assert again.rate == 1.5
    assert again.charges.cost_ratio == env.charges.cost_ratio
    infos = [[info for *_, info in play(one, 1, np.random.default_rng(2))] for one in (env, again)]
    assert infos[0] == infos[1]


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_info_has_the_same_plain_entries_after_every_step_and_reset(make_env: MakeEnv, backend: str) -> None:
    kinds: dict[str, type] = {"seconds": float, "total_seconds": float, "throughput": float, "workload": str}
    for _, reward, ended, info in play(make_env(backend), 0, np.random.default_rng(1)):
        assert info.keys() == {
            *("tokens", "seconds", "drafted", "accepted", "rounds", "remaining_acceptable", "workload"),
            *("total_tokens", "total_seconds", "throughput"),
        }
        assert all(type(value) is kinds.get(name, int) for name, value in info.items())
        assert type(reward) is float
        assert type(ended) is bool


# Bad arguments and actions.


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_a_step_without_a_text_is_refused(make_env: MakeEnv, backend: str) -> None:
    env = make_env(backend)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the next step"):
        env.step(GO)
    play(env, 0, STOP)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the next step"):
        env.step(GO)


@pytest.mark.parametrize("action", [2, -1, 0.5, math.nan, None, [0], "go"])
def test_an_action_that_is_none_is_refused(make_env: MakeEnv, action: Any) -> None:
    env = make_env("replay")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"an action is 0 \(go on\) or 1 \(stop\), got"):
        env.step(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knobs": {}}, "unknown reset option 'knobs'; there are: prompt"),
        ({"prompt": 4}, "model/ids has train prompts 0 to 3, got 4"),
        ({"prompt": -1}, "train prompts 0 to 3, got -1"),
        ({"prompt": "words"}, "reset option prompt is an index"),
    ],
)
def test_bad_options_are_refused(make_env: MakeEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("replay").reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "both"}, "backend must be one of 'live', 'replay', got 'both'"),
        ({"split": "dev"}, "split must be one of None, 'train', 'test', got 'dev'"),
        ({"render_mode": "human"}, "render_mode must be one of None, 'rgb_array', got 'human'"),
        ({"max_draft_length": 0}, "max_draft_length must be a whole number of at least 1 and at most 32, got 0"),
        ({"max_draft_length": 33}, "at most 32, got 33"),
        ({"tokens": 1.5}, "tokens must be a whole number of at least 1, got 1.5"),
        ({"rate": -1.0}, "a rate is a throughput relative to plain decoding, finite and at least 0, got -1"),
        ({"rate": math.inf}, "a rate is a throughput"),
        ({"decision_seconds": math.nan}, "decision_seconds must be finite and at least 0, got nan"),
        ({"batch_size": 4}, "has no point at batch size 4"),
        ({"backend": "live"}, "trace is for backend='replay'; the backend is 'live'"),
        ({"max_draft_length": 7}, r"drafts of 6 tokens, and max_draft_length is 7.*--draft-length 7"),
        ({"tokens": 25}, r"texts of 24 tokens, and tokens is 25.*--tokens 25"),
        ({"split": "test"}, "has the train prompts of model/ids, not the test prompts"),
        ({"workload": "tiny/prose"}, "recorded from model/ids, and the workload asked for is tiny/prose"),
        ({"trace": None}, "no trace of model/ids .* ships with specgym"),
        ({"trace": "missing.npz"}, "there is no trace .*missing.npz"),
        ({"profile": "missing.json"}, "there is no latency profile missing.json"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    recorded: Recorded, profile: LatencyProfile, arguments: dict[str, Any], message: str
) -> None:
    workload, path = recorded("model")
    usual: dict[str, Any] = {
        "workload": workload,
        "backend": "replay",
        "max_draft_length": LONGEST,
        "tokens": TOKENS,
        "trace": path,
        "profile": profile,
    }
    with pytest.raises(ValueError, match=message):
        DraftLengthEnv(**(usual | arguments))
