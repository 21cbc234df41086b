"""Runs that are killed half-way, and given again: of a fit command, and of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from specgym.decoding.fit.text import states, target_text

KILLED_TRAINING = """
import os, signal
from specgym.agents import train_command
from specgym.callbacks import FolderCheckpointCallback

save = FolderCheckpointCallback.save

def save_and_die(self):
    folder = save(self)
    if len(list(folder.parent.glob("step_*"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return folder

FolderCheckpointCallback.save = save_and_die
train_command()
"""
"""`train.py`, for `python -c`, that is killed when it has two checkpoints, however busy the machine is."""

INTERRUPTED_TRAINING = """
import os, signal, sys, threading, time
from pathlib import Path
from specgym.agents import train_command

def interrupt():
    while not any(file.stat().st_size > 1000 for file in Path(os.environ["RUN"]).glob("tensorboard/*")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

# Where the tests run in the background of a script, they and their children ignore the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt, daemon=True).start()
sys.exit(train_command())
"""
"""`train.py`, for `python -c`, that gets a SIGINT wherever it is when it has learned a little.

The variable ``RUN`` names the folder of the run.
"""


def assert_resumed_as_if_never_killed(
    make: Callable[[Any], object],
    settings: Any,
    module: ModuleType,
    save: str,
    weights: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Killed at its 17th checkpoint of 30 and given again, a run writes the same weights, and neither text nor states
    anew.

    Args:
        make: the command.
        settings: of it.
        module: where `make` is.
        save: name there of what writes the weights.
        weights: the file that it writes.
        folder: for both runs.
        monkeypatch: of the test.

    Returns:
        The settings of the run that was killed.
    """
    settings = replace(settings, loop=replace(settings.loop, checkpoint_minutes=0.0, tokens=30 * 32))
    make(replace(settings, out=folder / "whole/made"))
    state = settings.loop.work / "made.pt"
    state.unlink()
    calls = list[int]()

    def killed(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt

    parts = replace(settings, out=folder / "parts/made")
    with monkeypatch.context() as patch:
        patch.setattr(module, save, killed)
        with pytest.raises(KeyboardInterrupt):
            make(parts)

    def refused(*_: Any) -> None:
        raise AssertionError("it was there")

    monkeypatch.setattr(target_text, "continue_rows", refused)
    monkeypatch.setattr(states, "_compute", refused)
    make(parts)
    whole, resumed = ((folder / name / "made" / weights).read_bytes() for name in ("whole", "parts"))
    assert resumed == whole
    assert torch.load(state, weights_only=True)["outcome"]["steps"] == 30
    return parts
