"""A setting to serve with, and its form in an engine's own flags and files. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...decoders.traits import ENGINE_SETTINGS, EngineStop
from ...errors import number, text, whole_number
from ...files import write_text
from ...loading.presets import path_exists
from ..engine import LOOKUP

NO_DRAFT: Final = "No draft model and no speculative setting: decode with the target alone."
"""Advice where drafts have no tokens."""
LONGEST_MATCH: Final = 3
"""Tokens that `PromptLookupDrafter` looks up first; it tries shorter runs where they did not occur before."""
_SHIPPED = Path(__file__).parents[2] / "data" / "models"


@dataclass(frozen=True)
class ServedSetting:
    """A setting of exact speculative decoding for a target and a draft.

    Args:
        target: model as the engine loads it: a file, a folder, or its name at a hub.
        draft: likewise; `LOOKUP` for copies from the prompt; None for no draft.
        draft_length: tokens drafted a round, at most; 0 for plain decoding.
        stop_threshold: probability below which a token ends a draft, 0 to 1; 0 for none.
        min_draft_length: tokens of a draft, at least; shorter ones are dropped.
        temperature: of the sampling that the setting was found for; 0 for greedy decoding.
        schedule: draft lengths by the largest batch size that they are for; the last holds beyond it. Empty where one
            length is for all.
        rule: rule that `stop_threshold` was found with, as `SpeculativeOptions.stop` names it; None if it is that of
            the engine.
        extra: further settings by the engine's own names, as a tuner of that engine found them.

    Raises:
        ArgumentError: a number is out of range, or a name is empty.
    """

    target: str
    draft: str | None
    draft_length: int
    stop_threshold: float = 0.0
    min_draft_length: int = 0
    temperature: float = 0.0
    schedule: Mapping[int, int] = field(default_factory=dict)
    rule: EngineStop | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text("target", self.target)
        whole_number("draft_length", self.draft_length, at_least=0)
        number("stop_threshold", self.stop_threshold, at_least=0, at_most=1)
        whole_number("min_draft_length", self.min_draft_length, at_least=0)
        number("temperature", self.temperature, at_least=0)
        for batch_size, length in self.schedule.items():
            whole_number("batch size of the schedule", batch_size)
            whole_number("draft length of the schedule", length, at_least=0)

    @property
    def speculates(self) -> bool:
        """False where the advice is plain decoding."""
        return self.draft is not None and self.longest > 0

    @property
    def draws_drafts(self) -> bool:
        """True if it was found by decoding of ours that draws drafts, rather than by an engine at its own defaults."""
        return self.temperature > 0 and not self.extra

    @property
    def whole_extra(self) -> dict[str, float]:
        """The further settings, whole numbers as `int`."""
        return {name: int(value) if float(value).is_integer() else value for name, value in self.extra.items()}

    @property
    def longest(self) -> int:
        """Longest draft of any batch size."""
        return max(self.schedule.values(), default=self.draft_length)

    @property
    def model(self) -> str | None:
        """The draft, if it is a model."""
        return None if self.draft == LOOKUP else self.draft

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """First and last batch size of every step of the schedule, and its draft length; ascending."""
        largest = sorted(self.schedule)
        return [(before + 1, size, self.schedule[size]) for before, size in zip([0, *largest], largest, strict=False)]


@dataclass(frozen=True)
class Export:
    """A setting as an engine takes it.

    Attributes:
        engine: its name.
        version: that this was written for.
        arguments: lines of a shell or of Python, which serve with the setting.
        files: other forms of it, contents by file name.
        notes: sentences on what has no equivalent there, and what else to know.
    """

    engine: str
    version: str
    arguments: str
    files: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def script(self) -> str:
        """The arguments, below comments with the version and the notes."""
        comments = [f"# For {self.engine} {self.version}.", *(f"# {note}" for note in self.notes)]
        return "\n".join([*comments, self.arguments, ""])

    def save(self, folder: Path) -> list[Path]:
        """Write the script and the other files, each atomically; return their paths."""
        script = "serve.py" if self.engine in ("transformers", "openvino") else "serve.sh"
        contents = {script: self.script, **self.files}
        for name, content in contents.items():
            write_text(folder / name, content)
        return [folder / name for name in contents]


def notes_on(engine: str, setting: ServedSetting, *others: str) -> list[str]:
    """Return sentences on the parts of a setting that an engine lacks or understands otherwise, then others.

    Args:
        engine: a key of `ENGINE_SETTINGS`.
        setting: to be written.
        others: further sentences; empty ones are left out.
    """
    known, notes = ENGINE_SETTINGS[engine], list[str]()
    if setting.stop_threshold and (known.stop == "never" or setting.draft == LOOKUP):
        notes.append(
            f"stop_threshold {setting.stop_threshold:g} has no equivalent: drafts here have a fixed length. Measure "
            "the setting before you serve with it."
        )
    elif setting.stop_threshold and setting.rule not in (None, known.stop):
        notes.append(
            f"stop_threshold {setting.stop_threshold:g} was found with another rule ({setting.rule}); here a draft "
            f"ends by that of {engine}. Measure the setting before you serve with it."
        )
    if setting.min_draft_length and "min_draft_length" not in known.settings:
        notes.append(f"min_draft_length {setting.min_draft_length} has no equivalent.")
    if setting.schedule and not known.schedule:
        lengths = ", ".join(f"{length} up to {size} texts" for size, length in sorted(setting.schedule.items()))
        notes.append(
            f"Draft lengths by batch size ({lengths}) have no equivalent; written is the one for a single text."
        )
    for name in (setting.target, setting.model):
        if name is not None and not path_exists(name) and (_SHIPPED / name).is_dir():
            way = (
                f"as GGUF: python -m specgym.decoding.engines.gguf {name} {name}.gguf"
                if engine == "llama.cpp"
                else "as a folder that engines load: model, tokenizer = "
                f"specgym.decoding.load_model({name!r}); then save_pretrained of both"
            )
            notes.append(f"{name} ships with specgym; write it {way}.")
    return [*notes, *(note for note in others if note)]
