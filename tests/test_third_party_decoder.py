"""A decoder from outside the package, one file with one knob and no draft, in everything that decoders are for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.killed_runs import KILLED_TRAINING
from tests.helpers.outside_package import install
from tests.helpers.warm_python import ROOT, Ended, WarmPython

WORKLOAD = "tiny-3m/code"


class Outside:
    """Processes that find the outside package on their path, each from the root of this repository."""

    def __init__(self, folder: Path, warm_python: WarmPython) -> None:
        self.folder = folder
        install(folder)
        self._python = warm_python
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "SPECGYM_CACHE": str(folder / "cache"),
            "COLUMNS": "400",  # where a line of numbers is broken depends on them
        }

    def ended(self, *arguments: str) -> Ended:
        """Run python to its end, whatever that is."""
        return self._python.run(*arguments, environment=self._environment)

    def run(self, *arguments: str) -> str:
        """Run python to its end, which must be a good one, and return what it printed."""
        code, printed = self.ended(*arguments)
        assert code == 0, printed
        return printed


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython) -> Outside:
    return Outside(tmp_path_factory.mktemp("outside"), warm_python)


@pytest.fixture(scope="module")
def recordings(outside: Outside) -> Path:
    """Outcomes of both splits, recorded by the command."""
    out = outside.folder / "outcomes"
    outside.run(
        *("-m", "specgym.envs.record", WORKLOAD, "--decoder", "copy-last", "--out", str(out)),
        *("--settings", "5", "--prompts", "3", "--tokens", "32", "--threads", "1"),
    )
    return out


DECODE = """
import gymnasium, specgym
from specgym.decoding import AutoregressiveDecoder, build_decoder, load_pair

pair = load_pair("tiny-3m")
decoder = build_decoder("copy-last", pair)
plain = AutoregressiveDecoder(pair)
for prompt in ("And it came to pass", "def __init__(self, name):"):
    for copies in (0, 3, 8):
        text = decoder.generate(prompt, max_new_tokens=40, knobs={"copies": copies})
        assert text.tokens == plain.generate(prompt, max_new_tokens=40).tokens, (prompt, copies)
assert decoder.generate("one two one two one", max_new_tokens=30, knobs={"copies": 8}).mean_acceptance_length > 1

env = gymnasium.make("specgym/CopyLast-v0", workload="tiny-3m/code", render_mode="ansi", max_new_tokens=16)
env.reset(seed=0)
info = env.step(env.action_space.sample())[4]
assert info["divergence"] == 0 and info["speedup"] > 0 and 0 <= info["knobs/copies"] <= 8, info
print(env.render())
"""


def test_it_decodes_as_the_target_and_runs_live(outside: Outside) -> None:
    assert "taken back" in outside.run("-c", DECODE)


REPLAY = """
import sys
import time
from pathlib import Path

import gymnasium, numpy, specgym

folder = Path(sys.argv[1])
recording = next(folder.glob("*.train.npz"))
profile = sys.argv[2]
env = gymnasium.make("specgym/CopyLast-v0", backend="replay", recording=recording, profile=profile, max_new_tokens=32)
env.reset(seed=0)
rewards = [env.step(env.action_space.sample())[1] for _ in range(5)]
assert len(set(rewards)) > 1, rewards
many = gymnasium.make_vec(
    "specgym/CopyLast-v0", num_envs=8, recording=[recording], profile=[profile], max_new_tokens=32
)
many.reset(seed=0)
assert many.step(many.action_space.sample())[1].shape == (8,)
"""


def test_it_is_recorded_timed_and_replayed(outside: Outside, recordings: Path) -> None:
    latency = outside.folder / "latency"
    outside.run("-m", "specgym.envs.profiles", WORKLOAD, "--decoder", "copy-last", "--out", str(latency))
    (profile,) = latency.iterdir()
    assert len(list(recordings.glob("*.npz"))) == 2
    outside.run("-c", REPLAY, str(recordings), str(profile))


def test_it_is_learned_killed_resumed_judged_and_reported(outside: Outside, recordings: Path) -> None:
    run = outside.folder / "runs" / "mine"
    words = {
        "--env": "specgym/CopyLast-v0", "--workloads": WORKLOAD, "--runs": run.parent, "--name": run.name,
        "--environment.recordings": recordings, "--environment.max-new-tokens": 32, "--environments": 4,
        "--total-timesteps": 4000, "--checkpoint-every": 200, "--learning.rollout-steps": 10,
        "--learning.batch-size": 40, "--evaluation.prompts": 2, "--evaluation.max-new-tokens": 8,
        "--evaluation.during-training": 0,
    }  # fmt: skip
    code, output = outside.ended("-c", KILLED_TRAINING, *(str(word) for pair in words.items() for word in pair))
    assert code == -signal.SIGKILL, output
    assert not (run / "table.json").exists()
    assert "Going on from step" in outside.run("train.py", "--resume", str(run))
    printed = " ".join(outside.run("evaluate.py", str(run)).split())
    assert "All charged numbers equal" in printed
    assert "Mean speedup on one workload" in printed  # whichever is faster on this machine
    outside.run("evaluate.py", str(run), "--report")
    assert "opy-last knobs learned in mine" in (run / "report.html").read_text(encoding="utf-8")
    assert "specgym/CopyLast-v0" in outside.run("train.py", "--help")


def test_a_tuner_practises_on_it(outside: Outside, recordings: Path) -> None:
    runs = outside.folder / "runs"
    outside.run(
        *("train.py", "--env", "specgym/CopyLast-v0", "--tuner", "--workloads", WORKLOAD, "--runs", str(runs)),
        *("--name", "tuner", "--recordings", str(recordings), "--total-timesteps", "600", "--environments", "16"),
        *("--max-new-tokens", "32", "--prompts-per-measurement", "2", "--measurements", "2"),
    )
    assert "copies" in (runs / "tuner" / "knobs.json").read_text(encoding="utf-8")
