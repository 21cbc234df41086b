"""Names of constructor arguments and reset options, present and earlier ones."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.envs.workloads import renamed

THRESHOLDS, CONTROL = "specgym/Thresholds-v0", "specgym/DraftLength-v0"


def test_earlier_names_are_replaced_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="tokens is called max_new_tokens now"):
        assert renamed({"tokens": 5, "rate": 1.0}, {"tokens": "max_new_tokens"}) == {"max_new_tokens": 5, "rate": 1.0}
    assert renamed({"max_new_tokens": 5}, {"tokens": "max_new_tokens"}) == {"max_new_tokens": 5}
    with pytest.raises(TypeError, match="tokens is an earlier name of max_new_tokens; give max_new_tokens alone"):
        renamed({"tokens": 5, "max_new_tokens": 6}, {"tokens": "max_new_tokens"})


@pytest.mark.parametrize(
    ("name", "earlier", "present"),
    [
        (THRESHOLDS, {"tokens_per_step": 8}, {"max_new_tokens": 8}),
        (THRESHOLDS, {"decoder": "speculative", "draft_length": 4}, {"decoder": "speculative", "max_draft_length": 4}),
        (CONTROL, {"tokens": 8, "trace": None}, {"max_new_tokens": 8, "recording": None}),
    ],
)
def test_environments_take_earlier_names(name: str, earlier: dict[str, Any], present: dict[str, Any]) -> None:
    with pytest.warns(DeprecationWarning, match="is called"):
        old = gymnasium.make(name, backend="replay", **earlier)
    with pytest.warns(DeprecationWarning, match="is called"):
        together = gymnasium.make_vec(name, num_envs=2, **earlier)
    new = gymnasium.make(name, backend="replay", **present)
    again = pickle.loads(pickle.dumps(old.unwrapped))
    action = new.action_space.sample()
    results = []
    for env in (old, new, again):
        env.reset(seed=0)
        results.append(env.step(action)[1])
    assert results == [results[0]] * 3
    assert together.single_observation_space == new.observation_space


def test_the_earlier_reset_option_is_taken() -> None:
    env = gymnasium.make_vec(CONTROL, num_envs=2)
    with pytest.warns(DeprecationWarning, match="prompts is called prompt now"):
        earlier = env.reset(seed=0, options={"prompts": np.array([1, 2])})[0]
    assert (env.reset(seed=0, options={"prompt": np.array([1, 2])})[0] == earlier).all()
