"""Help of train.py and evaluate.py: complete, at once, and without what only learning needs."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from specgym.agents.command_line import evaluate_command, learnable, train_command

HEAVY = ("torch", "transformers", "stable_baselines3", "matplotlib", "tensorboard", "scipy", "jinja2")
BEGINNINGS = r"(What|How|Of|As|The same|Whether|Where|When|From|Under what|For|By|With)\b"
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "agents/command_line.py",
    "agents/experiments/experiment.py",
    "agents/experiments/control/control_settings.py",
    "agents/experiments/control/stop_drafts_settings.py",
    "agents/experiments/tune_knobs_settings.py",
    "agents/experiments/tune_unseen_settings.py",
    "callbacks/replay/settings.py",
    "envs/tuning/reward.py",
)


@pytest.mark.parametrize("command", ["train_command", "evaluate_command"])
def test_help_loads_nothing_that_only_learning_needs(command: str) -> None:
    script = (
        f"import sys\nfrom specgym.agents import command_line\ntry:\n    command_line.{command}(['--help'])\n"
        f"except SystemExit:\n    print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize("words", [*(["--env", env] for env in learnable()), ["--tuner"]])
def test_help_lists_every_environment_and_the_options_of_all(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_command([*words, "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    for expected in (
        "--resume",
        "--workloads",
        "--learning.gae-lambda",
        "--checkpoint-every",
        *learnable("--tuner" in words),
    ):
        assert expected in text


@pytest.mark.parametrize("path", SETTINGS)
def test_every_option_s_help_begins_with_a_noun_or_a_verb(path: str) -> None:
    classes = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.ClassDef)]
    lines = [
        following.value.value
        for kind in classes
        for field, following in itertools.pairwise(kind.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    ]
    assert lines
    assert [line for line in lines if re.match(BEGINNINGS, str(line))] == []


def test_a_length_of_prompts_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--max-prompt-tokens", "1"]) == 2
    assert "max_prompt_tokens must be" in capsys.readouterr().err
    run = ROOT / "tests" / "fixtures" / "runs" / "tuner"
    assert evaluate_command([str(run), "--max-prompt-tokens", "64"]) == 2
    assert "--max-prompt-tokens is for --pair" in capsys.readouterr().err


def test_an_unknown_environment_is_refused(shown: Callable[[], str]) -> None:
    with pytest.raises(SystemExit) as refused:
        train_command(["--env", "specgym/Lookahead-v7"])
    assert refused.value.code == 2
    assert "specgym/DraftLength-v0" in shown()
