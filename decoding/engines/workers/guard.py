"""A guard of an engine: starts it, and stops it with all that it has started when we say so, or die.

``python guard.py PID SECONDS COMMAND...`` runs the command in a session of its own and ends with its exit code (128 and
the signal's number if a signal ended it). When the guard is sent SIGTERM, or the process PID is no longer its parent,
the command and its process group are terminated, and killed after some seconds. A guard is a process, and no thread or
exit handler of ours, since nothing of ours is left to run after SIGKILL. For POSIX systems.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_INTERVAL = 0.1  # seconds between two looks at the engine
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(parent: int, patience: float, command: list[str]) -> int:
    """Run a command while a process is our parent.

    Args:
        parent: id of the process.
        patience: seconds that the command has for its end when it is terminated.
        command: program and arguments.

    Returns:
        The command's exit code.
    """
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    if prctl:  # what leaves the engine's group, and loses its parent, becomes a child of ours
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        engine = subprocess.Popen(command, start_new_session=True, preexec_fn=_child(prctl))
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # so that who reads the engine's output meets its end
        os.dup2(null, stream)
    while engine.poll() is None and not asked and os.getppid() == parent:
        time.sleep(_INTERVAL)
    if engine.poll() is None:
        _signal_group(engine.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            engine.wait(patience)
    _signal_group(engine.pid, signal.SIGKILL)
    code = engine.wait()
    _kill_children()
    return code if code >= 0 else 128 - code


def _child(prctl: Callable[..., int] | None) -> Callable[[], None] | None:
    """Let the kernel kill the engine if the guard itself is killed; on Linux alone."""
    return None if prctl is None else lambda: (prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), None)[1]


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(group, number)


def _kill_children() -> None:
    """Kill what the engine has left outside its group, as far as Linux tells."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    while listed.is_file() and (children := listed.read_text().split()):
        for child in map(int, children):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
