"""Engines that live in a Python interpreter of their own and are talked to through a pipe.

The interpreter runs `workers/loop.py` with a worker of ours, so that an engine that needs other versions than specgym
lives beside it. Free of torch.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from ..errors import ArgumentError, number, seed_number, whole_number
from .engine import Engine, EngineError, EngineOptions, EngineText, Served
from .process import EngineProcess

_LOOP: Final = Path(__file__).parent / "workers" / "loop.py"


class PipeWorker:
    """A worker in a process of its own, which answers a request at a time.

    Args:
        name: of the engine, for messages.
        module: name of the worker's module, a file beside `workers/loop.py`.
        options: interpreter and log.
        package: pip's name of the engine, for the message where it is not installed.
    """

    def __init__(self, name: str, module: str, options: EngineOptions, package: str) -> None:
        self.name = name
        self._python = str(options.python or sys.executable)
        self._package = package
        self._process = EngineProcess(name, [self._python, _LOOP, module], options.log, piped=True)
        self._sent = 0
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A thread, as no pipe can be waited for with a time limit on every system; it ends with the process.
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()

    def ask(self, do: str, seconds: float | None = None, **arguments: Any) -> Any:
        """Return the answer to a request.

        Args:
            do: name of the worker's method.
            seconds: that the answer may take; a worker that takes longer is stopped. None for any time.
            arguments: of the method, such as JSON takes.

        Raises:
            EngineError: the engine has died, has failed, is not installed or takes too long.
            ArgumentError: the worker refuses what it is asked for.
        """
        self._sent += 1
        request = json.dumps({"id": self._sent, "do": do, "with": arguments})
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # of a process that has ended, which is seen below
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        while (reply := self._reply(seconds))["id"] != self._sent:
            pass  # to a request whose caller was interrupted
        if "error" in reply:
            raise EngineError(self._explained(reply["error"]))
        answer = reply["answer"]
        if isinstance(answer, dict) and "refused" in answer:
            raise ArgumentError(f"{self.name}: {answer['refused']}")
        return answer

    def _reply(self, seconds: float | None) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            error = self._process.error(f"{self.name} has not answered within {seconds:g} seconds")
            self.stop()
            raise error from None
        if line is None:
            self._replies.put(None)  # for whoever asks again
            self._process.check_soon()
            raise self._process.error(f"{self.name} answers no more")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _explained(self, error: str) -> str:
        if error.startswith("cannot be imported"):
            return (
                f"{self.name} {error}. Install it there, `{self._python} -m pip install {self._package}`, or name an "
                "interpreter that has it (--engine-python; python of EngineOptions)"
            )
        return f"{self.name} failed. {error}"

    @property
    def running(self) -> bool:
        """False once the process has ended."""
        return self._process.running

    def stop(self) -> None:
        """Stop the process; twice does nothing."""
        self._process.stop()


def _read(lines: Iterable[str] | None, replies: queue.SimpleQueue[str | None]) -> None:
    """Put lines into a queue, and None at their end."""
    with contextlib.suppress(OSError, ValueError):  # the pipe is closed on our side
        for line in lines or ():
            replies.put(line)
    replies.put(None)


class PipeEngine(Engine):
    """An engine whose models are loaded once, in a worker, which decodes with every setting.

    Args and errors as for `Engine`; also:

    Raises:
        ArgumentError: an address or a program is set, which such an engine has not.

    Attributes:
        module: name of its worker's module.
        installed_as: pip's name of its package.
    """

    module: ClassVar[str]
    installed_as: ClassVar[str]

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        super().__init__(target, draft, options)
        for option in ("address", "program"):
            if getattr(self.options, option) is not None:
                raise ArgumentError(
                    f"{self.name} is a Python package and has no {option}; name the interpreter that it is installed "
                    "for (--engine-python; python of EngineOptions), or leave both out"
                )
        self._worker: PipeWorker | None = None
        self._version = ""

    @abstractmethod
    def models(self) -> Mapping[str, Any]:
        """Return the arguments of the worker's `load`."""

    @property
    def worker(self) -> PipeWorker:
        """The worker with the models, started when it is first needed, and anew if it has died.

        Raises:
            EngineError: it does not start.
        """
        if self._worker is not None and not self._worker.running:
            self.close()
        if self._worker is None:
            models = self.models()
            worker = PipeWorker(self.name, self.module, self.options, self.installed_as)
            try:
                self._version = worker.ask("load", self.options.seconds_to_start, **models)["version"]
            except BaseException:
                worker.stop()
                raise
            self._worker = worker
        return self._worker

    def version(self) -> str:
        """Return the version of the package, which is read from the worker."""
        self.worker  # noqa: B018  # it brings the version
        return self._version

    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        """Let the worker decode with a setting. Nothing restarts; what was served before stays usable.

        Args, errors as for `Engine.serve`.
        """
        settings = None if knobs is None else self.resolve_knobs(knobs)
        if settings is not None and not settings[self.length_knob]:
            settings = None
        return PipeServed(self, self.worker_settings(settings))

    def worker_settings(self, knobs: Mapping[str, float] | None) -> dict[str, Any] | None:
        """Return a setting as the worker takes it: whole numbers as such; None for plain decoding."""
        if knobs is None:
            return None
        return {knob.name: int(knobs[knob.name]) if knob.integer else knobs[knob.name] for knob in self.knobs}

    def close(self) -> None:
        """Stop the worker; what is served afterwards starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()


class PipeServed(Served):
    """A worker at work with one setting.

    Args:
        engine: whose worker it is.
        settings: as the worker takes them; None for plain decoding.
    """

    def __init__(self, engine: PipeEngine, settings: Mapping[str, Any] | None) -> None:
        self._worker = engine.worker
        self._settings = settings

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> EngineText:
        """Generate the continuation of a prompt; arguments and errors as for `Served.generate`."""
        answer = self._worker.ask(
            "generate",
            prompt=prompt if isinstance(prompt, str) else [int(token) for token in prompt],
            settings=self._settings,
            max_new_tokens=whole_number("max_new_tokens", max_new_tokens),
            temperature=number("temperature", temperature, at_least=0),
            seed=seed_number("seed", seed),
        )
        return EngineText(**answer)

    def chat_prompt(self, message: str) -> str | Sequence[int]:
        """Return a user's message as token ids, in the target's chat template if it has one."""
        tokens: Sequence[int] | None = self._worker.ask("chat_prompt", message=message)
        return message if tokens is None else tokens
