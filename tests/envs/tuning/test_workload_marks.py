"""Marks that say which workload is tuned: the same for one environment and for many."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from specgym.agents.training.sb3_vec_env import VectorEnvAdaptor
from specgym.envs import VectorWorkloadMark, WorkloadMark
from specgym.envs.tuning.vector_env import TuningVectorEnv

WORKLOADS = ["tiny-3m-ngram/prose", "tiny-3m-ngram/code"]


@pytest.fixture
def inner() -> TuningVectorEnv:
    return TuningVectorEnv(5, workload=WORKLOADS, max_new_tokens=8, max_episode_steps=2)


def test_marks_of_many_are_those_of_one(inner: TuningVectorEnv) -> None:
    marked = VectorWorkloadMark(inner)
    observations, _ = marked.reset(seed=0)
    for place, name in enumerate(WORKLOADS):
        single = WorkloadMark(
            gymnasium.make("specgym/Thresholds-v0", workload=name, backend="replay", max_new_tokens=8), place, 2
        )
        assert single.observation_space == marked.single_observation_space
        row = inner.workload_of.tolist().index(place)
        assert single.reset(options={"knobs": {}})[0][2:].tolist() == observations[row, 2:].tolist()
    assert observations[:, 2:].argmax(1).tolist() == inner.workload_of.tolist()


def test_the_last_observation_of_an_episode_has_the_mark_of_its_own_workload(inner: TuningVectorEnv) -> None:
    marked = VectorWorkloadMark(inner)
    marked.reset(seed=0)
    before = inner.workload_of.copy()
    inner.set_workload_weights([0, 1])  # from the next episode on
    still = np.zeros((5, 2), np.float32)
    assert marked.step(still)[0][:, 2:].argmax(1).tolist() == before.tolist()
    observations, *_, infos = marked.step(still)
    assert np.stack(infos["final_obs"])[:, 2:].argmax(1).tolist() == before.tolist()
    assert observations[:, 2:].argmax(1).tolist() == [1] * 5
    assert 0 in before


def test_a_learner_sees_marked_last_observations(inner: TuningVectorEnv) -> None:
    adapted = VectorEnvAdaptor(VectorWorkloadMark(inner))
    adapted.reset()
    still = np.zeros((5, 2), np.float32)
    adapted.step(still)
    *_, infos = adapted.step(still)
    assert all(info["terminal_observation"] in adapted.observation_space for info in infos)
