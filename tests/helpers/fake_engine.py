"""An engine without a program: its texts follow from the prompt, its seconds from a formula and a clock that drifts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specgym.decoding import LOOKUP, Engine, EngineOptions, EngineText, Knob, Served

PLAIN_SECONDS = 0.01


@dataclass
class Behaviour:
    """Ways in which the engine behaves, and what it was asked.

    Attributes:
        alpha: share of draft tokens that are right.
        token_cost: seconds of a drafted token, in plain tokens.
        drift: growth of every second with each text, as a share.
        ignores: whether it drafts three tokens whatever it is set to.
        strays: whether drafted text differs from plain text.
        counts: whether it tells counts.
        remembers: whether it drafts otherwise what it has seen.
        short: prompts with these letters end with the first token; none if empty.
        silent: whether it finds nothing to draft.
        slow: prompts with these letters take nine times as long with a draft; none if empty.
        asked: settings that were served, in order; None for plain.
        prompts: texts decoded by each of them.
        open: number of those served that are not closed.
        texts: number of texts so far.
        opened: options of engines that were opened by name.
        closed: number of engines that were closed.
    """

    alpha: float = 0.8
    token_cost: float = 0.1
    drift: float = 0.0
    ignores: bool = False
    strays: bool = False
    counts: bool = True
    remembers: bool = False
    asked: list[Mapping[str, float] | None] = field(default_factory=list)
    prompts: list[list[str]] = field(default_factory=list)
    slow: str = ""
    short: str = ""
    silent: bool = False
    open: int = 0
    texts: int = 0
    opened: list[EngineOptions | None] = field(default_factory=list)
    closed: int = 0


class FakeEngine(Engine):
    """An engine that drafts a fixed number of tokens, and ends drafts by no threshold."""

    name = "fake"
    package = "fake 1"
    length_knob = "num_tokens"
    knobs = (Knob("num_tokens", 0, 16, 12, integer=True),)

    def __init__(
        self,
        target: str = "target.gguf",
        draft: str | None = "draft.gguf",
        options: EngineOptions | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        super().__init__(target, draft, options)
        self.behaviour = behaviour or Behaviour()
        self.remembers = self.behaviour.remembers

    def version(self) -> str:
        """Return its version."""
        return "1"

    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        """Return the engine at work with a setting."""
        values = None if knobs is None else self.resolve_knobs(knobs)
        self.behaviour.asked.append(values)
        self.behaviour.prompts.append([])
        self.behaviour.open += 1
        length = 0 if values is None else int(values["num_tokens"])
        return FakeServed(self.behaviour, length, self.draft == LOOKUP, self.behaviour.prompts[-1])

    def chat_prompt(self, message: str) -> str | Sequence[int]:
        """Return a message in a template."""
        return f"<user>{message}<answer>"

    def close(self) -> None:
        """Count itself as closed."""
        self.behaviour.closed += 1


class FakeServed(Served):
    """The engine at work with a setting."""

    def __init__(self, behaviour: Behaviour, length: int, lookup: bool, prompts: list[str]) -> None:
        self._behaviour, self._lookup, self._prompts = behaviour, lookup, prompts
        self._length = 0 if behaviour.silent else 3 if behaviour.ignores and length else length
        self._drafts = length > 0
        self._open = True

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> EngineText:
        """Return a text made of the prompt's hash."""
        behaviour, key = self._behaviour, str(prompt)
        self._prompts.append(key)
        behaviour.texts += 1
        if behaviour.short and behaviour.short in key:
            max_new_tokens = 1
        tokens = [_share(key, place, "token") for place in range(max_new_tokens)]
        if behaviour.strays and self._length:
            tokens[-1] = -1.0
        rounds = drafted = accepted = 0
        place, cost = 1, 0.0
        while place < max_new_tokens:
            length = min(self._length, max_new_tokens - place - 1)
            right = 0
            while right < length and _share(key, place + right, "draft") < behaviour.alpha:
                right += 1
            rounds, drafted, accepted = rounds + 1, drafted + length, accepted + right
            place += right + 1
            cost += 1 + behaviour.token_cost * length
        seconds = cost * PLAIN_SECONDS * (1 + behaviour.drift) ** behaviour.texts
        if behaviour.slow and behaviour.slow in key and self._length:
            seconds *= 9
        ids = [int(1000 * share) for share in tokens]
        counted = (drafted, accepted, rounds) if behaviour.counts and self._drafts else (None, None, None)
        return EngineText(" ".join(map(str, ids)), ids, max_new_tokens, seconds, 0.0, *counted)

    def chat_prompt(self, message: str) -> str | Sequence[int]:
        """Return a message in a template."""
        return f"<user>{message}<answer>"

    def close(self) -> None:
        """Count itself as closed."""
        self._behaviour.open -= self._open
        self._open = False


def _share(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") / 2**32
