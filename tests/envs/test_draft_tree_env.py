"""The tuning environment of draft trees: live, and replayed by the outcomes of a toy pair."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from transformers import PreTrainedModel

from specgym.decoding import Pair, PromptLookupDrafter, Sampling
from specgym.decoding.digests import guidance_digest, weights_digest
from specgym.decoding.draft_tree import DraftTreeDecoder, draft_tree_knobs
from specgym.decoding.draft_tree.alignment import AffineAlignment
from specgym.decoding.draft_tree.predictor import AcceptancePredictor, PredictorShape
from specgym.decoding.latency import LatencyProfile, LatencyProfileError
from specgym.envs import TokenPrompts, Workload, measuring, profiles, record, shipped_outcomes
from specgym.envs import record_outcomes as record_outcomes_module
from specgym.envs.archives import TraceError
from specgym.envs.decoders import DECODERS, build_decoder, default_workload, rounds_of
from specgym.envs.measuring import measure_setting
from specgym.envs.outcomes import Outcomes
from specgym.envs.profiles import profile_name, profile_of
from specgym.envs.record_outcomes import OutcomeSettings, record_outcomes
from specgym.envs.vector_tuning import TuningVectorEnv

ENV = "specgym/DraftTree-v0"
HIDDEN = 16
MakeEnv = Callable[..., gymnasium.Env]
STILL = np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def pair(make_model: Callable[..., PreTrainedModel], make_noisy: Callable[..., PreTrainedModel]) -> Pair:
    """Of this file alone: models that were asked for hidden states, as guidance does, cannot be pickled afterwards."""
    target = make_model("llama", layers=1, vocabulary=64, hidden=HIDDEN, context=128)
    return Pair(target, make_noisy(target, 0.4), name="toy")


@pytest.fixture(scope="module")
def work(pair: Pair) -> Workload:
    return Workload(pair, TokenPrompts([[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], [[11, 12], [13]]))


@pytest.fixture(scope="module")
def outcomes(work: Workload, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    settings = OutcomeSettings("draft-tree", settings=20, prompts=4, tokens=16)
    return record_outcomes(work, "train", tmp_path_factory.mktemp("trees") / "toy.npz", settings)


@pytest.fixture
def cheap_trees() -> LatencyProfile:
    """A level costs a tenth of a pass, and a further token of a pass a hundredth."""
    return LatencyProfile("toy", {0: 0.0, 8: 0.008}, {1: 0.010, 65: 0.0164}, 0.010, {}, rounds="draft-tree")


@pytest.fixture
def make(outcomes: Outcomes, cheap_trees: LatencyProfile) -> MakeEnv:
    def make(**changes: Any) -> gymnasium.Env:
        usual = {"backend": "replay", "recording": outcomes, "profile": cheap_trees, "tokens_per_step": 16}
        return gymnasium.make(ENV, **{**usual, **changes})

    return make


@pytest.fixture
def make_many(outcomes: Outcomes, cheap_trees: LatencyProfile) -> Callable[..., TuningVectorEnv]:
    def make(num_envs: int, **changes: Any) -> TuningVectorEnv:
        usual = {"recording": outcomes, "profile": cheap_trees, "tokens_per_step": 16}
        env = gymnasium.make_vec(ENV, num_envs=num_envs, **{**usual, **changes})
        assert isinstance(env, TuningVectorEnv)
        return env

    return make


def guided(pair: Pair, weight: float = 0.5, seed: int = 0, **shape: Any) -> DraftTreeDecoder:
    """With a random alignment and a predictor."""
    torch.manual_seed(seed)
    alignment = AffineAlignment(HIDDEN, HIDDEN)
    torch.nn.init.normal_(alignment.bias)
    predictor = AcceptancePredictor(PredictorShape(HIDDEN, **{"width": 8, **shape}))
    return DraftTreeDecoder(pair, alignment=alignment, alignment_weight=weight, predictor=predictor)


@pytest.mark.parametrize("backend", ["live", "replay"])
def test_passes_both_checkers_without_a_warning(make: MakeEnv, work: Workload, backend: str) -> None:
    env = make() if backend == "replay" else make(backend="live", recording=None, workload=work, tokens_per_step=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # No workload is given by name, so the checker cannot make the environment once more.
        check_env(env.unwrapped, skip_render_check=True)
        check_env_sb3(env)


def test_many_that_step_together_have_the_same_spaces_and_step_as_one_alone(
    make: MakeEnv, make_many: Callable[..., TuningVectorEnv]
) -> None:
    one, many = make(), make_many(1)
    assert many.single_observation_space == one.observation_space
    observation, _ = one.reset(seed=5)
    assert many.reset(seed=5)[0][0].tolist() == observation.tolist()
    one.action_space.seed(0)
    for _ in range(8):
        action = one.action_space.sample()
        ours, theirs = one.step(action), many.step(action[None])
        assert theirs[1][0] == pytest.approx(ours[1])
        assert theirs[4]["seconds"][0] == pytest.approx(ours[4]["seconds"])


def test_live_and_replayed_have_the_same_spaces_and_infos(
    make: MakeEnv, work: Workload, cheap_trees: LatencyProfile
) -> None:
    live = gymnasium.make(ENV, workload=work, profile=cheap_trees, tokens_per_step=16)
    replayed = make()
    assert replayed.observation_space == live.observation_space
    assert replayed.action_space == live.action_space
    space = replayed.observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    assert space.low.tolist() == [1, 0, 0, 0]
    assert space.high.tolist() == pytest.approx([8, 8, 64, 0.3])
    scales = replayed.unwrapped.scales  # type: ignore[attr-defined]
    assert scales == pytest.approx(
        {"max_candidates": 0.7, "max_depth": 0.8, "node_budget": 0.602, "min_acceptance_prob": 0.03}, abs=1e-3
    )
    infos = []
    for env in (replayed, live):
        env.reset(seed=0, options={"knobs": {knob.name: knob.default for knob in draft_tree_knobs()}})
        infos.append(env.step(STILL)[4])
    assert list(infos[0]) == list(infos[1])
    assert infos[0]["tokens"] == infos[1]["tokens"] == 16
    assert infos[0]["divergence"] == infos[1]["divergence"] == 0


def test_a_recorded_setting_is_replayed_prompt_by_prompt_as_it_is_live(
    make: MakeEnv, outcomes: Outcomes, work: Workload, cheap_trees: LatencyProfile
) -> None:
    live, replayed = gymnasium.make(ENV, workload=work, profile=cheap_trees, tokens_per_step=16), make()
    speedups = set()
    for setting in outcomes.settings[:5]:
        knobs = dict(zip((knob.name for knob in draft_tree_knobs()), setting.tolist(), strict=True))
        for prompt in range(4):
            infos = []
            for env in (live, replayed):
                env.reset(seed=0, options={"knobs": knobs, "prompt": prompt})
                infos.append(env.step(STILL)[4])
            for name in ("tokens", "rounds", "drafted", "accepted", "seconds", "speedup"):
                assert infos[1][name] == pytest.approx(infos[0][name]), (knobs, prompt, name)
            speedups.add(infos[0]["speedup"])
    assert len(speedups) > 5


def test_levels_and_tokens_read_are_recorded_and_nothing_is_drafted_where_a_knob_forbids_it(
    outcomes: Outcomes,
) -> None:
    names = [knob.name for knob in outcomes.info.knobs]
    assert names == [knob.name for knob in draft_tree_knobs()]
    for number, setting in enumerate(outcomes.settings.tolist()):
        first, last = outcomes.starts[number * 4], outcomes.starts[(number + 1) * 4]
        knobs = dict(zip(names, setting, strict=True))
        drafted, steps = outcomes.drafted[first:last], outcomes.draft_steps[first:last]
        assert drafted.max() <= knobs["node_budget"]
        assert steps.max() <= knobs["max_depth"]
        if not (knobs["node_budget"] and knobs["max_depth"]):
            assert not drafted.any()
            assert not steps.any()
    assert (outcomes.target_tokens == outcomes.drafted + 1).all()
    assert (outcomes.draft_steps < outcomes.drafted).any()
    assert outcomes.accepted.sum() > 0
    assert not outcomes.divergence.any()
    assert outcomes.info.draft_length == 0  # no chain
    assert outcomes.info.draft_sha256


def test_the_command_records_with_the_draft_and_has_no_draft_length(
    work: Workload, make: MakeEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "workload", lambda name: work)
    asked = ["toy/ids", "--decoder", "draft-tree", "--out", str(tmp_path), "--splits", "train", "--settings", "20",
             "--prompts", "1", "--tokens", "4"]  # fmt: skip
    with pytest.raises(TraceError, match="--draft-length: draft-tree drafts no tokens one after another; leave it out"):
        record.main([*asked, "--draft-length", "4"])
    record.main(asked)
    found = Outcomes.load(tmp_path / "toy_ids.draft-tree.train.npz")
    assert isinstance(work.pair, Pair)
    assert work.pair.draft is not None
    assert found.info.draft == work.pair.draft.name
    assert make(recording=found, tokens_per_step=4).reset(seed=0)[1]["workload"] == "toy/ids"


def test_a_recording_names_what_stood_beside_the_draft_and_its_parts_are_not_added_to_with_another(
    work: Workload, pair: Pair, outcomes: Outcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcomes.info.guidance_sha256 == ""  # as in all recordings that were made before there was any
    few = OutcomeSettings("draft-tree", settings=16, prompts=1, tokens=4)
    decoded, calls = record_outcomes_module._decoded, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(record_outcomes_module, "_decoded", killed)
    monkeypatch.setattr(DraftTreeDecoder, "usual", staticmethod(guided))
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(work, "train", tmp_path / "toy.npz", few)
    monkeypatch.setattr(DraftTreeDecoder, "usual", staticmethod(partial(guided, seed=1)))
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds .*\(with other guidance_sha256\); remove it"):
        record_outcomes(work, "train", tmp_path / "toy.npz", few)
    monkeypatch.setattr(DraftTreeDecoder, "usual", staticmethod(guided))
    again = record_outcomes(work, "train", tmp_path / "toy.npz", few)
    assert again.info.guidance_sha256 == guidance_digest(guided(pair).guidance) != ""


def test_guidance_is_told_apart_by_all_that_decides_what_is_drafted(pair: Pair) -> None:
    bare = DraftTreeDecoder(pair, alignment=AffineAlignment(HIDDEN, HIDDEN), alignment_weight=0.5)
    calibrated = guided(pair)
    assert calibrated.guidance.predictor is not None
    calibrated.guidance.predictor.temperature.fill_(2.0)
    made = [guided(pair), guided(pair, weight=0.25), guided(pair, seed=1), guided(pair, deepest=2), bare, calibrated]
    digests = [guidance_digest(each.guidance) for each in (*made, DraftTreeDecoder(pair))]
    assert len(set(digests)) == 7
    assert digests[-1] == ""
    assert guidance_digest(guided(pair).guidance) == digests[0] != weights_digest(pair.target.model)


def test_what_was_not_recorded_says_how_to_record_it(
    make: MakeEnv, outcomes: Outcomes, work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped_outcomes, "OUTCOMES", tmp_path)
    with pytest.raises(ValueError, match=r"no draft-tree outcomes of toy/ids \(train .*--decoder draft-tree"):
        make(recording=None, workload=work)
    outcomes.save(tmp_path / "toy_ids.draft-tree.train.npz")
    assert make(recording=None, workload=work).reset(seed=0)[1]["workload"] == "toy/ids"


@pytest.mark.parametrize(
    ("draft", "message"),
    [(None, "DraftTreeDecoder needs a draft"), (PromptLookupDrafter(64), "needs a model as draft")],
)
def test_a_pair_without_a_draft_model_is_refused(
    pair: Pair, cheap_trees: LatencyProfile, draft: PromptLookupDrafter | None, message: str
) -> None:
    work = Workload(Pair(pair.target, draft, name="draftless"), TokenPrompts([[1]], [[2]]))
    with pytest.raises(ValueError, match=message):
        gymnasium.make(ENV, workload=work, profile=cheap_trees)


def test_the_decoder_is_known_by_name(pair: Pair) -> None:
    decoder, known = build_decoder("draft-tree", pair, 4), DECODERS["draft-tree"]
    assert type(decoder) is DraftTreeDecoder
    assert decoder.knobs == known.knobs(4)
    assert rounds_of("draft-tree") == rounds_of(decoder) == rounds_of(DraftTreeDecoder) == "draft-tree"
    assert known.drafts
    assert [name for name, each in DECODERS.items() if each.has_draft_length] == ["threshold", "speculative"]
    assert default_workload("draft-tree") == "tiny/prose"


def test_the_profile_is_that_of_trees_by_default_timed_with_the_decoder_itself_and_no_other_is_taken(
    work: Workload,
    pair: Pair,
    make: MakeEnv,
    profile: LatencyProfile,
    cheap_trees: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[tuple[str, DraftTreeDecoder | None]] = []

    def found(
        pair: Pair, *, sampling: Sampling, rounds: str, heads: None, tree_decoder: DraftTreeDecoder | None
    ) -> LatencyProfile:
        timed.append((rounds, tree_decoder))
        return cheap_trees

    monkeypatch.setattr(profiles, "measured", found)
    monkeypatch.setattr(measuring, "measured", found)
    assert make(workload=work, profile=None).unwrapped.profile == cheap_trees  # type: ignore[attr-defined]
    decoder = guided(pair)
    gymnasium.make(ENV, workload=work, decoder=lambda pair: decoder)
    measure_setting(decoder, None, [[1, 2]], 4)
    assert timed == [("draft-tree", None), ("draft-tree", decoder), ("draft-tree", decoder)]
    with pytest.raises(LatencyProfileError, match="made for chain rounds, and draft-tree rounds are to be charged"):
        make(profile=profile)


def test_profiles_of_trees_are_named_after_the_pair(work: Workload) -> None:
    assert profile_name(work, "draft-tree") == "toy.draft-tree.greedy.json"
    assert profile_name(Workload("tiny", "prose", Sampling(1.0)), "draft-tree") == "tiny.draft-tree.sampled.json"


def test_the_command_measures_the_pair_with_all_that_belongs_to_it(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiles, "workload", lambda name: work)
    profiles.main(["toy/ids", "--rounds", "draft-tree", "--out", str(tmp_path), "--max-target-tokens", "7"])
    (path,) = tmp_path.glob("*.json")
    assert path.name == profile_name(work, "draft-tree")
    found = profile_of(work, path, replayed=True, rounds="draft-tree")
    assert (max(found.draft_seconds), max(found.target_seconds)) == (2, 7)
    assert found.hardware["draft_tree"]["rule"] == "likeliest"
    assert "one more token read adds" in capsys.readouterr().out
