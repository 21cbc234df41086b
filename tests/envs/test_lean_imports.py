"""Modules that the package, replayed environments and the first token of a text leave alone."""

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
FIRST_TOKEN = """
import sys
from specgym.decoding import SpeculativeDecoder, load_pair
SpeculativeDecoder(load_pair("tiny")).generate("Once", max_new_tokens=1)
floors = ("agents", "callbacks", "envs.backends", "decoding.engines", "decoding.fit", "decoding.latency")
others = ("gguf", "peft", "tensorboard", *{heavy!r}[2:])
unused = (*others, *(f"specgym.{{floor}}" for floor in floors))
print(*(name for name in sys.modules if name.startswith(unused)))
"""


def printed(script: str) -> list[str]:
    """Words that a script prints, in a process of its own."""
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_the_package_loads_neither_models_nor_floors_that_nothing_asked_for() -> None:
    unused = (*HEAVY, "specgym.agents", "specgym.callbacks", "specgym.decoding.models")
    assert printed(f"import sys, specgym; print(*(name for name in sys.modules if name.startswith({unused!r})))") == []


def test_the_first_token_of_a_text_loads_nothing_to_train_measure_or_draw_with() -> None:
    assert printed(FIRST_TOKEN.format(heavy=HEAVY)) == []


@pytest.mark.parametrize("name", ["Thresholds", "Lookahead", "DraftLength", "DraftChoice"])
def test_a_replayed_environment_loads_neither_models_nor_figures(name: str) -> None:
    assert printed(REPLAY.format(name=f"specgym/{name}-v0", heavy=HEAVY)) == []
