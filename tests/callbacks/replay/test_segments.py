"""Which segments are drawn, how they are weighed, and which are dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specgym.agents.training.sb3_vec_env import FiniteRolloutBuffer
from specgym.callbacks.replay.phase import ReplayPhase
from specgym.callbacks.replay.prioritised import PrioritisedReplayCallback, importance_weights
from specgym.callbacks.replay.settings import ReplaySettings
from tests.helpers.replaying_learner import ENVIRONMENTS, STEPS, collect, learner, parameters, replayed


def test_importance_weights_undo_the_preference_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    values, probabilities = rng.normal(size=10), rng.dirichlet(np.ones(10))
    weights = importance_weights(probabilities, 10, 1.0)
    assert weights.max() == 1
    scale = (probabilities * weights).sum()  # the expected weight
    np.testing.assert_allclose((probabilities * weights * values).sum() / scale, values.mean())
    half = importance_weights(probabilities, 10, 0.5)
    assert abs((probabilities * half * values).sum() / (probabilities * half).sum() - values.mean()) > 1e-3
    np.testing.assert_array_equal(importance_weights(probabilities, 10, 0.0), np.ones(10))


def test_a_phase_steps_with_the_weights_of_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    _, callback = replayed(beta_start=0.7)
    priorities = callback._stored.tree.priorities
    seen: list[tuple[np.ndarray, ...]] = []

    def step(phase: ReplayPhase, *batch: np.ndarray) -> tuple[bool, dict[str, float]]:
        seen.append(batch)
        return True, {}

    monkeypatch.setattr(ReplayPhase, "step", step)
    callback.on_rollout_start()
    assert callback.dropped == 0
    places, weights = (np.stack(result) for result in zip(*seen, strict=True))
    assert places.shape == (4, 6)
    assert weights.min() < 0.95
    share = priorities[places] / priorities.sum()
    np.testing.assert_allclose(weights, importance_weights(share, 2 * ENVIRONMENTS, 0.7))


def test_a_new_segment_has_the_priority_of_its_mean_absolute_advantage() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(alpha=0.5))
    model = learner(callback)
    collect(model, callback)
    expected = np.sqrt(np.abs(model.rollout_buffer.advantages).mean(axis=0) + 1e-3)
    np.testing.assert_allclose(callback._stored.tree.priorities[:ENVIRONMENTS], expected, rtol=1e-5)


def test_segments_with_larger_advantages_are_drawn_more_often_and_uniform_draws_all_alike() -> None:
    for priority in ("advantage", "uniform"):
        _, callback = replayed(priority=priority, alpha=1.0)
        store = callback._stored
        advantages = np.repeat([[1.0], [3.0]] * ENVIRONMENTS, STEPS, axis=1)
        places = np.arange(2 * ENVIRONMENTS)
        store.tree.set(places, callback._priorities(advantages, np.ones(advantages.shape, bool)))
        counts = np.bincount(store.tree.draw(4000, 2, np.random.default_rng(0)).reshape(-1))
        share = counts[1::2].sum() / counts.sum()
        assert share == pytest.approx(0.75 if priority == "advantage" else 0.5, abs=0.02)


def test_a_phase_refreshes_the_priorities_of_what_it_drew() -> None:
    model, callback = replayed()
    collect(model, callback)  # which replays before it collects
    store = callback._stored
    before = store.tree.priorities[: 2 * ENVIRONMENTS]
    phase = ReplayPhase(model, store)
    assert callback._draw(phase) is not None
    seen = np.flatnonzero(phase.evaluated[: 2 * ENVIRONMENTS])
    corrections = np.abs(phase.targets - phase.values)[seen].mean(axis=1)
    np.testing.assert_allclose(store.tree.priorities[seen], (corrections + 1e-3) ** 0.6, rtol=1e-4)
    assert (store.tree.priorities[seen] != before[seen]).any()


def test_segments_are_dropped_by_age() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(max_age=1, updates=1, capacity=100, warm_up=1))
    model = learner(callback)
    collect(model, callback, 4)
    assert (len(callback._stored), callback.dropped) == (3 * ENVIRONMENTS, ENVIRONMENTS)  # 4 stored, one phase to come
    callback.on_rollout_start()
    assert (len(callback._stored), callback.dropped) == (2 * ENVIRONMENTS, 2 * ENVIRONMENTS)
    assert set(callback._stored.born[callback._stored.tree.priorities > 0]) == {3, 4}


def test_segments_are_dropped_where_the_policy_has_moved_away() -> None:
    model, callback = replayed()
    store = callback._stored
    store.data.log_probs[:3] -= np.log(2.5)
    store.data.log_probs[3] += np.log(2.5)
    store.data.log_probs[4] += np.log(1.5)
    callback.on_rollout_start()
    assert callback.dropped == 4
    assert (store.tree.priorities[: 2 * ENVIRONMENTS] > 0).tolist() == [False] * 4 + [True] * 4
    store.data.log_probs[:] += 5
    callback._unlearned, before, updates = True, parameters(model), callback.updates
    callback.on_rollout_start()
    assert (len(store), callback.updates, callback.dropped) == (0, updates, 2 * ENVIRONMENTS)
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_a_broken_policy_drops_segments_rather_than_learning_from_them() -> None:
    model, callback = replayed()
    with torch.no_grad():
        model.policy.value_net.bias.fill_(torch.nan)
    callback.on_rollout_start()
    assert (len(callback._stored), callback.updates) == (0, 0)


def test_marks_of_the_rollout_buffer_are_respected() -> None:
    callback = PrioritisedReplayCallback()
    model = learner(callback, rollout_buffer_class=FiniteRolloutBuffer)
    assert isinstance(model.rollout_buffer, FiniteRolloutBuffer)
    step = callback._on_step

    def leaving_out() -> bool:
        out = {3: [True, False, True, False]}.get(model.rollout_buffer.pos, [False, False, True, False])
        model.rollout_buffer.leave_out(np.array(out))  # type: ignore[attr-defined]
        return step()

    callback._on_step = leaving_out  # type: ignore[method-assign]
    collect(model, callback)
    usable = callback._stored.data.usable[:ENVIRONMENTS]
    assert np.flatnonzero(~usable[0]).tolist() == [3]
    assert usable[[1, 3]].all()
    assert not usable[2].any()
    assert (callback._stored.tree.priorities[:ENVIRONMENTS] > 0).tolist() == [True, True, False, True]
