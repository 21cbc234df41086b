"""The loop of a worker: reads requests from its input, has a module beside this file answer them, and replies.

``python loop.py MODULE`` runs in the interpreter that an engine is installed for, where specgym need not be. Requests
and replies are JSON, a line each: ``{"id": 3, "do": "generate", "with": {...}}`` is answered by what the method
``generate`` of the module's ``Worker`` returns, as ``{"id": 3, "answer": ...}``, or by ``{"id": 3, "error": "..."}``.
An answer ``{"refused": "..."}`` says what is wrong with the request. Whatever an engine prints goes to the log, and so
do tracebacks.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import IO, Any


def main(module: str) -> int:
    """Answer requests until the input ends.

    Args:
        module: name of a module beside this file.

    Returns:
        The exit code.
    """
    # Engines print to the output from Python and from below it, so that it must be another one on both levels.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker, missing = _worker(module)
    for line in sys.stdin:
        request = json.loads(line)
        reply = _answer(worker, request["do"], request["with"]) if worker else {"error": missing}
        _write(replies, {"id": request["id"], **reply})
    return 0


def _worker(module: str) -> tuple[Any, str]:
    """The worker of a module, or None and the reason why there is none."""
    try:
        return importlib.import_module(module).Worker(), ""
    except ImportError as error:
        traceback.print_exc()
        return None, f"cannot be imported by {sys.executable} (Python {sys.version.split()[0]}): {error}"


def _answer(worker: Any, do: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request; an exception becomes an error, and the worker goes on."""
    try:
        return {"answer": getattr(worker, do)(**arguments)}
    except Exception as error:
        traceback.print_exc()
        root = error
        while isinstance(root.__cause__, Exception):  # libraries wrap what would help in what does not
            root = root.__cause__
        return {"error": _words(error) if root is error else f"{_words(error)} ({_words(root)})"}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def _write(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
