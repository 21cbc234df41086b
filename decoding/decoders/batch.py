"""Several texts being generated at the same time, each as if it were alone, in joint passes of the models.

Any decoder works in a batch: every text has a session of its own, and where several wait for the same model they are
read in one pass (`models/joint`). Texts come and go while others are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..decoder import Decoder, Session
from ..errors import TORCH_SEEDS, ArgumentError, BatchError, KnobError, PromptError, whole_number
from ..models.joint.joining import Joining, Text
from ..rounds import Generation, Round
from ..sampling import GREEDY, Sampling
from .knob_rules import KnobRule

AnySession = TypeVar("AnySession", bound=Session[Any])
Result = TypeVar("Result")


class Batch:
    """Texts that are generated together.

    They may be of several decoders and pairs: what is read by one model at the same time is read in one pass. EAGLE
    heads and models that keep more of a text than keys and values (recurrent layers, early exits and their targets)
    read their texts one after another; the texts are the same.

    Args:
        texts: about so many at a time, for which storage is made at once; more find room, too.

    Attributes:
        sessions: of the texts that are not finished, in the order in which they came.
    """

    def __init__(self, texts: int = 1) -> None:
        self.sessions: list[Session[Any]] = []
        self._joining = Joining(whole_number("texts", texts))
        self._texts: dict[Session[Any], Text] = {}

    def __len__(self) -> int:
        return len(self.sessions)

    def __contains__(self, session: object) -> bool:
        return session in self._texts

    def add(
        self,
        decoder: Decoder[AnySession],
        prompt_ids: str | Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
    ) -> AnySession:
        """Begin a text, which takes part from the next `step` on. Arguments and errors as for `Decoder.start`.

        The prompt is read at once, by itself.

        Returns:
            The text's session, to be looked at. Its own `step` goes on with this text alone.
        """
        text = Text(self._joining)
        with text.at_work():
            session = decoder.start(
                prompt_ids,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                logits_processor=logits_processor,
            )
        self._take(session, text)
        return session

    def begin(self, requests: Sequence[TextRequest]) -> list[Session[Any] | Exception]:
        """Begin several texts. What an encoder has to read for them it reads in one pass; prompts are read one by one.

        Returns:
            The session of every text as from `add`, or what kept it from beginning.
        """
        texts = [Text(self._joining) for _ in requests]
        tasks = [(text, request.start) for text, request in zip(texts, requests, strict=True)]
        results = self._joining.together(tasks, beginning=True) if tasks else []
        for text, result in zip(texts, results, strict=True):
            if isinstance(result, Exception):
                text.leave(broken=True)
            else:
                self._take(result, text)
        return results

    def _take(self, session: Session[Any], text: Text) -> None:
        self.sessions.append(session)
        self._texts[session] = text

    def step(
        self,
        knobs: Mapping[str, float] | KnobRule | Mapping[Session[Any], Mapping[str, float] | KnobRule] | None = None,
    ) -> dict[Session[Any], Round]:
        """Do one round of every text, each of which emits at least a token; those that are finished leave the batch.

        Args:
            knobs: values for this round, by name, or a rule that chooses them, for all texts; or by session.

        Returns:
            The round of every text, by its session. Seconds are those of the whole batch, for which every text waits.

        Raises:
            KnobError: as `Session.step`, before anything is done; or a session that is not in the batch.
            NumericalError: the target of a text gave NaN; the text has left the batch, and the others have done their
                round. `attempt` returns theirs in that case.
        """
        settings = self._settings(knobs)
        return self.together({session: partial(session.step, settings[session]) for session in self.sessions})

    def together(self, works: Mapping[AnySession, Callable[[], Result]]) -> dict[AnySession, Result]:
        """Let texts do a piece of work each, and read in one pass what several of them read with the same model.

        For controllers outside: one text drafts (`SpeculativeSession.draft_one`) while another verifies. Those that are
        finished then leave the batch.

        Args:
            works: by session, what its text does, with that session alone. The other texts do nothing.

        Returns:
            What each work returned, by session.

        Raises:
            ArgumentError: a session is not in the batch, before anything is done.
            Exception: the first that a work raised. Its text has left the batch; the others have done their work.
        """
        results = self.attempt(works)
        done: dict[AnySession, Result] = {}
        for session, result in results.items():
            if isinstance(result, Exception):
                raise result
            done[session] = result
        return done

    def attempt(self, works: Mapping[AnySession, Callable[[], Result]]) -> dict[AnySession, Result | Exception]:
        """Let texts do a piece of work each, as `together`, and return what a work raised in the place of its result.

        Raises:
            ArgumentError: as for `together`.
        """
        if not all(session in self._texts for session in works):
            raise ArgumentError("work is given for sessions that are not in this batch: finished, or of another one")
        tasks = [(self._texts[session], work) for session, work in works.items()]
        results = dict(zip(works, self._joining.together(tasks) if tasks else [], strict=True))
        for session, result in results.items():
            if isinstance(result, Exception):
                self.leave(session, broken=True)
            elif session.finished:
                self.leave(session)
        return results

    @torch.inference_mode()
    def leave(self, session: Session[Any], *, broken: bool = False) -> None:
        """Take a text out, finished or not; it cannot go on, as its `step` says. One that has left already is no error.

        Args:
            session: the text's.
            broken: whether its models may have given what is not finite.
        """
        if session in self._texts:
            self._texts.pop(session).leave(broken)
            session.whole_rounds.end("this text has left its batch, and others have the place of what it had read")
            self.sessions.remove(session)

    def _settings(self, knobs: Any) -> dict[Session[Any], Mapping[str, float] | KnobRule]:
        by_session = isinstance(knobs, Mapping) and any(isinstance(key, Session) for key in knobs)
        settings = {}
        for session in self.sessions:
            settings[session] = session.decoder.checked_knobs(knobs.get(session) if by_session else knobs)
        if by_session and not set(knobs) <= set(settings):
            raise KnobError("knobs are given for sessions that are not in this batch: finished, or of another one")
        return settings


@dataclass(frozen=True)
class TextRequest:
    """A text to be generated in a batch. The fields are the arguments of `Decoder.generate`, and the decoder."""

    decoder: Decoder[Any]
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    knobs: Mapping[str, float] | KnobRule | None = None
    logits_processor: Sequence[LogitsProcessor] = ()

    def start(self) -> Session[Any]:
        """Read the prompt; errors as for `Decoder.start`."""
        return self.decoder.start(
            self.prompt_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seed=self.seed,
            logits_processor=self.logits_processor,
        )


def generate_texts(requests: Sequence[TextRequest], batch_size: int | None = None) -> list[Generation]:
    """Generate texts of any decoders together, in the order of the requests.

    Args:
        requests: a text each.
        batch_size: texts at the same time, at most; the next begins when one ends. By default all.

    Raises:
        SpecgymError: as `Decoder.start` and `Session.step` before anything is generated.
        BatchError: a text has failed later; the others were finished and are handed over by the error.
    """
    places = len(requests) if batch_size is None else whole_number("batch_size", batch_size)
    knobs = [request.decoder.checked_knobs(request.knobs) for request in requests]
    batch, begun = Batch(max(1, min(places, len(requests)))), 0
    texts: dict[Session[Any], tuple[int, list[Round]]] = {}
    errors: dict[int, Exception] = {}
    while len(batch) or begun < len(requests):
        beginning = requests[begun : begun + places - len(batch)]
        for number, session in enumerate(batch.begin(beginning), begun):
            if not isinstance(session, Exception):
                texts[session] = number, []
            elif begun:
                errors[number] = session
            else:
                raise session
        begun += len(beginning)
        works = {session: partial(session.step, knobs[texts[session][0]]) for session in batch.sessions}
        for session, round_ in batch.attempt(works).items():
            number, rounds = texts[session]
            if isinstance(round_, Exception):
                errors[number] = round_
            else:
                rounds.append(round_)
    generations: list[Generation | None] = [None] * len(requests)
    for session, (number, rounds) in texts.items():
        if number not in errors:
            generations[number] = session.generation(rounds)
    if errors:
        raise BatchError(generations, errors) from errors[min(errors)]
    return [generation for generation in generations if generation is not None]


def generate_batch(
    decoder: Decoder[Any],
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    seed: int | None,
    knobs: Mapping[str, float] | KnobRule | Sequence[Mapping[str, float] | KnobRule] | None,
    batch_size: int | None,
    **settings: Any,
) -> list[Generation]:
    """Generate from several prompts. Arguments, result and errors as for `Decoder.generate_batch`."""
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts are a list with a prompt each, not a {type(prompts).__name__}. A tokenizer's padded tensor does "
            "not say what is padding: take the lists that tokenizer(texts)['input_ids'] gives without return_tensors"
        )
    # Before anything is read, so that a bad prompt among many costs no work.
    checked = [decoder.check_prompt(prompt) for prompt in prompts]
    shared = knobs is None or isinstance(knobs, Mapping | KnobRule)
    several: list[Any] = [knobs] * len(checked) if shared else [*cast(Sequence[Any], knobs)]
    if len(several) != len(checked):
        raise ArgumentError(f"{len(checked)} prompts have {len(several)} settings of knobs; give one each, or one")
    if seed is not None:
        seed = whole_number("seed", seed, at_least=TORCH_SEEDS[0], at_most=TORCH_SEEDS[1] - len(checked))
    requests = [
        TextRequest(
            decoder,
            prompt,
            seed=None if seed is None else seed + number,
            knobs=decoder.checked_knobs(values),
            **settings,
        )
        for number, (prompt, values) in enumerate(zip(checked, several, strict=True))
    ]
    return generate_texts(requests, batch_size)
