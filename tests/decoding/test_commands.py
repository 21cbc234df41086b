"""Ends of commands: one line and an exit code, whatever ended them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from specgym.decoding.errors import KnobError, Terminated, run_command


class _Patience(KnobError):
    exit_code = 9


def _raise(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "line"),
    [
        (lambda: None, 0, ""),
        (_raise(KnobError("knob a must be less")), 2, "error: knob a must be less"),
        (_raise(_Patience("later")), 9, "error: later"),
        (_raise(OSError(errno.ENOSPC, "No space left on device", "a/b.json")), 2, "error: a/b.json: No space left on"),
        (_raise(OSError("gone")), 2, "error: gone"),
        (lambda: np.empty(2**50), 2, "error: not enough memory (MemoryError("),
        (_raise(KeyboardInterrupt()), 130, "interrupted. Give the same command again."),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "terminated. Give the same command again."),
    ],
)
def test_every_end_is_a_line_and_an_exit_code(
    run: Callable[[], object], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(run, "Give the same command again.") == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == bool(line)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_does_not_disturb_what_is_being_saved() -> None:
    saved = []

    def run() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append(True)
            raise

    assert run_command(run) == 143
    assert saved


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_last_words_that_do_not_fit_on_the_disk_are_no_traceback() -> None:
    script = "from specgym.decoding.errors import run_command\nraise SystemExit(run_command(lambda: print('done')))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"
