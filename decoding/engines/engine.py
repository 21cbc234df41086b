"""An engine: somebody else's program that decodes speculatively, with settings of its own.

An `Engine` knows the models, the draft and how the program is started; `Engine.serve` gives a `Served`, which generates
text with one setting. Nothing an engine replies is trusted: `Engine.check_effect` compares what was drafted with what
the setting asks for. Free of torch.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from ..decoders.traits import EngineStop
from ..errors import ArgumentError, KnobError, SpecgymError, mapping_of, number, one_of, whole_number
from ..traits import Knob

LOOKUP: Final = "prompt-lookup"
"""Name of the draft that copies what followed the same tokens in prompt and text."""
_FEW_ROUNDS = 3  # from which on what was drafted says something
_FOLLOWED = 0.75  # share of the tokens of a fixed length that must have been drafted


class EngineError(SpecgymError, RuntimeError):
    """An engine that cannot be started, has died or has failed; the message has its last words and the way out."""


class SettingIgnoredError(EngineError):
    """A setting that an engine took without a word and did not follow; the message says what it did instead."""


@dataclass(frozen=True)
class EngineText:
    """A text that an engine generated, with the engine's own counts.

    Counts are None where the engine does not tell them.

    Attributes:
        text: without the prompt.
        tokens: ids of the generated tokens; None if the engine gives none.
        new_tokens: number of generated tokens, an end-of-text token included where the engine counts it.
        seconds: from the first token to the last, by the engine's own clock where it has one.
        prompt_seconds: time to the first token.
        drafted: draft tokens that the target verified.
        accepted: draft tokens among the generated ones.
        rounds: verifications after the first token, and the prompt's where an engine verifies draft tokens with it.
        accepted_by_place: draft tokens accepted by their place in a draft.
        first_tokens: tokens that came at once with the first, itself included; several where an engine verifies draft
            tokens while it reads the prompt.
    """

    text: str
    tokens: Sequence[int] | None
    new_tokens: int
    seconds: float
    prompt_seconds: float = 0.0
    drafted: int | None = None
    accepted: int | None = None
    rounds: int | None = None
    accepted_by_place: Sequence[int] | None = None
    first_tokens: int = 1

    @property
    def timed_tokens(self) -> int:
        """Tokens generated in `seconds`: all but those that came with the first, at least 1."""
        return max(self.new_tokens - self.first_tokens, 1)


@dataclass(frozen=True)
class EngineOptions:
    """Ways to run an engine.

    Raises:
        ArgumentError: a number is not positive.
    """

    python: Path | None = None
    """Python interpreter that the engine is installed for. Defaults to the one at work."""
    program: Path | None = None
    """Program of the engine, such as llama-server. Defaults to the one on the path, or the engine's Python package."""
    address: str | None = None
    """Address of an engine that runs already, such as http://localhost:8000; it is not restarted, and never stopped."""
    threads: int | None = None
    """Threads that the engine computes with. Defaults to the machine's cores."""
    context: int = 2048
    """Tokens of prompt and text together, at most."""
    seconds_to_start: float = 300.0
    """Time that the engine may take to start."""
    log: Path | None = None
    """File for what the engine prints. Defaults to a temporary one."""
    float32: bool = False
    """Compute in float32 where the engine would round to fewer bits: slower, and greedy text is then the same at every
    setting."""

    def __post_init__(self) -> None:
        if self.threads is not None:
            whole_number("threads", self.threads)
        whole_number("context", self.context)
        number("seconds_to_start", self.seconds_to_start, above=0)


