"""`train.py` and `evaluate.py` as a user runs them: killed, resumed, finished, repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specgym.agents.command_line import train_command
from specgym.agents.training.run_folder import torch_threads
from specgym.decoding.latency import measure as latency_measure
from specgym.envs.workloads import workload
from tests.helpers.killed_runs import INTERRUPTED_TRAINING, KILLED_TRAINING
from tests.helpers.warm_python import ROOT, WarmPython


@pytest.fixture(scope="module")
def environment(small_workloads: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of its own, with latency profiles that nobody measured, and one thread: the models are tiny."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch, torch_threads(1):
        patch.setenv("SPECGYM_CACHE", cache)
        for name in small_workloads:
            latency_measure.measured(workload(name).load(), sampling=workload(name).sampling)
    changes = {"SPECGYM_CACHE": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | changes


def test_killed_resumed_finished_and_reproduced(
    small_workloads: tuple[str, str], environment: dict[str, str], warm_python: WarmPython, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "runs" / "killed"
    killed = warm_python.run(
        "-c", KILLED_TRAINING, "--workloads", *small_workloads, "--runs", run.parent, "--name", run.name,
        "--environment.backend", "live", "--seeds", 0, "--environment.prompts-per-step", 1, "--no-subprocesses",
        "--total-timesteps", 240, "--checkpoint-every", 20, "--learning.rollout-steps", 10,
        "--learning.batch-size", 10, "--environment.max-new-tokens", 8, "--environment.max-draft-length", 4,
        "--evaluation.prompts", 2, "--evaluation.max-new-tokens", 8, "--evaluation.during-training", 2,
        environment=environment,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.output
    assert not (run / "policy.zip").exists()
    checkpoints = sorted(run.glob("checkpoints/step_*"))
    newest, former = checkpoints[-1], checkpoints[-2]
    (newest / "policy.zip").write_bytes((newest / "policy.zip").read_bytes()[:1000])
    (run / "checkpoints" / ".unfinished-x").mkdir()

    resumed = warm_python.run("train.py", "--resume", run, environment=environment)
    assert resumed.returncode == 0, resumed.output
    text = " ".join(resumed.output.split())
    assert f"Going on from step {int(former.name.removeprefix('step_'))}." in text
    assert "does not match its checksum" in text
    assert not (run / "checkpoints" / ".unfinished-x").exists()
    for name in ("policy.zip", "policy.safetensors", "policy.json", "vecnormalize.pkl", "settings.json"):
        assert (run / name).stat().st_size > 0
    thresholds = json.loads((run / "knobs.json").read_text())
    assert set(thresholds["workloads"]) == set(small_workloads)
    assert len(thresholds["pairs"]) == any(thresholds["workloads"].values())  # models so small seldom pay
    assert set(thresholds["reasons"]) == set(small_workloads)
    table = json.loads((run / "table.json").read_text())
    assert "train.py --resume" in table["command"]
    methods = ("plain", "exact, fixed", "exact, stop rule", "default", "learned")
    assert [row["method"] for row in table["rows"]] == [*methods] * 3

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("reward/total")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 240
    assert f"workload/{small_workloads[1]}/knobs/fallback" in events.Tags()["scalars"]
    assert events.Scalars("numerics/observations")[-1].value == 0
    assert "eval/mean_reward" in events.Tags()["scalars"]

    (run / "table.json").unlink()
    again = warm_python.run("train.py", "--resume", run, environment=environment)
    assert again.returncode == 0, again.output
    assert "All 240 steps are done" in again.output
    charged = table["protocol"]["charged"]
    remade = json.loads((run / "table.json").read_text())["rows"]
    assert [[row.get(name) for name in charged] for row in remade] == [
        [row.get(name) for name in charged] for row in table["rows"]
    ]
    evaluated = warm_python.run("evaluate.py", run, environment=environment)
    assert evaluated.returncode == 0, evaluated.output
    assert "All charged numbers equal" in " ".join(evaluated.output.split())


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child there")
def test_interrupted_it_saves_and_says_how_to_go_on(
    small_workloads: tuple[str, str], environment: dict[str, str], warm_python: WarmPython, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "interrupted"
    ended = warm_python.run(
        "-c", INTERRUPTED_TRAINING, "--workloads", small_workloads[0], "--runs", run.parent, "--name", run.name,
        "--environment.backend", "live", "--seeds", "0", "--environment.prompts-per-step", "1",
        "--total-timesteps", "100000", "--checkpoint-every", "100000", "--evaluation.during-training", "0",
        "--environment.max-new-tokens", "4", "--environment.max-draft-length", "2",
        environment=environment | {"RUN": str(run)},
    )  # fmt: skip
    assert ended.returncode == 130, ended.output
    assert "Traceback" not in ended.output
    assert f"--resume {run}" in ended.output
    assert len(list(run.glob("checkpoints/step_*/state.json"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "tiny/prosa"], "Did you mean 'prose'"),
        (["--resume", "nowhere"], "is not the folder of a run"),
        (["--learning.gamma", "2"], "gamma must be a number from 0 to 1"),
        (["--total-timesteps", "many"], "many"),
    ],
)
def test_bad_options_are_one_message_and_exit_code_2(
    options: list[str], message: str, tmp_path: Path, shown: Callable[[], str]
) -> None:
    code: Any
    try:
        code = train_command(["--runs", str(tmp_path / "runs"), *options])
    except SystemExit as refused:  # by tyro
        code = refused.code
    assert code == 2
    assert message in shown()
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_option(environment: dict[str, str]) -> None:
    help_of = [[sys.executable, script, "--help"] for script in ("train.py", "evaluate.py")]
    shown, other = (
        subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment) for words in help_of
    )
    assert shown.returncode == other.returncode == 0
    for option in ("--resume", "--workloads", "--learning.gae-lambda", "--environment.reward.divergence-weight"):
        assert option in shown.stdout
    assert "--help" in other.stdout
