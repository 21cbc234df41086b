"""A draft at work in a process or a thread of its own, while the target verifies.

Whoever decodes asks for tokens, reads a pass with the target meanwhile, and takes the tokens one by one. To ask anew
ends what was asked before, so that a bet that was lost is dropped at the draft's next token.

Tokens travel through a pipe, which holds few bytes, and the rows that they were drawn from through shared memory.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...drafts.drafter import DraftSession, DraftStep, ModelDrafter
from ...errors import SpecgymError
from ...loading.pair import Pair
from ...models.joint.joining import AT_WORK
from ...processors import TextRules
from ...sampling import Sampling
from ..stop_rules import DraftTracker, StopRule
from .traits import Place

PATIENCE = 60.0
"""Seconds without an answer after which a draft counts as lost."""
_SEEDS = 2**63
_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two requests (2^64 over the golden ratio, which spreads them)."""


class DraftFailedError(SpecgymError, RuntimeError):
    """An error of the draft, in the process or thread where it works."""


class DraftLost(Exception):
    """The end of a draft's process, or its silence."""


@dataclass(frozen=True)
class DraftedText:
    """A text as its draft has to know it; picklable.

    Attributes:
        prompt: token ids.
        max_new_tokens: of the text.
        sampling: as the target's generation config has it.
        processors: of whoever decodes, besides those of the generation config.
        seed: of the text.
        cost_ratio: what a rule is told of a drafted token's costs.
        batch_size: what it is told of that.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    processors: Sequence[LogitsProcessor]
    seed: int
    cost_ratio: float
    batch_size: int


class Verified(NamedTuple):
    """Result of a draft, for a rule that learns: tokens drafted, accepted and emitted, and the round's seconds."""

    drafted: int
    accepted: int
    emitted: int
    seconds: float


class _Begin(NamedTuple):
    number: int
    text: DraftedText


class _Request(NamedTuple):
    number: int
    kept: int
    """Tokens of the text as the draft has it that stay."""
    tokens: Sequence[int]
    """That follow these."""
    most: int
    verified: Sequence[Verified]


class Drafted(NamedTuple):
    """A token that was drafted.

    Attributes:
        token: its number.
        row: probabilities that it was drawn from, or scores when greedy, shape (1, vocabulary), a copy; None where they
            were not asked for.
        time: `time.perf_counter` when it was there.
    """

    token: int
    row: Tensor | None
    time: float


class DraftWorker:
    """A process or thread that drafts for one text at a time.

    Args:
        pair: whose draft, a model.
        longest: tokens of a draft, at most.
        rows: whether those that tokens are drawn from are to be kept, when greedy, too.
        place: `process`, which is forked, or `thread`.
        cores: that it is bound to; none leaves that to the system.
        stop: rule that may end drafts earlier.
    """

    def __init__(
        self, pair: Pair, longest: int, *, rows: bool, place: Place, cores: Sequence[int] = (), stop: StopRule | None
    ) -> None:
        drafter = pair.draft
        assert isinstance(drafter, ModelDrafter)
        ours, theirs = multiprocessing.Pipe()
        shape = (longest, pair.target.vocabulary_size)
        self._connection, self._asked, self._begun, self._closed = ours, 0, 0, False
        self._process: Any = None
        if place == "process":
            self._rows = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 4 * shape[0] * shape[1]), np.float32))
            self._rows = self._rows.view(shape)
            loop = _Loop(theirs, pair, drafter, self._rows, rows, cores, stop)
            self._process = multiprocessing.get_context("fork").Process(
                target=_in_process, args=(loop, ours), daemon=True, name=f"draft of {pair.name}"
            )
            self._process.start()
            theirs.close()  # so that the end of the process shows
        else:
            self._rows = torch.empty(shape, device=drafter.model.device)
            loop = _Loop(theirs, pair, drafter, self._rows, rows, cores, stop)
            threading.Thread(target=loop.run, daemon=True, name=f"draft of {pair.name}").start()
        self._end = weakref.finalize(self, _end, ours, self._process)

    def begin(self, text: DraftedText) -> None:
        """Begin a text; an earlier one is forgotten. Raises DraftLost."""
        self._asked += 1  # what was asked of the earlier text is not taken for an answer
        self._begun = self._asked  # errors from before are the earlier text's, too
        self._send(_Begin(self._begun, text))

    def ask(self, kept: int, tokens: Sequence[int], count: int, verified: Sequence[Verified] = ()) -> None:
        """Ask for more tokens, in place of those that were asked for before. Raises DraftLost.

        Args:
            kept: tokens of the text as the draft has it that stay, those that it drafted included.
            tokens: that follow these.
            count: of tokens to draft, at most.
            verified: rounds since the last request, if a rule is to know.
        """
        self._asked += 1
        self._send(_Request(self._asked, kept, tokens, count, verified))

    def take(self) -> Drafted | None:
        """Wait for the next token of those asked for; None where the draft has ended.

        Raises:
            DraftLost: the process has ended, or does not answer.
            DraftFailedError: the draft raised an error.
        """
        while True:
            try:
                if not self._connection.poll(PATIENCE):
                    raise EOFError
                number, place, token, seconds = self._connection.recv()
            except (OSError, EOFError):
                self._lose()
            if isinstance(token, Exception) and number >= self._begun:
                raise DraftFailedError(f"the draft failed: {type(token).__name__}: {token}") from token
            if number == self._asked:
                break
        if token is None:
            return None
        return Drafted(token, None if place is None else self._rows[place : place + 1].clone(), seconds)

    @property
    def alive(self) -> bool:
        """True while there is somebody to ask."""
        return not self._closed and (self._process is None or self._process.is_alive())

    def close(self) -> None:
        """End the process or thread."""
        self._closed = True
        self._end()

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except (OSError, EOFError):
            self._lose()

    def _lose(self) -> NoReturn:
        self.close()
        raise DraftLost


