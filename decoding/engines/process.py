"""A process of an engine: started, watched and stopped, with its last words if it dies.

Nothing is left running: the process has a guard (`workers/guard.py`), which stops it and all that it has started when
it is asked to, and when this process ends in any way, SIGKILL included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from .engine import EngineError

_GUARD: Final = Path(__file__).parent / "workers" / "guard.py"
_LINES: Final = 15
"""Lines of the log that are an engine's last words."""
_BYTES: Final = 8192
"""Bytes at the end of the log in which they are looked for."""
_INTERVAL: Final = 0.05
"""Seconds between two looks at an engine that starts."""
_GUARDS_OWN: Final = 5.0
"""Seconds that a guard has beside those that it grants its engine."""
_SEEN_LATE: Final = 0.5
"""Seconds after which a guard has noticed the end of its engine at the latest."""


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EngineProcess:
    """A program of an engine at work, in a session of its own. A context manager, which stops it.

    Args:
        name: of the engine, for messages.
        command: program and arguments.
        log: file to which what the program prints is appended; a temporary one if None.
        piped: give the program our `stdin` and `stdout` to talk through; otherwise it has no input, and both its
            outputs go to the log.
        environment: variables beside those of this process.
        patience: seconds that the program has for its end when it is stopped; then it is killed.

    Raises:
        EngineError: the log cannot be written. That the program cannot be run is seen in the first `check`.

    Attributes:
        stdin: text to the program, if piped.
        stdout: text from the program, if piped.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path | None = None,
        piped: bool = False,
        environment: Mapping[str, str] | None = None,
        patience: float = 5.0,
    ) -> None:
        self.name = name
        try:
            opened = tempfile.TemporaryFile() if log is None else log.open("ab+")  # noqa: SIM115  # closed by `stop`
        except OSError as error:
            raise EngineError(f"the log of {name} cannot be written: {log}: {error.strerror}") from error
        self._log: IO[bytes] = opened
        self._begin = os.fstat(self._log.fileno()).st_size
        arguments = [str(part) for part in command]
        if os.name == "posix":
            arguments = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(patience), *arguments]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=pipe if piped else null,
                stdout=pipe if piped else self._log,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                encoding="utf-8",
                # Ctrl-C in a terminal is for us, who then stop the engine.
                start_new_session=True,
            )
        except OSError as error:  # on systems without a guard, the engine's own
            self._log.close()
            raise EngineError(f"{arguments[0]} cannot be run: {error.strerror}") from error
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self._stop = weakref.finalize(self, _stop, self._process, self._log, patience, os.getpid())

    @property
    def running(self) -> bool:
        """False once the program has ended or was stopped."""
        return self._process.poll() is None

    @property
    def guard_pid(self) -> int:
        """Process id of the guard."""
        return self._process.pid

    def check(self) -> None:
        """Raise EngineError with the program's last words if it has ended."""
        if not self.running:
            raise self.error(f"{self.name} {_ending(self._process.returncode)}")

    def check_soon(self) -> None:
        """Do `check` when the program has just failed to answer, and may be about to end."""
        deadline = time.monotonic() + _SEEN_LATE
        while self.running and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        self.check()

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until the program is ready; if it does not get so, it is stopped.

        Args:
            ready: asked again and again; shall not wait long.
            seconds: at most.

        Raises:
            EngineError: the program has ended, or was not ready in time; the message has its last words.
        """
        deadline = time.monotonic() + seconds
        try:
            while not ready():
                self.check()
                if time.monotonic() > deadline:
                    raise self.error(
                        f"{self.name} was not ready within {seconds:g} seconds; "
                        "give it longer (seconds_to_start of EngineOptions), or a smaller model"
                    )
                time.sleep(_INTERVAL)
        except BaseException:
            self.stop()
            raise

    def last_words(self) -> str:
        """Return the last lines that the program printed, with their line ends; empty if there are none."""
        if self._log.closed:
            return ""
        end = os.fstat(self._log.fileno()).st_size
        begin = max(self._begin, end - _BYTES)
        self._log.seek(begin)
        lines = self._log.read(end - begin).decode("utf-8", "replace").splitlines()
        return "\n".join([line.rstrip() for line in lines if line.strip()][-_LINES:])

    def error(self, message: str) -> EngineError:
        """Return an error with a message and the program's last words."""
        words = self.last_words()
        return EngineError(f"{message}. Its last words:\n{words}" if words else f"{message}. It has printed nothing")

    def stop(self) -> None:
        """Terminate the program and what it has started, and kill what does not end; twice does nothing."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def _stop(process: subprocess.Popen[str], log: IO[bytes], patience: float, owner: int) -> None:
    """Stop a guard, and through it the engine; in a fork of the process that owns it, nothing is done."""
    if os.getpid() != owner:
        return
    process.terminate()
    try:
        process.wait(patience + _GUARDS_OWN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # unsent input of a program that has ended
                stream.close()


def _ending(code: int) -> str:
    """Words for an exit code of a guard."""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "was stopped"
    if code == 128 + getattr(signal, "SIGKILL", 9):
        return "was killed, which systems do when memory runs out"
    with contextlib.suppress(ValueError):
        return f"crashed with {signal.Signals(code - 128).name} (a damaged model file can do that)"
    return f"has ended with exit code {code}"
