"""Prioritised replay: on-policy it is PPO's own update; off-policy it corrects and drops; saved, it resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from specgym.agents.numerics import FiniteRolloutBuffer
from specgym.agents.policy import KnobPolicy
from specgym.callbacks.checkpoints import CheckpointError
from specgym.callbacks.prioritised_replay import PrioritisedReplayCallback, ReplaySettings, importance_weights
from specgym.callbacks.replay_phase import ReplayPhase

ENVIRONMENTS, STEPS = 4, 16


class Seek(gymnasium.Env[np.ndarray, Any]):
    """A point on a line is to be moved to 0.5; terminated where it falls off, truncated after five steps."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self.discrete = discrete

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        self.place = self.np_random.uniform(-1, 1)
        return np.array([self.place], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.place += 0.3 * (float(2 * action - 1) if self.discrete else float(action[0]))
        fallen = abs(self.place) > 1
        self.place = float(np.clip(self.place, -1, 1))
        return np.array([self.place], np.float32), 1 - abs(self.place - 0.5), fallen, self.steps == 5, {}


def learner(
    callback: PrioritisedReplayCallback, *, normalised: bool = False, discrete: bool = False, **more: Any
) -> PPO:
    """A PPO about to collect its first rollout."""
    environments: Any = DummyVecEnv([lambda: Seek(discrete)] * ENVIRONMENTS)
    if normalised:
        environments = VecNormalize(environments, norm_obs=False)
    arguments = {"n_steps": STEPS, "batch_size": ENVIRONMENTS * STEPS, "n_epochs": 1, "seed": 3, "device": "cpu"}
    model = PPO("MlpPolicy", environments, policy_kwargs={"net_arch": [16]}, **(arguments | more))
    model._setup_learn(1000, callback)
    return model


def collect(model: PPO, callback: PrioritisedReplayCallback, rollouts: int = 1) -> None:
    """Collect rollouts; a phase of replay comes before every one but the first."""
    assert model.env is not None
    for _ in range(rollouts):
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS)


def parameters(model: PPO) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def replayed(**settings: Any) -> tuple[PPO, PrioritisedReplayCallback]:
    """A learner with two rollouts stored, and PPO's own update in between."""
    callback = PrioritisedReplayCallback(ReplaySettings(**({"updates": 4, "segments_per_update": 6} | settings)))
    model = learner(callback)
    collect(model, callback)
    model.train()
    collect(model, callback)
    return model, callback


@pytest.mark.parametrize("discrete", [False, True])
def test_the_first_step_on_a_fresh_rollout_is_the_one_of_ppo(discrete: bool) -> None:
    # Uniform and stratified, a minibatch of as many segments as there are has each of them once.
    settings = ReplaySettings(
        priority="uniform", updates=1, segments_per_update=ENVIRONMENTS, capacity=ENVIRONMENTS, warm_up=1
    )
    callback = PrioritisedReplayCallback(settings)
    model = learner(callback, discrete=discrete, ent_coef=0.01, clip_range_vf=0.1, gamma=0.9, max_grad_norm=1e9)
    collect(model, callback)
    assert callback._stored.data.truncated.any()
    assert (callback._stored.data.ends & ~callback._stored.data.truncated).any()
    model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
    model.lr_schedule = lambda _: 0.1
    start, saved = parameters(model), copy.deepcopy(model.policy.state_dict())
    callback.on_rollout_start()
    ours = parameters(model) - start
    model.policy.load_state_dict(saved)
    model.train()
    theirs = parameters(model) - start
    assert callback.updates == 1
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_truncated_state_is_valued_by_the_policy_of_today() -> None:
    model, callback = replayed()
    store, steps = callback._stored, callback._stored.data
    np.testing.assert_array_equal(store.born[: 2 * ENVIRONMENTS], [1] * ENVIRONMENTS + [2] * ENVIRONMENTS)
    reward = 1 - np.abs(steps.after - 0.5)[..., 0]  # of the state arrived in, without any value
    np.testing.assert_allclose(steps.rewards[steps.truncated], reward[steps.truncated], atol=1e-6)
    phase = ReplayPhase(model, store)
    with torch.no_grad():
        model.policy.value_net.bias += 5
    places = np.arange(2 * ENVIRONMENTS)
    phase.recentre(places)
    row, step = (int(found[0]) for found in np.nonzero(steps.truncated))
    expected = model.policy.predict_values(torch.as_tensor(steps.after[row, step])[None]).item()
    assert expected > 3
    surprise = steps.rewards[row, step] + model.gamma * expected - phase.values[row, step]
    np.testing.assert_allclose(phase.advantages[row, step], surprise, rtol=1e-4, atol=1e-5)