class Served(ABC):
    """An engine at work with one setting. A context manager, which leaves nothing running that it started."""

    @abstractmethod
    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> EngineText:
        """Generate the continuation of a prompt.

        Args:
            prompt: a string, or token ids where the engine takes them.
            max_new_tokens: generated at most.
            temperature: of sampling; 0 is greedy.
            seed: of sampling.

        Raises:
            EngineError: the engine has died or failed.
            ArgumentError: the engine takes no token ids, or no such temperature.
        """

    def chat_prompt(self, message: str) -> str | Sequence[int]:
        """Return the prompt that a user's message makes, in the target's chat template.

        Returns:
            A prompt for `generate`; by default, and where the target has no template, the message as it is.

        Raises:
            EngineError: the engine has died or failed.
        """
        return message

    def close(self) -> None:  # noqa: B027  # few have something to stop
        """Stop what was started for this setting; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Engine(ABC):
    """An engine with a target and a draft. A context manager, which leaves nothing running.

    Args:
        target: file or folder of the target, in a format that the engine reads, or its name at a hub.
        draft: likewise of the draft; `LOOKUP` for copies from the prompt; None for no draft.
        options: how the engine is run.

    Raises:
        EngineError: the engine is not installed; the message says how to install it.
        ArgumentError: a file is missing or in a format that the engine does not read.

    Attributes:
        name: as `train.py --engine` takes it.
        package: package and version that this adaptor was tried with.
        stop: rule by which its drafts from a model end early, as `SpeculativeOptions.stop` names it.
        lossless_when_sampling: whether its sampled text follows the target's distribution.
        remembers: whether what it has generated changes what it drafts later, so that no prompt may be repeated while
            it runs.
        knobs: what can be set, in the engine's own terms; defaults are the engine's own. A draft length of 0 is plain
            decoding. The first knob is the draft length.
        length_knob: name of the knob for the draft length.
        threshold_knob: name of the knob for the stop threshold; None where drafts of this kind have none.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    stop: ClassVar[EngineStop] = "never"
    lossless_when_sampling: bool = True
    remembers: bool = False
    knobs: tuple[Knob, ...]
    length_knob: str
    threshold_knob: str | None = None

    def __init__(self, target: str, draft: str | None, options: EngineOptions | None = None) -> None:
        self.target, self.draft, self.options = target, draft, options or EngineOptions()

    @abstractmethod
    def version(self) -> str:
        """Return the version of the engine itself."""

    @abstractmethod
    def serve(self, knobs: Mapping[str, float] | None) -> Served:
        """Start the engine with a setting, or tell the running one.

        What was served before with another setting stays usable until it is closed.

        Args:
            knobs: values by name, defaults for those left out; None for plain decoding.

        Raises:
            KnobError: an unknown knob, or a value out of range.
            EngineError: the engine does not start; the message has its last words.
        """

    def close(self) -> None:  # noqa: B027  # few keep something running
        """Stop everything that was started; closing twice does nothing."""

    @property
    def defaults(self) -> dict[str, float]:
        """The engine's own setting for this kind of draft."""
        return {knob.name: knob.default for knob in self.knobs}

    def resolve_knobs(self, knobs: Mapping[str, float]) -> dict[str, float]:
        """Every knob's value: those given, checked, and the engine's defaults for the rest.

        Raises:
            KnobError: an unknown name, a value out of range, or a fraction for a whole number.
        """
        values = self.defaults
        for name, value in mapping_of("knobs", knobs, KnobError).items():
            if name not in values:
                raise KnobError(f"{self.name} has no knob {name!r}; with this draft it has: {', '.join(values)}")
            values[name] = value
        return {knob.name: knob.checked(values[knob.name]) for knob in self.knobs}

    def nearest(self, knobs: Mapping[str, float]) -> dict[str, float]:
        """Return the nearest setting that can be served, where values within their ranges do not suit each other.

        Args:
            knobs: every knob's value.
        """
        return dict(knobs)

    def setting(self, draft_length: int, stop_threshold: float = 0.0) -> dict[str, float]:
        """Return a setting of ours in the engine's own terms, its other knobs at their defaults.

        Raises:
            ArgumentError: a threshold where drafts have none.
        """
        values = {**self.defaults, self.length_knob: float(draft_length)}
        if self.threshold_knob is not None:
            values[self.threshold_knob] = stop_threshold
        elif stop_threshold:
            raise ArgumentError(f"{self.name} ends no drafts of {self.draft} early; leave the stop threshold at 0")
        return values

    def check_effect(self, knobs: Mapping[str, float], texts: Sequence[EngineText]) -> None:
        """Compare what was drafted in some texts with what a setting asks for.

        Raises:
            SettingIgnoredError: nothing was drafted, or more than the setting allows, or less where drafts from a model
                have a fixed length.
        """
        counted = [text for text in texts if text.drafted is not None and text.rounds is not None]
        drafted, rounds = sum(text.drafted or 0 for text in counted), sum(text.rounds or 0 for text in counted)
        length = int(knobs[self.length_knob])
        if rounds < _FEW_ROUNDS:
            return
        fixed = length > 0 and self.fixed_length(knobs)
        # At the end of a text there is room for fewer: in the rounds of its last tokens, half as many in the mean.
        last_rounds = length * rounds / max(sum(text.timed_tokens for text in counted), 1)
        full = length * (rounds - len(counted) * last_rounds / 2)
        if drafted > length * rounds or (fixed and drafted < _FOLLOWED * full):
            asked_for = f"{length} tokens" if fixed else f"at most {length} tokens"
            setting = ", ".join(f"{name}={value:g}" for name, value in knobs.items())
            raise SettingIgnoredError(
                f"{self.name} {self.version()} did not follow {setting}: it drafted {drafted} tokens in {rounds} "
                f"rounds, where the setting means {asked_for} a round. Do not serve with it before you know why."
            )

    def fixed_length(self, knobs: Mapping[str, float]) -> bool:
        """True if every round of a setting drafts its whole length, where the text has room for it."""
        return self.draft != LOOKUP and (self.threshold_knob is None or not knobs[self.threshold_knob])

    def __deepcopy__(self, memo: object) -> Self:
        """Return the engine itself: gymnasium copies arguments of environments, and processes have no copies."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_ENGINES: Final[Mapping[str, str]] = {
    "llama.cpp": "llama_cpp:LlamaCpp",
    "openvino": "openvino:OpenVINO",
    "transformers": "transformers:Transformers",
    "vllm": "vllm:VLLM",
}


def engine_names() -> tuple[str, ...]:
    """Return the names of the engines that can be run."""
    return tuple(_ENGINES)


def open_engine(name: str, target: str, draft: str | None, options: EngineOptions | None = None) -> Engine:
    """Return an engine by its name; arguments and errors as for `Engine`.

    Raises:
        ArgumentError: there is no such engine.
    """
    one_of("engine", name, engine_names())
    kind: type[Engine] = pkgutil.resolve_name(f"{__package__}.{_ENGINES[name]}")
    return kind(target, draft, options)
