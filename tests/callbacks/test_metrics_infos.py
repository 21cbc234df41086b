"""Infos as arrays, from dictionaries and from arrays."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.callbacks.metrics import StepInfos, WorkloadMeans, step_infos, vector_source


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
