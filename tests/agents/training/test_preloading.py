"""Environments in processes of their own share the models that were loaded before they were forked."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def run(tmp_path: Path, *workloads: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[3]
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), json.dumps(workloads), str(tmp_path / "profile.json")]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=False)


def printed(tmp_path: Path, *workloads: str) -> dict[str, Any]:
    done = run(tmp_path, *workloads)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_processes_find_the_pairs_loaded_and_step_as_one_process_does(
    tmp_path: Path, small_workloads: tuple[str, str]
) -> None:
    names = list(small_workloads)
    assert printed(tmp_path, *names) == {
        "same": True,
        "found": [names] * 2,
        "alone": [None] * 2,
        "left": False,
        "placed": [["bfloat16", None]] * 2,
    }


def test_a_pair_that_cannot_be_loaded_is_reported_by_the_process_that_needs_it(
    tmp_path: Path, small_workloads: tuple[str, str]
) -> None:
    missing = f"{tmp_path / 'nowhere'}+{tmp_path / 'nothing'}/prose"
    done = run(tmp_path, small_workloads[0], missing)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
