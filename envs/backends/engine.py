"""Engine backends: engines that people serve with, measured by their own clocks.

A setting is never timed alone. Every prompt is decoded plainly and with the setting on the same engine, one right after
the other, and prompts take turns in which comes first, so that a drift of the machine's speed cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from specgym.decoding import (
    ArgumentError,
    Engine,
    EngineText,
    LatencyProfile,
    PromptSet,
    Round,
    Sampling,
    Served,
    Split,
    load_prompts,
    number,
    whole_number,
)

from ..workloads import Workload
from .backend import Floats, Integers, Metrics

WARM_UP: Final = "Once upon a time there was"
"""Prompt of the text that a started engine decodes before it is timed; it pays for what is set up once."""
WARM_UP_TOKENS: Final = 12


@dataclass(frozen=True)
class ComparedText:
    """A text that an engine decoded plainly and with a setting.

    Attributes:
        workload: place of its workload.
        prompt: its number among the prompts of the workload's split.
        plain: decoded plainly.
        drafted: decoded with the setting.
        equal: whether both have the same tokens, or the same text where the engine gives no tokens.
    """

    workload: int
    prompt: int
    plain: EngineText
    drafted: EngineText
    equal: bool


class EngineBackend:
    """Engine with a target and a draft, at work on sets of prompts. See `Backend`.

    A context manager, which stops what it has started.

    Args:
        engine: it stays the caller's to close.
        prompts: sets, as `load_prompts` takes them; each is a workload.
        split: of the prompts.
        max_new_tokens: tokens generated of each prompt, at most; at least 2, as the first is not timed.
        temperature: of sampling; 0 for greedy decoding.
        seed: of sampling.
        plain: a backend of the same engine and target with another draft or split, whose plain decoding this one uses
            too, so that the target is started once; it is closed after this one.

    Raises:
        ArgumentError: a number is out of range. Loading errors as for `load_prompts`.
    """

    decoder = None
    profiles: Sequence[LatencyProfile] = ()
    """None: time is the engine's own."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[str | PromptSet],
        split: Split = "train",
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        plain: EngineBackend | None = None,
    ) -> None:
        self.engine, self.knobs, self.split = engine, engine.knobs, split
        self._tokens = whole_number("max_new_tokens", max_new_tokens, at_least=2)
        self._temperature, self._seed = number("temperature", temperature, at_least=0), seed
        sets = [load_prompts(named) if isinstance(named, str) else named for named in prompts]
        if not sets:
            raise ArgumentError("name at least one set of prompts to decode")
        pair = "+".join([engine.name, *(Path(name).stem for name in (engine.target, engine.draft) if name)])
        sampling = Sampling(temperature=self._temperature)
        self.workloads = [Workload(pair, texts, sampling, split=split) for texts in sets]
        self.texts = [texts.split(split) for texts in sets]
        self.first_prompts: Integers = np.cumsum([0, *map(len, self.texts)])[:-1]
        self.prompts: Sequence[Integers] = [
            np.arange(len(texts)) + first for texts, first in zip(self.texts, self.first_prompts, strict=True)
        ]
        self._lender = plain
        self._plain: Served | None = None
        self._served: tuple[Mapping[str, float], Served] | None = None
        self._decoded: set[str] = set()
        self._chats = [texts.chat for texts in sets]
        self._templated: dict[str, str | Sequence[int]] = {}
        self._turn = 0
        self.last: list[ComparedText] = []
        """Texts of the last `decode` or `compare`."""

    def choose(self, prompt: Any, workload: int = 0) -> int:
        """Return the number of a prompt that a user chose, by its index."""
        if not isinstance(prompt, int | np.integer) or not 0 <= prompt < len(self.texts[workload]):
            raise ArgumentError(
                f"reset option prompt={prompt!r}: an engine's environment takes the index of one of the "
                f"{len(self.texts[workload])} {self.split} prompts of {self.workloads[workload]}"
            )
        return int(prompt + self.first_prompts[workload])

    def decode(
        self, prompts: Integers, workloads: Integers, knobs: Mapping[str, Floats], rng: np.random.Generator
    ) -> Metrics[Floats]:
        """Decode n texts; those of one setting together, so that an engine restarts once for each.

        Where an engine tells no rounds, it counts as a round for every token; where it does not tell what it drafted,
        as nothing drafted and nothing accepted.

        Raises:
            EngineError: the engine fails, or ignores a setting.
        """
        settings: dict[tuple[float, ...], list[int]] = {}
        for place in range(len(prompts)):
            settings.setdefault(tuple(float(knobs[knob.name][place]) for knob in self.knobs), []).append(place)
        compared: dict[int, ComparedText] = {}
        for values, places in settings.items():
            setting = {knob.name: value for knob, value in zip(self.knobs, values, strict=True)}
            texts = [
                (int(workloads[place]), int(prompts[place] - self.first_prompts[workloads[place]])) for place in places
            ]
            compared |= zip(places, self.compare(setting, texts), strict=True)
        self.last = [compared[place] for place in range(len(prompts))]
        return _metrics(self.last)

    def compare(self, knobs: Mapping[str, float] | None, texts: Sequence[tuple[int, int]]) -> list[ComparedText]:
        """Decode some texts plainly and with a setting, in turns.

        Args:
            knobs: the setting; None, or one that drafts nothing, for plain decoding twice.
            texts: places of workloads, and numbers of prompts in them.

        Raises:
            SettingIgnoredError: the engine did not follow the setting.
            EngineError: it has died or failed; the next comparison starts it anew.
        """
        compared = []
        try:
            for workload, prompt in texts:
                text = self.texts[workload][prompt]
                plain, drafting = self._started_plainly(), self._started(knobs, text)
                asked = self._prompt(plain, workload, text)
                sides = {"plain": plain, "drafted": drafting}
                order = sorted(sides, reverse=self._turn % 2 == 0)  # plain first in every other turn
                self._turn += 1
                decoded = {
                    side: sides[side].generate(asked, self._tokens, self._temperature, self._seed) for side in order
                }
                compared.append(ComparedText(workload, prompt, **decoded, equal=_equal(**decoded)))
        except BaseException:  # Ctrl-C, too: an answer still under way must not be taken for the next text's
            for backend in (self, self._lender):
                if backend is not None:
                    backend.close()
            raise
        if knobs is not None and self._drafts(knobs):
            self.engine.check_effect(knobs, [text.drafted for text in compared])
        self.last = compared
        return compared

    def _prompt(self, served: Served, workload: int, text: str) -> str | Sequence[int]:
        """A text of a set of prompts as the engine gets it: messages of a chat in the target's template."""
        if not self._chats[workload]:
            return text
        if text not in self._templated:
            self._templated[text] = served.chat_prompt(text)
        return self._templated[text]

    def _drafts(self, knobs: Mapping[str, float] | None) -> bool:
        return knobs is not None and knobs[self.engine.length_knob] > 0

    def _started_plainly(self) -> Served:
        if self._lender is not None:
            return self._lender._started_plainly()
        if self._plain is None:
            self._plain = self.engine.serve(None)
            self._warm_up(self._plain)
        return self._plain

    def _started(self, knobs: Mapping[str, float] | None, text: str) -> Served:
        """The engine at work with a setting, restarted where it remembers a text."""
        if knobs is None or not self._drafts(knobs):
            return self._started_plainly()
        if self._served is not None:
            setting, served = self._served
            if setting == knobs and not (self.engine.remembers and text in self._decoded):
                self._decoded.add(text)
                return served
            self._served = None
            served.close()
        served = self.engine.serve(knobs)
        self._served, self._decoded = (dict(knobs), served), {text}
        self._warm_up(served)
        return served

    def _warm_up(self, served: Served) -> None:
        served.generate(WARM_UP, WARM_UP_TOKENS, self._temperature, self._seed)

    def check_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Accept all that the engine's knobs allow."""

    def last_text(self) -> tuple[Sequence[int], list[Round]]:
        """Return nothing: an engine does not tell its rounds."""
        return (), []

    def close(self) -> None:
        """Stop what this backend has started; the engine stays open."""
        served, self._served = self._served, None
        plain, self._plain = self._plain, None
        for running in (None if served is None else served[1], plain):
            if running is not None:
                running.close()

    def __enter__(self) -> EngineBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _equal(plain: EngineText, drafted: EngineText) -> bool:
    if plain.tokens is None or drafted.tokens is None:
        return plain.text == drafted.text
    return list(plain.tokens) == list(drafted.tokens)


def _metrics(texts: Sequence[ComparedText]) -> Metrics[Floats]:
    """Return the metrics of texts, arrays with an entry each. Only tokens after the first count, which are timed."""
    rows = [
        (
            text.drafted.timed_tokens,
            text.drafted.timed_tokens if text.drafted.rounds is None else text.drafted.rounds,
            text.drafted.drafted or 0,
            0 if text.drafted.drafted is None else text.drafted.accepted or 0,
            0.0,
            text.drafted.seconds,
            text.plain.seconds / text.plain.timed_tokens * text.drafted.timed_tokens,
        )
        for text in texts
    ]
    return Metrics(*np.array(rows, np.float64).reshape(len(rows), len(Metrics._fields)).T)