def test_rewards_are_normalised_by_the_statistics_of_today() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(warm_up=1))
    model = learner(callback, normalised=True, gae_lambda=0.0)
    collect(model, callback)
    steps = callback._stored.data
    normaliser = model.get_vec_normalize_env()
    assert normaliser is not None
    places = np.arange(ENVIRONMENTS)
    phase = ReplayPhase(model, callback._stored)
    phase.recentre(places)
    before = phase.advantages[places].copy()
    normaliser.ret_rms.var *= 4
    phase.recentre(places)
    scale = np.sqrt(normaliser.ret_rms.var / 4 + normaliser.epsilon)
    assert np.abs(before - phase.advantages[places]).max() > 0.01
    np.testing.assert_allclose(before - phase.advantages[places], steps.rewards[places] / scale / 2, rtol=1e-2)


def test_importance_weights_undo_the_preference_in_the_mean() -> None:
    dice = np.random.default_rng(0)
    values, probabilities = dice.normal(size=10), dice.dirichlet(np.ones(10))
    weights = importance_weights(probabilities, 10, 1.0)
    assert weights.max() == 1
    scale = (probabilities * weights).sum()  # the expected weight
    np.testing.assert_allclose((probabilities * weights * values).sum() / scale, values.mean())
    half = importance_weights(probabilities, 10, 0.5)
    assert abs((probabilities * half * values).sum() / (probabilities * half).sum() - values.mean()) > 1e-3
    np.testing.assert_array_equal(importance_weights(probabilities, 10, 0.0), np.ones(10))


def test_importance_weighs_every_segment_in_all_losses() -> None:
    moved = []
    for importance in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.5]):
        model, callback = replayed()
        model.normalize_advantage, model.max_grad_norm, model.ent_coef = False, 1e9, 0.1
        phase = ReplayPhase(model, callback._stored)
        phase.recentre(np.array([1, 6]))
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
        start = parameters(model)
        assert phase.step(np.array([1, 6]), np.array(importance))[0]
        moved.append(parameters(model) - start)
    assert moved[1].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1] + 2 * moved[2], rtol=1e-3, atol=1e-6)


def test_a_phase_steps_with_the_weights_of_its_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    _, callback = replayed(beta_start=0.7)
    priorities = callback._stored.tree.priorities
    seen = []
    monkeypatch.setattr(ReplayPhase, "step", lambda phase, *batch: (seen.append(batch) or True, {}))
    callback.on_rollout_start()
    assert callback.dropped == 0
    places, weights = (np.stack(found) for found in zip(*seen, strict=True))
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
        model.policy.value_net.bias += torch.nan
    callback.on_rollout_start()
    assert (len(callback._stored), callback.updates) == (0, 0)


