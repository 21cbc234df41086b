"""Python processes that have imported the large libraries already: forked from a server, since imports take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600
"""Seconds for a command on a busy machine."""

_SERVER = """
import gc, json, os, runpy, signal, sys
import matplotlib.pyplot, peft, stable_baselines3, torch.utils.tensorboard, transformers
import transformers.models.llama.modeling_llama

assert "specgym" not in sys.modules
gc.freeze()  # or the collector of every child would copy their pages


def run(job):
    signal.alarm(job["timeout"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(job["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first, *words = job["arguments"]
    if first == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(words[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *words]
        runpy.run_path(first, run_name="__main__")


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))  # an exception ends this process as it would end any
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """Result of a process."""

    returncode: int
    """Exit code, or a signal's negative number."""
    output: str
    """Text of both standard output and standard error."""


class WarmPython:
    """A server that runs commands, each in a process of its own with our package still to be imported.

    It is started with the first command, without network for model hubs.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, *arguments: object, environment: Mapping[str, str], folder: Path = ROOT) -> Ended:
        """Run `python` with these arguments (a script, ``-m`` or ``-c``, and its own) to its end, or for ten minutes.

        Args:
            environment: variables of the process.
            folder: where it runs.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.NamedTemporaryFile() as output:
            job = {
                "arguments": [str(word) for word in arguments],
                "environment": dict(environment),
                "folder": str(folder),
                "output": output.name,
                "timeout": TIMEOUT,
            }
            print(json.dumps(job), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            assert answer, "the server has died"
            return Ended(int(answer), output.read().decode())

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.communicate()
