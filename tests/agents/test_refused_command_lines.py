"""Command lines that cannot work, by kind: refused with a message and exit code 2, leaving nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from specgym.agents import default_settings, evaluate_command, save_settings, train_command, tuner_settings
from specgym.decoding import run_command
from specgym.decoding.fit.__main__ import main as fit
from specgym.envs.profiles import main as profile
from specgym.envs.record import main as record

STOP = ["--env", "specgym/DraftLength-v0", "--workloads", "tiny/prose"]
LIVE = ["--environment.backend", "live", "--workloads", "tiny-3m-ngram/prose", "tiny-3m-ngram/code"]
LONG = "é" * 200
MEDUSA = ["medusa", "--target", "tiny-3m", "--out", "o"]


def code_of(command: Callable[[Sequence[str]], object], words: Sequence[str]) -> object:
    """The exit code of a command in this process."""
    try:
        return command(words)
    except SystemExit as ended:  # by the parser of options
        return ended.code


def as_program(main: Callable[[Sequence[str]], object]) -> Callable[[Sequence[str]], int]:
    """A command that is a function, as its module runs it."""
    return lambda words: run_command(partial(main, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", str(2**32)], "each of seeds must be a whole number from 0 to 4294967295"),
        (["--seeds", "1" + "0" * 400], "from 0 to 4294967295, got 1000"),
        (["--threads", "99999"], "threads must be a whole number from 0 to 1024, got 99999"),
        (["--environments", "999999999"], "environments must be a whole number from 0 to 65536"),
        (["--total-timesteps", "9" * 30], "total_timesteps must be a whole number from 1 to 10000000000"),
        (["--learning.epochs", "1000000"], "epochs must be a whole number from 1 to 1000"),
        (["--learning.learning-rate", "1e400"], "learning_rate must be a number above 0"),
        (["--learning.replay.capacity", str(2**40)], "capacity must be a whole number from 1"),
        (["--name", LONG], "name must have at most 200 bytes"),
        (["--runs", LONG], "File name too long; give another folder with --runs"),
        (["--runs", "/dev/null"], "Not a directory; give another folder with --runs"),
        (["--workloads", "no-such-model+tiny-3m/prose"], "no-such-model"),
        (["--workloads", "tiny/nowhere.txt"], "nowhere.txt"),
        (["--resume", LONG], "File name too long"),
        (
            [*STOP, "--learning.policy-layers", str(2**40)],
            "policy_layers must be a whole number from 1 to 65536",
        ),
        ([*STOP, "--comparison.resamples", str(2**40)], "resamples must be a whole number from 10 to 1000000"),
        ([*STOP, "--recordings", "nowhere"], "nowhere"),
        (["--ray"], "--ray is for --environment.backend live"),
        (["--env", "specgym/Engine-v0"], "a few measurements tune an engine: train.py --engine"),
        (["--tuner", "--ray"], "--ray is for --environment.backend live"),
        ([*LIVE, "--environment.timing", "wall", "--ray"], "leave out --environment.timing wall"),
        ([*LIVE, "--ray", "nonsense"], "--ray takes auto, local, host:port or ray://host:port, got 'nonsense'"),
        (["--tuner", "--seed", str(2**32)], "seed must be a whole number from 0 to 4294967295"),
        (["--tuner", "--measurements", "99999"], "measurements must be a whole number from 1 to 10000"),
    ],
)
def test_training(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Callable[[], str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert code_of(train_command, words) == 2
    said = shown()
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tuner", "words", "message"),
    [
        (False, ["--live", "tiny/prose"], "--live is for runs of"),
        (False, ["--pair", "tiny"], "are for runs of train.py --tuner"),
        (True, ["--pair", "tiny"], "holds no finished policy"),
        (True, ["--transfer", "--jobs", "99999"], "--jobs must be a whole number from 1 to 256"),
        (True, ["--transfer", "--seeds", "-1"], "each of --seeds must be a whole number from 0"),
        (True, ["--pair", "tiny", "--device", "gpu"], "device must be cpu"),
        (True, ["--pair", "tiny", "--ray"], "--ray is for --transfer"),
    ],
)
def test_evaluation(tuner: bool, words: list[str], message: str, tmp_path: Path, shown: Callable[[], str]) -> None:
    settings = tuner_settings() if tuner else default_settings()
    save_settings(settings, tmp_path / "settings.json", "python train.py")
    assert code_of(evaluate_command, [str(tmp_path), *words]) == 2
    assert message in shown()
    assert list(tmp_path.iterdir()) == [tmp_path / "settings.json"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (record, ["tiny/prose", "--threads", "99999"], "threads must be a whole number from 0 to 1024"),
        (record, ["tiny/prose", "--seed", str(2**32)], "seed must be a whole number from 0 to 4294967295"),
        (record, ["tiny/prose", "--out", LONG], "File name too long"),
        (record, ["tiny-3m/prose"], "a trace needs a draft, and pair tiny-3m has none: name <target>+<draft>"),
        (record, ["nothing/prose"], "nothing"),
        (record, ["tiny-3m/prose", "--decoder", "lookahead", "--refine", str(2**32)], "refine must be a whole number"),
        (profile, ["tiny/prose", "--threads", "99999"], "threads must be a whole number from 0 to 1024"),
        (fit, [*MEDUSA, "--threads", "99999"], "--threads must be a whole number from 0 to 1024"),
        (fit, [*MEDUSA, "--seed", str(2**32)], "--seed must be a whole number from 0 to 4294967295"),
        (fit, [*MEDUSA, "--tokens", "1" + "0" * 400], "--tokens must be a whole number from 1"),
        (fit, [*MEDUSA, "--learning-rate", "nan"], "--learning-rate must be a number above 0 and at most 10"),
        (fit, [*MEDUSA, "--temperature", "inf"], "--temperature must be a finite number of at least 0"),
        (fit, [*MEDUSA, "--device", "toaster"], "--device toaster cannot be used"),
        (fit, ["corpus"], "python -m recipes.corpus"),
    ],
)
def test_recording_and_fitting(
    command: Callable[[Sequence[str]], object],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shown: Callable[[], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert code_of(as_program(command), words) == 2
    said = shown()
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
