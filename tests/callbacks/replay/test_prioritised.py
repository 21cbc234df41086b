"""Prioritised replay as a callback: when it replays, what it logs, and how a saved one resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from specgym.callbacks.checkpoints import CheckpointError
from specgym.callbacks.replay.prioritised import PrioritisedReplayCallback
from specgym.callbacks.replay.settings import ReplaySettings
from specgym.decoding import read_arrays, write_arrays
from tests.helpers.replaying_learner import ENVIRONMENTS, STEPS, Seek, collect, learner, parameters, replayed


def test_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, callback = replayed()
    model.save(tmp_path / "policy.zip")
    callback.save_state(tmp_path)
    restored = PrioritisedReplayCallback(callback.settings, seed=99)
    restored.load_state(tmp_path)
    other = PPO.load(tmp_path / "policy.zip", env=model.get_env(), device="cpu")
    other._setup_learn(1000, restored, reset_num_timesteps=False)
    before = parameters(other)
    for item in (callback, restored):
        item.on_rollout_start()
    assert (restored.updates, restored.dropped) == (callback.updates, callback.dropped) == (4, 0)
    assert (parameters(model) != before).any()
    torch.testing.assert_close(parameters(other), parameters(model), rtol=0, atol=0)
    np.testing.assert_array_equal(restored._stored.tree.priorities, callback._stored.tree.priorities)
    for mine, theirs in zip(restored._stored.data, callback._stored.data, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    draws = [item._stored.tree.draw(3, 5, item._rng) for item in (callback, restored)]
    np.testing.assert_array_equal(draws[0], draws[1])
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
    arrays, _ = read_arrays(file)
    arrays["rewards"][0, 0] = np.nan
    write_arrays(file, arrays)
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
