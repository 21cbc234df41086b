"""Environment of Medusa decoding: its heads, its profiles, and typical acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding import Pair, traits_of
from specgym.decoding.decoders.medusa.files import load_heads, save_heads
from specgym.decoding.decoders.medusa.heads import MedusaHeadsError
from specgym.decoding.latency.profile import LatencyProfile, LatencyProfileError
from specgym.decoding.sampling import Sampling
from specgym.envs import RewardSettings, TokenPrompts, Workload, record
from specgym.envs.recordings import outcome_recorder as record_outcomes_module
from specgym.envs.recordings.archive import TraceError
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.outcomes import Outcomes, RecordedKnob
from tests.helpers.recorded_outcomes import Recorded
from tests.helpers.small_medusa_heads import random_heads


def test_nothing_is_gained_by_candidates_that_no_head_proposes(medusa: Recorded) -> None:
    outcomes = medusa.outcomes
    corners = {(0.0, 64.0), (5.0, 0.0), (0.0, 0.0)}
    assert corners <= set(map(tuple, outcomes.settings.tolist()))
    for number, setting in enumerate(outcomes.settings.tolist()):
        first, last = outcomes.starts[number * 4], outcomes.starts[(number + 1) * 4]
        if tuple(setting) in corners:
            assert set(outcomes.target_tokens[first:last]) == {1}
            assert set(outcomes.draft_steps[first:last]) == {0}
    assert outcomes.accepted.sum() > 0
    assert outcomes.draft_steps.max() > 1
    assert not outcomes.divergence.any()


def test_typical_acceptance_is_recorded_with_its_divergence_and_kept_below_a_bound(
    typical_medusa: Recorded, tmp_path: Path
) -> None:
    typical_medusa.outcomes.save(tmp_path / "again.npz")
    again = Outcomes.load(tmp_path / "again.npz")
    assert again.divergence.tolist() == typical_medusa.outcomes.divergence.tolist()
    loose = {"heads": 5.0, "tree_size": 60.0, "epsilon": 0.0, "delta": 0.0}  # all that can be accepted is
    strict = {"heads": 5.0, "tree_size": 60.0, "epsilon": 1.0, "delta": 2.0}
    bounded = RewardSettings(max_divergence=0.01)
    many = typical_medusa.many(400, reward=bounded)
    result = {}
    for name, knobs in (("loose", loose), ("strict", strict)):
        many.reset(seed=0, options={"knobs": knobs})
        result[name] = many.step(typical_medusa.still(400))[4]
    divergence = result["loose"]["divergence"]
    assert divergence.mean() > max(0.02, result["strict"]["divergence"].mean())
    assert result["loose"]["reward/divergence"] == pytest.approx(-30 * np.maximum(divergence - 0.01, 0))
    infos = []
    for env in (typical_medusa.single(reward=bounded), typical_medusa.many(1, reward=bounded)):
        env.reset(seed=0, options={"knobs": loose})
        infos.append(env.step(np.zeros(env.action_space.shape or (), np.float32))[4])
    assert infos[0]["divergence"] > 0.02
    assert infos[0]["reward/divergence"] == pytest.approx(30 * (0.01 - infos[0]["divergence"]))
    assert infos[0]["reward/divergence"] == pytest.approx(infos[1]["reward/divergence"][0])


@pytest.mark.parametrize("count", [2, 7])
def test_a_target_with_another_number_of_heads_is_recorded_and_replayed_with_that_many(
    alone: Pair,
    alone_work: Workload,
    typical_medusa: Recorded,
    cheap_heads: LatencyProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "toy"))
    save_heads(random_heads(alone.target.model, count, spread=0.2), tmp_path / "toy-medusa", alone.target)
    monkeypatch.setattr(record, "workload", lambda name: alone_work)
    record.main(
        ["toy/ids", "--decoder", "medusa-typical", "--out", str(tmp_path), "--splits", "train", "--settings", "20",
         "--prompts", "1", "--tokens", "4"]
    )  # fmt: skip
    few = Outcomes.load(tmp_path / "toy_ids.medusa-typical.train.npz")
    assert few.info.knobs[0] == RecordedKnob("heads", 0, count, True)
    assert set(few.settings[:, 0]) == set(range(count + 1))
    live = gymnasium.make("specgym/Medusa-v0", workload=alone_work, decoder="medusa-typical", profile=cheap_heads)
    replayed = typical_medusa.single(recording=few, profile=cheap_heads, max_new_tokens=4)
    assert replayed.unwrapped.knobs == live.unwrapped.knobs  # type: ignore[attr-defined]
    assert replayed.observation_space == live.observation_space
    replayed.reset(seed=0, options={"knobs": {"heads": count}})
    assert replayed.step(typical_medusa.still())[4]["knobs/heads"] == count


def test_parts_that_were_recorded_with_other_heads_are_not_added_to(
    alone: Pair, alone_work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone.target, "name", str(tmp_path / "toy"))
    heads, others = (random_heads(alone.target.model, 3, spread=0.2, seed=seed) for seed in (0, 1))
    save_heads(heads, tmp_path / "toy-medusa", alone.target)
    few = OutcomeSettings("medusa", settings=8, prompts=1, tokens=4)
    decoded, calls = record_outcomes_module._decoded, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decoded(*arguments)

    monkeypatch.setattr(record_outcomes_module, "_decoded", killed)
    with pytest.raises(KeyboardInterrupt):
        record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    save_heads(others, tmp_path / "toy-medusa", alone.target)
    with pytest.raises(TraceError, match=r"toy\.npz\.parts holds .*\(with other fingerprint\); remove it"):
        record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    save_heads(heads, tmp_path / "toy-medusa", alone.target)
    again = record_outcomes(alone_work, "train", tmp_path / "toy.npz", few)
    assert again.info.fingerprint["heads"] == load_heads(tmp_path / "toy-medusa", alone.target).digest()


def test_heads_are_told_apart_by_all_that_decides_what_they_propose(alone: Pair) -> None:
    kinds: list[tuple[int, dict[str, Any]]] = [(0, {}), (1, {})]
    kinds += [(0, {"vocabulary": range(9)}), (0, {"vocabulary": range(1, 10)})]
    built = [random_heads(alone.target.model, 3, seed=seed, **more) for seed, more in kinds]
    measured_ones = random_heads(alone.target.model, 3)
    measured_ones.accuracies = ((0.5,), (0.25,), (0.125,))
    digests = [heads.digest() for heads in (*built, measured_ones)]
    assert len(set(digests)) == 5
    assert random_heads(alone.target.model, 3).digest() == digests[0]


def test_a_target_without_heads_is_told_how_to_train_some(pair: Pair, cheap_heads: LatencyProfile) -> None:
    work = Workload(Pair(pair.target, name="headless"), TokenPrompts([[1]], [[2]]))
    with pytest.raises(MedusaHeadsError, match=r"no Medusa heads ship for .*python -m specgym\.decoding\.fit medusa"):
        gymnasium.make("specgym/Medusa-v0", workload=work, profile=cheap_heads)


def test_the_profile_is_that_of_medusa_rounds_by_default_and_no_other_is_taken(
    medusa: Recorded,
    profile: LatencyProfile,
    cheap_heads: LatencyProfile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[str] = []

    def result(pair: Pair, decoder: Any, *, sampling: Sampling) -> LatencyProfile:
        kinds.append(traits_of(decoder).cost_kind(sampling.greedy))
        return cheap_heads

    monkeypatch.setattr("specgym.decoding.measured", result)
    assert medusa.single(workload=medusa.workload, profile=None).unwrapped.profile == cheap_heads  # type: ignore[attr-defined]
    live = gymnasium.make("specgym/Medusa-v0", workload=medusa.workload, decoder="medusa-typical")
    assert live.unwrapped.profile == cheap_heads  # type: ignore[attr-defined]
    assert kinds == ["medusa", "medusa"]
    with pytest.raises(LatencyProfileError, match="made for chain rounds, and medusa rounds are to be charged"):
        medusa.single(profile=profile)