def _end(connection: Connection, process: Any) -> None:
    connection.close()
    if process is not None and process.is_alive():
        process.kill()  # at once, also one that is stopped: it has nothing to put in order
        process.join(1)  # else it stays as a zombie, with its pipes, until somebody asks for it


def can_fork(pair: Pair) -> bool:
    """Return whether the draft of a pair can work in a forked process: on Linux and a CPU, of a process that may fork.

    macOS has libraries that do not bear forking (Python 3.11, `multiprocessing`, "Contexts and start methods").
    """
    on_cpu = isinstance(pair.draft, ModelDrafter) and pair.draft.model.device.type == "cpu"
    return on_cpu and sys.platform == "linux" and not multiprocessing.current_process().daemon


def _in_process(loop: _Loop, theirs: Connection) -> None:
    theirs.close()  # or the draft would not notice the end of whoever asks
    AT_WORK.set(None)  # of a batch from within which it was forked
    loop.run()


class _Loop:
    """Work of the process or thread. Arguments as for `DraftWorker`, and its end of the pipe."""

    def __init__(
        self,
        connection: Connection,
        pair: Pair,
        drafter: ModelDrafter,
        rows: Tensor,
        with_rows: bool,
        cores: Sequence[int],
        stop: StopRule | None,
    ) -> None:
        self._connection, self._pair, self._drafter = connection, pair, drafter
        self._rows, self._with_rows, self._cores, self._stop = rows, with_rows, cores, stop

    @torch.inference_mode()
    def run(self) -> None:
        """Answer until whoever asks has gone."""
        if self._cores:
            os.sched_setaffinity(0, self._cores)  # of this thread alone, on Linux
        following: Any = None
        text: _Text | None = None
        try:
            while True:
                message, following = self._connection.recv() if following is None else following, None
                try:
                    if isinstance(message, _Begin):
                        text = None  # of which nothing more is asked, whether or not this one can be begun
                        text = _Text(self._pair, self._drafter, message.text, self._stop)
                    elif text is not None:  # otherwise it could not be begun, which was told
                        following = self._draft(text, message)
                except (OSError, EOFError):
                    raise
                except Exception as error:
                    failure = SpecgymError(f"{type(error).__name__}: {error}")
                    self._connection.send((message.number, None, failure, 0.0))
        except (OSError, EOFError, KeyboardInterrupt):  # nobody asks any more
            self._connection.close()

    def _draft(self, text: _Text, request: _Request) -> Any:
        """Send tokens until there are enough, or there is another message, which is returned."""
        keeps = self._with_rows or not text.sampling.greedy
        for place, step in enumerate(text.steps(request)):
            if keeps:
                row = step.logits if step.probabilities is None else step.probabilities
                assert row is not None  # of a model
                self._rows[place : place + 1].copy_(row)
            token = int(step.token)  # waits for the device
            text.context.append(token)
            self._connection.send((request.number, place if keeps else None, token, time.perf_counter()))
            if self._connection.poll():
                return self._connection.recv()
        self._connection.send((request.number, None, None, time.perf_counter()))
        return None


class _Text:
    """A text at the draft's side.

    Args:
        pair: of the worker.
        drafter: likewise.
        text: what is known of it.
        stop: rule that may end drafts.
    """

    def __init__(self, pair: Pair, drafter: ModelDrafter, text: DraftedText, stop: StopRule | None) -> None:
        self.context, self.sampling, self._seed, self._requests = list(text.prompt), text.sampling, text.seed, 0
        device = drafter.model.device
        self._generator = torch.Generator(device)
        drafting: Any = drafter
        if device == pair.target.device:  # elsewhere the draft does not follow the rules, see `TextRules.draft`
            rules = TextRules.of(pair, text.prompt, text.max_new_tokens, text.sampling, text.processors)
            drafting = rules.drafter(drafter, pair.target)
        self._draft: DraftSession = drafting.start(text.prompt, text.sampling, self._generator, device)
        self._stop = stop
        self._tracker = DraftTracker(1, text.cost_ratio, text.batch_size, text.sampling.temperature)

    def steps(self, request: _Request) -> Iterator[DraftStep]:
        """Yield the tokens of a request; `context` grows by them outside."""
        # Each request has random numbers of its own: where the last one was interrupted depends on the clock.
        self._requests += 1
        self._generator.manual_seed((self._seed + _STRIDE * self._requests) % _SEEDS)
        del self.context[request.kept :]
        self._draft.truncate(request.kept)
        self.context += request.tokens
        for verified in request.verified:
            self._learn(verified)
        # Each request is a draft of its own: whether its rule was asked about the last token of the one before depends
        # on the clock.
        self._tracker.begin_draft()
        for step in self._draft.steps(list(self.context), request.most):
            yield step
            if self._stop is not None and self._stops(self._stop, step):
                return

    def _stops(self, stop: StopRule, step: DraftStep) -> bool:
        entropy, drawn = (step.entropy(), step.drawn_probability()) if stop.looks_at_entropy else (0.0, 1.0)
        self._tracker.drafted(step.confidence(), entropy, step.matched, drawn)
        return bool(stop(self._tracker.features)[0])

    def _learn(self, verified: Verified) -> None:
        self._tracker.verified(verified.drafted, verified.accepted, verified.emitted)
        if self._stop is not None:
            drafted, _, emitted, seconds = (np.array([value]) for value in verified)
            self._stop.verified(None, drafted, emitted, seconds)
