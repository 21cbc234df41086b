"""The environments that threshold training makes from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specgym.agents import default_settings
from specgym.agents.training.environments import make_env, training_environments
from specgym.agents.training.run_folder import on_machine
from specgym.agents.training.settings_io import SettingsError
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.prompt_tokens import default_prompt_tokens
from specgym.envs import TraceError, on_ray
from specgym.envs.workloads import Workload
from tests.helpers.lost_workers import kill_worker


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    LatencyProfile("toy", {0: 0.0, 1: 0.001}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"}).save(path)
    return path


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Workload) -> None:
        raise AssertionError("a replay needs no model")

    monkeypatch.setattr(Workload, "load", refuse)


@pytest.mark.usefixtures("no_models")
def test_thresholds_can_be_learned_from_shipped_traces_without_models(profile: Path) -> None:
    settings = default_settings("threshold", workloads=("tiny/prose",), environment={"backend": "replay"})
    env = make_env(settings, 0, profile)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.zeros(2, np.float32))
    assert np.isfinite(float(reward))
    assert info["tokens"] > 0


def test_prompts_have_the_length_that_a_run_asks_for(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = default_settings("threshold", workloads=("tiny-3m-ngram/prose",), max_prompt_tokens=5)
    with pytest.raises(TraceError, match="leave out max_prompt_tokens"):
        make_env(settings, 0, profile)
    lengths: list[int | None] = []
    monkeypatch.setattr("gymnasium.make", lambda *args, **options: lengths.append(default_prompt_tokens()))
    make_env(settings, 0, profile)
    with on_machine(settings):
        lengths.append(default_prompt_tokens())
    assert lengths == [5, 5]
    assert default_prompt_tokens() is None


def test_a_replay_by_the_clock_is_refused() -> None:
    with pytest.raises(SettingsError, match="a replay has no clock"):
        default_settings("threshold", environment={"backend": "replay", "timing": "wall"})


@pytest.mark.usefixtures("no_models")
def test_environments_are_shared_out_by_weight(profile: Path) -> None:
    settings = default_settings(
        "threshold",
        workloads=("tiny-3m-ngram/prose", "tiny-3m-ngram/code"),
        environments=6,
        weights=(2.0, 1.0),
        subprocesses=False,
        environment={"backend": "replay"},
    )
    environments = training_environments(settings, [profile, profile])
    (replays, *_) = environments.get_attr("unwrapped")
    names = [replays.workload_names[place] for place in replays.workload_of]
    assert sorted(names) == ["tiny-3m-ngram/code"] * 2 + ["tiny-3m-ngram/prose"] * 4


@pytest.mark.usefixtures("no_models")
def test_a_bound_on_the_divergence_adds_its_price_to_the_reward_s_own_terms(profile: Path) -> None:
    settings = default_settings(
        "threshold", workloads=("tiny-3m-ngram/prose",), max_divergence=0.001, environment={"backend": "replay"}
    )
    env = make_env(settings, 0, profile)
    env.reset(seed=0, options={"knobs": {"fallback": 0.95, "rollback": 4.0}})
    _, reward, _, _, info = env.step(np.zeros(2, np.float32))
    assert (info["knobs/fallback"], info["knobs/rollback"]) == pytest.approx((0.95, 4.0))
    assert info["divergence"] > 0.001
    # The fallback is 0.55 above its preferred range, the rollback 0.05 of its upper end; a falloff is 0.2.
    in_range = (np.exp(-((0.55 / 0.2) ** 2)) + np.exp(-((0.05 / 0.2) ** 2))) / 2
    unpriced = info["speedup"] + 0.1 * info["draft_acceptance_rate"] + 0.05 * in_range
    assert reward == pytest.approx(unpriced - 30 * (info["divergence"] - 0.001))


@pytest.mark.ray
@pytest.mark.usefixtures("small_cluster")
def test_environments_on_ray_are_those_of_this_machine_though_one_is_killed(profile: Path) -> None:
    workloads = ("tiny-3m-ngram/prose", "tiny-3m-ngram/code@1.0", "tiny-3m-ngram/prose@1.0")
    environment = {"backend": "live", "max_new_tokens": 6}
    seen: list[list[Any]] = []
    for apart in (False, True):
        settings = default_settings("threshold", workloads=workloads, environment=environment, subprocesses=True)
        with on_ray(() if apart else None):
            venv = training_environments(settings, [profile] * 3)
            venv.seed(7)
            venv.set_options({"knobs": {"fallback": 0.3}})
            seen.append([np.asarray(venv.reset()).tolist()])
            venv.env_method("set_divergence_multiplier", 12.0, indices=[1])
            for step in range(24):  # beyond the end of an episode
                observations, rewards, dones, infos = venv.step(np.full((3, 2), 0.05 * (step % 3 - 1), np.float32))
                entries = [{name: value for name, value in info.items() if name != "episode"} for info in infos]
                seen[-1].append([np.asarray(observations).tolist(), rewards.tolist(), dones.tolist(), repr(entries)])
                if apart and step in (9, 21):
                    assert kill_worker("ray::_RemoteEnv")
            assert [venv.get_attr("divergence_multiplier", row)[0] for row in range(3)] == [30.0, 12.0, 30.0]
            venv.close()
    assert seen[0] == seen[1]
