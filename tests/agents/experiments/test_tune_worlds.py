"""Learning to tune simulated worlds: a small run, its files, its continuation, and what settings are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO

from specgym.agents.evaluation.worlds.judge import judge_worlds
from specgym.agents.evaluation.worlds.transfer import WorldsTransfer
from specgym.agents.experiments import tune_worlds
from specgym.agents.experiments.tune_worlds_settings import WorldsSettings
from specgym.agents.export.worlds_policy import WorldsTuner, shipped_tuner
from specgym.agents.report.page import report_run
from specgym.agents.training.run import evaluate, train
from specgym.agents.training.run_folder import RunFileError
from specgym.agents.training.settings_io import SettingsError
from specgym.envs.worlds.beliefs import observation_names
from specgym.envs.worlds.catalogue import held_out_workloads, training_sampler
from specgym.envs.worlds.env import WorldsVectorEnv
from specgym.envs.worlds.worlds import WorldSampler

NAMES = ("tiny-3m-1l/definitions", "tiny/prose@1.0")


@pytest.fixture(scope="module")
def sampler() -> WorldSampler:
    return training_sampler(6, names=NAMES)


@pytest.fixture
def judged_in_few(sampler: WorldSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs be judged in worlds of one kind, against a few methods."""
    few = partial(judge_worlds, training=sampler, samplers={"acceptance": sampler}, methods=("default", "universal"))
    monkeypatch.setattr(tune_worlds, "judge_worlds", few)


def small(tmp_path: Path, **changes: Any) -> WorldsSettings:
    usual: dict[str, Any] = {
        "workloads": NAMES,
        "total_timesteps": 1024,
        "checkpoint_every": 1024,
        "environments": 64,
        "acceptance_worlds": 6,
        "judged_worlds": 4,
        "name": "run",
        "runs": tmp_path,
    }
    return WorldsSettings(**(usual | changes))


@pytest.mark.usefixtures("judged_in_few")
def test_a_run_leaves_policies_that_act_as_they_were_learned_and_goes_on(tmp_path: Path, sampler: WorldSampler) -> None:
    run = train(small(tmp_path, seeds=(0, 1)))
    env = WorldsVectorEnv(8, sampler)
    seen, _ = env.reset(seed=0)
    tuners = [WorldsTuner.load(run / f"seed-{seed}") for seed in (0, 1)]
    for seed, tuner in enumerate(tuners):
        model = PPO.load(run / f"seed-{seed}" / "policy.zip", device="cpu")
        assert tuner.actions(seen) == pytest.approx(model.predict(seen, deterministic=True)[0], abs=1e-5)
    assert not np.array_equal(tuners[0].actions(seen), tuners[1].actions(seen))
    transfer = WorldsTransfer.load(run / "worlds.json")
    assert {row.method for row in transfer.table.rows} == {"learned", "default", "universal"}
    assert evaluate(run) == []
    report_run(run)
    assert transfer.verdict()[:40] in (run / "report.html").read_text()
    before = (run / "seed-0" / "policy.safetensors").read_bytes()
    train(small(tmp_path, seeds=(0, 1), total_timesteps=2048), resume=run)
    assert (run / "seed-0" / "policy.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": ("vllm", "sglang")}, "no engine 'sglang'; there are: transformers, llama.cpp"),
        ({"engines": ()}, "engines must be at least one of"),
        ({"acceptance_worlds": 0}, "acceptance_worlds"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"workloads": (*NAMES, held_out_workloads()[0])}, "kept apart for judging"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        small(tmp_path, **changes)


def test_a_workload_that_was_not_recorded_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny/nothing"):
        train(small(tmp_path, workloads=("tiny/nothing",)))
    assert not (tmp_path / "run").exists()


def test_the_shipped_policy_sees_and_does_what_sessions_are_about() -> None:
    tuner = shipped_tuner()
    assert list(tuner.policy.state) == observation_names()
    assert tuner.actions(np.zeros((5, len(observation_names())), np.float32)).shape == (5, 3)


def test_the_shipped_policy_is_better_than_the_closed_form_that_it_starts_from(sampler: WorldSampler) -> None:
    """A policy of other worlds, or an old one, would not be."""
    tuner, losses = shipped_tuner(), []
    for learned in (True, False):
        env = WorldsVectorEnv(1500, sampler, measurements=2)
        seen, _ = env.reset(seed=0)
        for _ in range(3):
            actions = tuner.actions(seen) if learned else np.zeros((1500, 3), np.float32)
            actions[:, 2] = -1
            seen, rewards, *_ = env.step(actions)
        losses.append(-rewards.mean())
    assert losses[0] < losses[1]


def test_a_policy_about_something_else_is_refused() -> None:
    policy = shipped_tuner().policy
    policy.state = policy.state[1:]
    with pytest.raises(RunFileError, match=r"learn one with train\.py --env specgym/SpeculativeWorlds-v0"):
        WorldsTuner(policy)