def test_unlikely_actions_count_less_by_their_ratio() -> None:
    # One step of SGD without normalised advantages is linear in the weights.
    moved = []
    for ratio in (1.0, 0.6):
        callback = PrioritisedReplayCallback(ReplaySettings(updates=1, segments_per_update=4, warm_up=1))
        model = learner(callback, normalize_advantage=False, vf_coef=0.0, max_grad_norm=1e9, gae_lambda=0.0)
        collect(model, callback)
        callback._stored.data.log_probs[:] -= np.log(ratio)
        model.policy.optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.1)
        start = parameters(model)
        callback.on_rollout_start()
        moved.append(parameters(model) - start)
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(moved[1], moved[0] * 0.6, rtol=1e-3, atol=1e-7)


def test_unusable_transitions_have_no_influence() -> None:
    def after(spoil: Callable[[Any], None]) -> torch.Tensor:
        model, callback = replayed(priority="uniform")
        callback._stored.data.usable[:, 5:7] = False
        spoil(callback._stored.data)
        callback.on_rollout_start()
        assert callback.updates == 4
        return parameters(model)

    def spoil_unusable(steps: Any) -> None:
        for array in (steps.rewards, steps.actions, steps.log_probs):
            array[:, 5:7] += 100
        steps.observations[:, 6] = -3  # the state in step 5 values the one before

    def spoil_usable(steps: Any) -> None:
        steps.rewards[:, 7] += 100

    untouched = after(lambda steps: None)
    torch.testing.assert_close(after(spoil_unusable), untouched, rtol=0, atol=0)
    assert (after(spoil_usable) - untouched).abs().max() > 1e-4


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


def test_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, callback = replayed()
    model.save(tmp_path / "policy.zip")
    callback.save_state(tmp_path)
    restored = PrioritisedReplayCallback(callback.settings, seed=99)
    restored.load_state(tmp_path)
    other = PPO.load(tmp_path / "policy.zip", env=model.get_env(), device="cpu")
    other._setup_learn(1000, restored, reset_num_timesteps=False)
    before = parameters(other)
    for each in (callback, restored):
        each.on_rollout_start()
    assert (restored.updates, restored.dropped) == (callback.updates, callback.dropped) == (4, 0)
    assert (parameters(model) != before).any()
    torch.testing.assert_close(parameters(other), parameters(model), rtol=0, atol=0)
    np.testing.assert_array_equal(restored._stored.tree.priorities, callback._stored.tree.priorities)
    for mine, theirs in zip(restored._stored.data, callback._stored.data, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    draws = [each._stored.tree.draw(3, 5, each._dice) for each in (callback, restored)]
    np.testing.assert_array_equal(*draws)
    # A phase that was done before saving is not done again.
    callback.save_state(tmp_path)
    restored.load_state(tmp_path)
    restored.on_rollout_start()
    assert restored.updates == 4
    collect(other, restored)
    np.testing.assert_array_equal(restored._stored.born[7:13], [2, 3, 3, 3, 3, 0])


def test_a_damaged_or_foreign_state_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    _, callback = replayed()
    callback.save_state(tmp_path)
    file = tmp_path / "prioritised_replay.npz"
    whole = file.read_bytes()
    assert list(tmp_path.iterdir()) == [file]
    fresh = PrioritisedReplayCallback(callback.settings)
    middle = len(whole) // 2
    for content in (b"", whole[:middle], whole[:middle] + b"damage" + whole[middle + 6 :]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"prioritised_replay\.npz"):
            fresh.load_state(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        fresh.load_state(tmp_path / "nowhere")
    assert fresh._store is None
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="capacity 512"):
        PrioritisedReplayCallback(ReplaySettings(capacity=8)).load_state(tmp_path)
    fresh.load_state(tmp_path)
    with pytest.raises(CheckpointError, match=rf"prioritised_replay\.npz has segments with steps {STEPS}"):
        learner(fresh, n_steps=8, batch_size=8)
    arrays = dict(np.load(file))
    arrays["rewards"][0, 0] = np.nan
    with file.open("wb") as target:
        np.savez(target, **arrays)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="rewards has NaN"):
        fresh.load_state(tmp_path)


