"""Texts that are decoded at the same time, and wait for one another so that their passes can be joined.

Every text runs as if it were alone, in a greenlet (a coroutine that can be left in the middle of any call). Where it
reads tokens with a model it is left, the next text runs on, and when all wait, those that wait for the same model are
read in one pass. So a decoder need not know of batches, and a text drafts, accepts and ends on its own.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import PreTrainedModel

from ..kv_cache import TokenTree
from .cache import Slot
from .passes import Answer, Begun, JoinedPasses, Reader, Request, Source, try_to_join

if TYPE_CHECKING:  # which imports this module
    from ..language_model import LanguageModel

Result = TypeVar("Result")
_Tried = tuple[torch.device, torch.dtype, Sequence[Tensor] | None]
_tried: WeakKeyDictionary[PreTrainedModel, _Tried] = WeakKeyDictionary()
"""Devices and types of the models that were tried, and what `try_to_join` returned."""


class Joining:
    """Scheduler of several texts, which joins their passes, model by model.

    Args:
        texts: about so many at a time, for which storage is made at once; more find room, too.

    Attributes:
        beginning: whether the texts under way have just begun: what encoders read is joined, prompts are not.
    """

    def __init__(self, texts: int = 1) -> None:
        self._texts = texts
        self._passes: dict[PreTrainedModel, JoinedPasses | None] = {}
        self._hub: Any = None
        self._waiting: list[tuple[greenlet, Reader, Any]] = []
        self.beginning = False

    def passes_of(self, model: LanguageModel) -> JoinedPasses | None:
        """Return the joined passes of a model, shared by all its texts; None if it has to read each by itself."""
        if model.model not in self._passes:
            *state, shapes = _tried.get(model.model, (None,) * 3)
            if state != [model.device, model.dtype]:
                token = AT_WORK.set(None)
                try:
                    shapes = try_to_join(model)
                finally:
                    AT_WORK.reset(token)
                _tried[model.model] = model.device, model.dtype, shapes
            self._passes[model.model] = None if shapes is None else model.joint_passes(model, self._texts, shapes)
        return self._passes[model.model]

    @property
    def under_way(self) -> bool:
        """True while texts run that can wait for one another."""
        return self._hub is not None

    def wait(self, reader: Reader, request: Any) -> Any:
        """Let the other texts run until the reader has answered; None if no other waits for the same reader."""
        self._waiting.append((getcurrent(), reader, request))
        result: object = self._hub.switch()
        if isinstance(result, Exception):
            raise result
        return result

    @torch.inference_mode()
    def together(
        self, works: Sequence[tuple[Text, Callable[[], Result]]], beginning: bool = False
    ) -> list[Result | Exception]:
        """Let texts do a piece of work each, joining what they read.

        Args:
            works: of every text, what it does.
            beginning: whether that is to begin.

        Returns:
            What each returned or raised.
        """
        if len(works) == 1:
            return [_result_of(works[0])]
        self._hub, self.beginning, results = getcurrent(), beginning, dict[greenlet, Any]()
        tasks = [greenlet(_result_of) for _ in works]
        ready: list[tuple[greenlet, Any]] = list(zip(tasks, works, strict=True))
        try:
            while ready:
                for task, value in ready:
                    returned = task.switch(value)
                    if task.dead:
                        results[task] = returned
                ready = self._read()
        finally:
            self._hub, self.beginning = None, False
            self._waiting.clear()
        return [results[task] for task in tasks]

    def _read(self) -> list[tuple[greenlet, Any]]:
        """Read what texts wait for with one model, the smallest, so that all come to wait for the largest."""
        if not self._waiting:
            return []
        reader = min((reader for _, reader, _ in self._waiting), key=lambda reader: reader.size)
        served = [(task, request) for task, its, request in self._waiting if its is reader]
        self._waiting = [waiting for waiting in self._waiting if waiting[1] is not reader]
        tasks, requests = zip(*served, strict=True)
        if len(requests) == 1:
            return [(tasks[0], None)]
        try:
            return list(zip(tasks, reader.read(requests), strict=True))
        except Exception as error:  # whoever waits has to know
            return [(task, error) for task in tasks]


def _result_of(work: tuple[Text, Callable[[], Result]]) -> Result | Exception:
    text, do = work
    try:
        with text.at_work():
            return do()
    except Exception as error:  # is raised again when the other texts have done theirs
        return error


class Text:
    """A text of a batch, with whatever models read it.

    Args:
        joining: of the batch.
    """

    def __init__(self, joining: Joining) -> None:
        self._joining = joining
        self._models: list[JoinedText] = []

    def joined(self, model: LanguageModel) -> JoinedText:
        """Return what reads the text by a model, which nobody else uses."""
        self._models.append(JoinedText(self._joining, model))
        return self._models[-1]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let models that begin to read within the block read this text."""
        token = AT_WORK.set(self)
        try:
            yield
        finally:
            AT_WORK.reset(token)

    def leave(self, broken: bool = False) -> None:
        """Give the places of the text to others; it cannot be read on.

        Args:
            broken: whether what was read may not be finite.
        """
        for model in self._models:
            model.leave(broken)
        self._models.clear()


class JoinedText:
    """A text as one model reads it, with others where it can.

    Args:
        joining: of the batch.
        model: with a cache of the text's own.

    Attributes:
        kept: what the model keeps of the last pass that others took part in (`LanguageModel.kept`), to be taken out.
    """

    def __init__(self, joining: Joining, model: LanguageModel) -> None:
        self._joining, self._model = joining, model
        self.kept: Tensor | None = None
        self._slot: Slot | None = None

    def read(
        self, tokens: Tensor, tree: TokenTree | None, start: int, last: int | None, rows: Tensor | None, hidden: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Read tokens, as `LanguageModel.forward`, from position `start` on; None if the text is to be read alone."""
        if not self._joining.under_way or self._joining.beginning:
            return None
        passes = self._joining.passes_of(self._model)
        if passes is None:
            return None
        if self._slot is None:
            self._slot = self._model.move_into(passes.cache)
        request = Request(self._slot, tokens, tree, start, last, rows, hidden)
        answer: Answer | None = self._joining.wait(passes, request)
        if answer is None:
            return None
        self.kept = answer.kept
        return answer.scores, answer.hidden

    def begin(self, source: Source) -> Begun | None:
        """Read what precedes the text with its encoder; None if that is to be done by the text alone."""
        passes = self._joining.passes_of(self._model) if self._joining.under_way else None
        if passes is None or passes.beginnings is None:
            return None
        begun: Begun | None = self._joining.wait(passes.beginnings, source)
        return begun

    def leave(self, broken: bool) -> None:
        """Give the text's place to others."""
        if self._slot is not None:
            self._slot.release(broken)
            self._slot = None


AT_WORK: contextvars.ContextVar[Text | None] = contextvars.ContextVar("AT_WORK", default=None)
"""Text of a batch that is at work: models that begin to read then are joined with those of the other texts."""
