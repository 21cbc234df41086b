"""Metrics in TensorBoard's own files, and infos as arrays, from dictionaries and from arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.callbacks import DecodingMetricsCallback
from specgym.callbacks.metrics import StepInfos, WorkloadMeans, step_infos, vector_source


class Fixed(gymnasium.Env[np.ndarray, np.ndarray]):
    """Gives the same info at every step, but for steps that are to be ignored."""

    def __init__(self, name: str, speedup: float) -> None:
        self.observation_space = spaces.Box(0, 1, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.name, self.speedup = name, speedup

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        info = {
            "workload": self.name, "speedup": self.speedup, "ms_per_token": 4.0, "draft_acceptance_rate": 0.5,
            "mean_acceptance_length": 3.0, "divergence": float("nan") if self.steps == 1 else 0.25, "tokens": 32.0,
            "knobs/fallback": 0.6, "knobs/rollback": 2.0, "reward/speed": self.speedup, "reward/range": 0.125,
        }  # fmt: skip
        if self.steps == 2:
            info |= {"speedup": 1e9, "numerics/left_out": True}
        return np.zeros(2, np.float32), self.speedup + 0.125, False, self.steps == 5, info


@pytest.fixture
def logged(tmp_path: Path) -> dict[str, list[float]]:
    venv = DummyVecEnv([lambda: Fixed("tiny/prose", 2.0), lambda: Fixed("tiny/code", 4.0)])
    model = PPO("MlpPolicy", VecNormalize(VecMonitor(venv), norm_obs=False), n_steps=10, batch_size=20, device="cpu")
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    model.learn(40, callback=DecodingMetricsCallback())
    events = EventAccumulator(str(tmp_path)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_means_over_all_workloads_at_every_rollout(logged: dict[str, list[float]]) -> None:
    expected = {
        "reward/total": 3.125,  # as the environments gave it, not as VecNormalize made it
        "reward/speed": 3.0,
        "reward/range": 0.125,
        "decoding/speedup": 3.0,  # a marked step counts nowhere
        "decoding/ms_per_token": 4.0,
        "decoding/draft_acceptance_rate": 0.5,
        "decoding/mean_acceptance_length": 3.0,
        "decoding/divergence": 0.25,  # NaN counts in no mean
        "knobs/fallback": 0.6,
        "knobs/rollback": 2.0,
    }
    for tag, value in expected.items():
        assert logged[tag] == pytest.approx([value, value]), tag
    assert "decoding/tokens" not in logged


def test_the_same_for_each_workload(logged: dict[str, list[float]]) -> None:
    assert logged["workload/tiny/prose/decoding/speedup"] == pytest.approx([2.0, 2.0])
    assert logged["workload/tiny/code/decoding/speedup"] == pytest.approx([4.0, 4.0])
    assert logged["workload/tiny/code/reward/total"] == pytest.approx([4.125, 4.125])
    assert logged["workload/tiny/prose/knobs/fallback"] == pytest.approx([0.6, 0.6])


def test_a_vector_environment_behind_an_adaptor_is_read_as_well(toy_vector: Callable[..., Any]) -> None:
    venv = VecNormalize(VecMonitor(VectorEnvAdaptor(toy_vector(3))), norm_obs=False)
    model = PPO("MlpPolicy", venv, n_steps=4, batch_size=12, device="cpu")
    model.set_logger(Logger(None, []))
    model.learn(12, callback=DecodingMetricsCallback(), log_interval=10)
    logged = model.logger.name_to_value
    # 3 steps of prose, code, prose; then the episodes end, and a step of code, prose, code.
    assert logged["workload/tiny/prose/reward/total"] == pytest.approx(1.0)
    assert logged["workload/tiny/code/decoding/divergence"] == pytest.approx(0.01)
    assert logged["decoding/divergence"] == pytest.approx((7 * 0.2 + 5 * 0.01) / 12)
    assert logged["reward/total"] == pytest.approx((7 * 1.0 + 5 * 3.0) / 12)


def read(venv: Any, infos: list[dict[str, Any]]) -> StepInfos:
    callback: Any = SimpleNamespace(training_env=venv, locals={"infos": infos})
    return step_infos(callback)


def test_both_sources_say_the_same_at_every_step(toy_tuning: Callable[..., Any]) -> None:
    makers = [
        lambda: toy_tuning("tiny/prose", [0.1, 0.2, 0.3]),
        lambda: toy_tuning("tiny/code", [0.4, 0.5]),
    ]
    single = VecMonitor(DummyVecEnv(makers))
    together = VecMonitor(VectorEnvAdaptor(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)))
    assert vector_source(single) is None
    assert vector_source(together) is together.venv
    single.reset()
    together.reset()
    for _ in range(6):  # episodes end after 4: their last step counts, not the start that follows it
        actions = np.zeros((2, 2), np.float32)
        apart, joint = read(single, single.step(actions)[3]), read(together, together.step(actions)[3])
        assert apart.workloads.tolist() == joint.workloads.tolist() == ["tiny/prose", "tiny/code"]
        for name in ("divergence", "tokens"):
            assert apart.entries[name].tolist() == joint.entries[name].tolist()
        assert apart.entries["divergence"][0] in (0.1, 0.2, 0.3)


def test_entries_of_only_some_environments_are_nan_elsewhere() -> None:
    infos = {
        "speedup": np.array([1.0, 2.0, 9.0]),
        "_speedup": np.array([True, True, False]),
        "workload": np.array(["a", None, "b"], object),
        "_workload": np.array([True, False, True]),
        "final_info": {"speedup": np.array([0.0, 5.0, 0.0]), "_speedup": np.array([False, True, False])},
        "_final_info": np.array([False, True, False]),
    }
    venv = SimpleNamespace(vector_infos=infos)
    step = read(venv, [{}, {"numerics/left_out": True}, {}])
    assert step.entries["speedup"].tolist()[:2] == [1.0, 5.0]
    assert np.isnan(step.entries["speedup"][2])
    assert step.workloads.tolist() == ["a", None, "b"]
    assert step.kept.tolist() == [True, False, True]


def test_means_are_weighted_and_leave_out_what_does_not_count() -> None:
    means = WorkloadMeans()
    names = np.array(["a", "b", "a", None, "a"], object)
    kept = np.array([True, True, True, True, False])
    values = {"x": np.array([1.0, 5.0, np.nan, 7.0, 100.0])}
    means.add(StepInfos(kept, names, {}), values, np.array([1.0, 1.0, 1.0, 2.0, 1.0]))
    assert means.overall() == pytest.approx({"x": 20 / 4})
    more = StepInfos(np.array([True, True]), np.array(["c", "a"], object), {})
    means.add(more, {"x": np.array([3.0, 4.0]), "y": np.array([0.5, 0.25])}, np.array([np.nan, 3.0]))
    result = means.by_workload()
    assert result["a"] == pytest.approx({"x": (1 + 12) / 4, "y": 0.25})
    assert result["b"] == {"x": 5.0}
    assert "c" not in result
