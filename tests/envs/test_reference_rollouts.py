"""Seeded rollouts of every replayed environment, as they were when this file of them was last written.

``python -m tests.envs.test_reference_rollouts`` writes them anew, which only a deliberate change of behaviour needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import specgym  # noqa: F401  # registers the environments

FILE = Path(__file__).with_name("data") / "reference_rollouts.json"
STEPS = 6
THRESHOLDS = "specgym/Thresholds-v0"
CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "thresholds": (THRESHOLDS, None, {}),
    "thresholds, sampled": (THRESHOLDS, None, {"workload": "tiny/prose@1.0"}),
    "thresholds, three prompts a step": (THRESHOLDS, None, {"prompts_per_step": 3}),
    "thresholds, placed": (THRESHOLDS, None, {"action": "place"}),
    "thresholds, bounded": (THRESHOLDS, None, {"reward": {"max_divergence": 0.02}}),
    "thresholds, three workloads": (THRESHOLDS, 4, {"workload": ["tiny/prose", "tiny/code", "tiny/prose@1.0"]}),
    "exact": (THRESHOLDS, None, {"decoder": "speculative"}),
    "exact, together": (THRESHOLDS, 2, {"decoder": "speculative"}),
    "lookahead": ("specgym/Lookahead-v0", None, {}),
    "lookahead, together": ("specgym/Lookahead-v0", 2, {}),
    "medusa": ("specgym/Medusa-v0", None, {}),
    "draft tree": ("specgym/DraftTree-v0", None, {}),
    "draft tree, together": ("specgym/DraftTree-v0", 2, {}),
    "pipeline": ("specgym/Pipeline-v0", None, {}),
    "pipeline, together": ("specgym/Pipeline-v0", 2, {"workload": ["tiny/code", "tiny/prose@1.0"]}),
    "draft length": ("specgym/DraftLength-v0", None, {}),
    "draft length, sampled": ("specgym/DraftLength-v0", None, {"workload": "tiny/prose@1.0"}),
    "draft length, two workloads": ("specgym/DraftLength-v0", 3, {"workload": ["tiny/prose", "tiny/code"]}),
    "draft choice": ("specgym/DraftChoice-v0", None, {}),
    "draft choice, two workloads": (
        "specgym/DraftChoice-v0",
        3,
        {"workload": ["tiny-10m-mixed/code", "tiny-10m-mixed/definitions"]},
    ),
}


def rollout(case: str) -> list[list[Any]]:
    """Observations and rewards of some steps with random actions."""
    name, environments, options = CASES[case]
    env: Any
    if environments is None:
        env = gymnasium.make(name, backend="replay", **options)
    else:
        env = gymnasium.make_vec(name, num_envs=environments, **options)
    rng = np.random.default_rng(3)
    observation, _ = env.reset(seed=3)
    seen = [[np.asarray(observation).ravel().tolist(), []]]
    for _ in range(STEPS):
        if isinstance(env.action_space, gymnasium.spaces.Box):
            action: Any = rng.uniform(-1.2, 1.2, env.action_space.shape).astype(np.float32)
        else:
            action = (rng.random(environments or 1) < 0.4).astype(np.int64)
            if name == "specgym/DraftChoice-v0":
                action = np.where(action == 1, 0, rng.integers(1, 7, len(action)))
            action = action if environments else int(action[0])
        observation, reward = env.step(action)[:2]
        seen.append([np.asarray(observation).ravel().tolist(), np.atleast_1d(reward).tolist()])
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_stored_rollout(case: str) -> None:
    expected = json.loads(FILE.read_text(encoding="utf-8"))[case]
    for place, (ours, theirs) in enumerate(zip(rollout(case), expected, strict=True)):
        for mine, stored in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(stored, rel=1e-5, abs=1e-6), place


if __name__ == "__main__":
    FILE.write_text(json.dumps({case: rollout(case) for case in CASES}) + "\n", encoding="utf-8")