def test_the_model_does_not_grow_by_what_is_stored(tmp_path: Path) -> None:
    sizes = []
    for capacity in (ENVIRONMENTS, 50_000):
        callback = PrioritisedReplayCallback(ReplaySettings(capacity=capacity))
        model = learner(callback)
        model.learn(4 * ENVIRONMENTS * STEPS, callback=callback)
        model.save(tmp_path / "policy.zip")
        sizes.append((tmp_path / "policy.zip").stat().st_size)
        assert callback.updates > 0
    assert sum(array.nbytes for array in callback._stored.data) > 100 * sizes[0]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_replays_once_for_every_rollout_and_once_at_the_end_and_logs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(Logger, "dump", lambda logger, step=0: logged.append(dict(logger.name_to_value)))
    callback = PrioritisedReplayCallback(ReplaySettings(updates=3, segments_per_update=5, warm_up=2, beta_start=0.5))
    model = learner(callback)
    model.learn(4 * ENVIRONMENTS * STEPS, callback=callback)
    assert callback.updates == 3 * 3  # after the second, third and fourth rollout
    last = {name: value for name, value in model.logger.name_to_value.items() if name.startswith("replay/")}
    assert last.keys() == {
        f"replay/{name}"
        for name in ("ratio_mean", "clip_fraction", "effective_sample_size", "age_mean", "segments", "dropped",
                     "policy_loss", "value_loss", "updates", "beta")
    }  # fmt: skip
    assert last["replay/updates"] == 9
    assert last["replay/beta"] == 1
    assert last["replay/segments"] == 4 * ENVIRONMENTS
    assert 0 < last["replay/effective_sample_size"] < 1
    assert last["replay/ratio_mean"] == pytest.approx(1, abs=0.3)
    assert [entry["replay/beta"] for entry in logged if "replay/beta" in entry] == pytest.approx([0.75, 0.875], abs=0.1)


def test_no_updates_means_no_replay() -> None:
    model, callback = replayed(updates=0)
    before = parameters(model)
    callback.on_rollout_start()
    assert callback.updates == 0
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_a_phase_ends_where_the_policy_has_moved_by_the_models_target() -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(updates=50, warm_up=1))
    model = learner(callback, target_kl=0.001, learning_rate=0.01)
    collect(model, callback)
    callback.on_rollout_start()
    assert 0 < callback.updates < 50


def test_replay_alone_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = PrioritisedReplayCallback(ReplaySettings(updates=10, segments_per_update=8, warm_up=1))
    environments = DummyVecEnv([Seek] * ENVIRONMENTS)
    model = PPO(KnobPolicy, environments, n_steps=STEPS, learning_rate=3e-3, gamma=0.9, seed=0, device="cpu")
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(60 * ENVIRONMENTS * STEPS, callback=callback)
    rewards = callback._stored.data.rewards
    early, late = rewards[: 8 * ENVIRONMENTS].mean(), rewards[52 * ENVIRONMENTS : 60 * ENVIRONMENTS].mean()
    assert late > early + 0.1, f"{early} to {late}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 0), ("segments_per_update", 0), ("updates", -1), ("priority", "td"), ("alpha", -0.1),
        ("alpha", np.nan), ("beta_start", 1.1), ("max_age", -1), ("max_ratio", 0.9), ("max_ratio", np.inf),
        ("warm_up", 0), ("updates", 2.5),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ReplaySettings(**{name: value})


def test_says_what_it_cannot_work_with() -> None:
    with pytest.raises(ValueError, match="seed"):
        PrioritisedReplayCallback(seed=-1)
    with pytest.raises(ValueError, match="capacity must be at least the number of environments, 4"):
        learner(PrioritisedReplayCallback(ReplaySettings(capacity=3)))
    with pytest.raises(TypeError, match="A2C is not a PPO"):
        A2C("MlpPolicy", DummyVecEnv([Seek]), device="cpu")._setup_learn(10, PrioritisedReplayCallback())
