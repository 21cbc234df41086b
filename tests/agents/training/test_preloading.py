"""Environments in processes of their own share the models that were loaded before they were forked."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from tests.helpers.warm_python import ROOT, Ended, WarmPython

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system has no fork server"
)

# A fork server lives as long as the process that started it, so every test needs a process of its own.
SCRIPT = """
import json, os, sys
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from specgym.agents.training import environments
from specgym.agents import default_settings
from specgym.decoding import LatencyProfile, default_placement


class Telling(gymnasium.Wrapper):
    \"\"\"Says which pairs its process found loaded.\"\"\"

    @property
    def found(self):
        module = sys.modules.get("specgym.agents.training.preloading")
        return None if module is None else list(module.LOADED)

    @property
    def placed(self):
        return default_placement()


def made(*arguments, **options):
    return Telling(real(*arguments, **options))


def rollout(subprocesses):
    chosen = default_settings(
        "threshold",
        workloads=workloads,
        subprocesses=subprocesses,
        dtype="bfloat16",
        environment={"backend": "live", "max_new_tokens": 8},
    )
    if subprocesses:
        venv = environments.training_environments(chosen, [profile] * len(workloads))
    else:
        makers = [partial(environments.make_env, chosen, place, profile) for place in range(len(workloads))]
        venv = environments._wrapped(DummyVecEnv(makers), chosen, training=True)
    venv.seed(3)
    seen = [venv.reset().ravel()]
    for _ in range(3):
        observations, rewards, _, _ = venv.step(np.full((len(workloads), 2), 0.2, np.float32))
        seen += [observations.ravel(), rewards]
    found = venv.get_attr("found")
    placed = venv.get_attr("placed")
    venv.close()
    return np.concatenate(seen), found, placed


if __name__ == "__main__":
    workloads = tuple(json.loads(sys.argv[1]))
    profile = Path(sys.argv[2])
    LatencyProfile("toy", {0: 0.0, 1: 0.001}, {1: 0.010, 2: 0.011}, 0.010, {"device": "imaginary"}).save(profile)
    real, environments.make_env = environments.make_env, made
    apart, found, placed = rollout(True)
    together, alone, _ = rollout(False)
    left = environments.PRELOADED in os.environ or default_placement() != (None, None)
    same = bool(np.allclose(apart, together, rtol=1e-5))  # sums are rounded by where in memory their numbers lie
    print(json.dumps({"same": same, "found": found, "alone": alone, "left": left, "placed": placed}))
"""


def run(warm_python: WarmPython, tmp_path: Path, *workloads: str) -> Ended:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm_python.run(script, json.dumps(workloads), tmp_path / "profile.json", environment=environment)


def test_processes_find_the_pairs_loaded_and_step_as_one_process_does(
    warm_python: WarmPython, tmp_path: Path, small_workloads: tuple[str, str]
) -> None:
    names = list(small_workloads)
    done = run(warm_python, tmp_path, *names)
    assert done.returncode == 0, done.output
    printed = next(line for line in reversed(done.output.splitlines()) if line.startswith("{"))
    assert json.loads(printed) == {
        "same": True,
        "found": [names] * 2,
        "alone": [None] * 2,
        "left": False,
        "placed": [["bfloat16", None]] * 2,
    }


def test_a_pair_that_cannot_be_loaded_is_reported_by_the_process_that_needs_it(
    warm_python: WarmPython, tmp_path: Path, small_workloads: tuple[str, str]
) -> None:
    missing = f"{tmp_path / 'nowhere'}+{tmp_path / 'nothing'}/prose"
    done = run(warm_python, tmp_path, small_workloads[0], missing)
    assert done.returncode != 0
    assert "nowhere" in done.output
