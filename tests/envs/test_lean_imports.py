"""Modules that replayed environments leave alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "rich", "tyro", "stable_baselines3")
REPLAY = """
import sys
import gymnasium, specgym
env = gymnasium.make({name!r}, backend="replay")
env.reset(seed=0)
env.step(env.action_space.sample())
many = gymnasium.make_vec({name!r}, num_envs=3)
many.reset(seed=0)
many.step(many.action_space.sample())
print(*(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize("name", ["Thresholds", "Lookahead", "DraftLength", "DraftChoice"])
def test_a_replayed_environment_loads_neither_models_nor_figures(name: str) -> None:
    script = REPLAY.format(name=f"specgym/{name}-v0", heavy=HEAVY)
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
