"""The policy: its networks, its bounded spread, its own scaling of observations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from specgym.agents.policy import KnobPolicy
from specgym.agents.training.sb3_vec_env import FiniteAdam
from specgym.decoding import NumericalError

NAMES = ("fallback", "rollback")
STATES = spaces.Box(np.array([0.05, 1], np.float32), np.array([0.95, 16], np.float32))
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)


def make_policy(**settings: Any) -> KnobPolicy:
    return KnobPolicy(STATES, ACTIONS, lambda _: 1e-3, knob_names=NAMES, **settings)


def test_two_separate_networks_of_two_layers_with_64_units() -> None:
    networks = make_policy().mlp_extractor
    for network in (networks.policy_net, networks.value_net):
        assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [64, 64]
    shared = {id(p) for p in networks.policy_net.parameters()} & {id(p) for p in networks.value_net.parameters()}
    assert not shared


def test_names_a_mean_and_a_std_for_every_knob() -> None:
    options = make_policy().distribution_parameters(torch.tensor([[0.5, 4.0], [0.1, 16.0]]))
    assert set(options) == {"fallback_mean", "fallback_std", "rollback_mean", "rollback_std"}
    assert all(values.shape == (2,) for values in options.values())
    torch.testing.assert_close(options["fallback_std"], torch.full((2,), 0.5), atol=0.02, rtol=0)


def test_spread_depends_on_the_state_and_stays_within_its_bounds() -> None:
    policy = make_policy(std_low=0.1, std_high=0.8, std_start=0.4)
    with torch.no_grad():
        policy.spread_net.weight.mul_(1e4)
    states = torch.tensor(np.array([STATES.sample() for _ in range(200)]))
    spread = policy.distribution_parameters(states)["rollback_std"]
    assert spread.min() >= 0.1 - 1e-6
    assert spread.max() <= 0.8 + 1e-6
    assert spread.max() - spread.min() > 0.5


def test_states_are_scaled_by_their_bounds_to_one() -> None:
    scaled = make_policy().features_extractor(
        torch.tensor(np.array([STATES.low, STATES.high, [0.5, 8.5]]), dtype=torch.float32)
    )
    torch.testing.assert_close(scaled, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]), atol=1e-6, rtol=0)


def test_every_parameter_is_learned_by_the_optimiser() -> None:
    policy = make_policy()
    assert isinstance(policy.optimizer, FiniteAdam)
    learned = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert learned == {id(p) for p in policy.parameters()}
    assert not hasattr(policy, "log_std")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std_start": 2.0}, "std_low < std_start < std_high"),
        ({"std_low": 0.0}, "0 < std_low"),
        ({"knob_names": ("one",)}, "1 knob names"),
    ],
)
def test_refuses_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnobPolicy(STATES, ACTIONS, lambda _: 1e-3, **settings)


def test_refuses_spaces_without_bounds() -> None:
    with pytest.raises(ValueError, match="bounded Box"):
        KnobPolicy(spaces.Box(-np.inf, np.inf, (2,)), ACTIONS, lambda _: 1e-3)
    with pytest.raises(ValueError, match="flat Box"):
        KnobPolicy(STATES, spaces.Discrete(3), lambda _: 1e-3)


def test_saved_and_loaded_it_acts_the_same(fake_tuning: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"knob_names": NAMES, "std_high": 0.9}
    model = PPO(KnobPolicy, fake_tuning(), n_steps=20, batch_size=20, policy_kwargs=settings, seed=1, device="cpu")
    model.learn(40)
    model.save(tmp_path / "policy.zip")
    state = np.array([0.5, 4.0], np.float32)
    loaded = PPO.load(tmp_path / "policy.zip", device="cpu")
    np.testing.assert_array_equal(
        model.predict(state, deterministic=True)[0], loaded.predict(state, deterministic=True)[0]
    )
    assert isinstance(loaded.policy, KnobPolicy)
    assert loaded.policy.std_high == 0.9
    model.policy.save(str(tmp_path / "alone.zip"))
    assert KnobPolicy.load(str(tmp_path / "alone.zip")).knob_names == NAMES


def test_learns_to_go_where_the_reward_is(fake_tuning: Callable[..., Any]) -> None:
    model = PPO(
        KnobPolicy,
        fake_tuning(),
        n_steps=200,
        batch_size=100,
        learning_rate=3e-3,
        gamma=0.9,
        seed=0,
        device="cpu",
    )
    model.learn(6000)
    for start in ([0.1, 2.0], [0.9, 15.0]):
        state = np.array(start, np.float32)
        for _ in range(30):
            action, _ = model.predict(state, deterministic=True)
            state = np.clip(state + action * np.array([0.1, 1.0]), STATES.low, STATES.high).astype(np.float32)
        assert abs(state[1] - 8) < 3


def broken(policy: KnobPolicy, layer: str, value: float) -> KnobPolicy:
    with torch.no_grad():
        getattr(policy, layer).bias[0] = value
    return policy


@pytest.mark.parametrize("layer", ["action_net", "spread_net", "value_net"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_counts_broken_outputs_and_acts_with_no_change(layer: str, value: float) -> None:
    policy = broken(make_policy(), layer, value)
    actions, values, log_prob = policy(torch.tensor([[0.5, 4.0]]))
    assert torch.isfinite(actions).all()
    assert policy.broken_outputs == 1
    if layer == "value_net":
        assert not torch.isfinite(values).any()
    else:
        assert torch.isnan(log_prob).all()
        assert (actions == 0).all()
        action, _ = policy.predict(np.array([0.5, 4.0], np.float32))
        assert (action == 0).all()


def test_gives_up_with_the_way_out_after_too_many_broken_passes() -> None:
    policy = broken(make_policy(patience=3), "action_net", float("nan"))
    state = torch.tensor([[0.5, 4.0]])
    for _ in range(3):
        policy(state)
        policy.predict_values(state)
    with pytest.raises(NumericalError, match="earlier checkpoint"):
        policy(state)
