"""Measurements of an engine: what was tried, how fast it was with what interval, and their record, which resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import EngineText, SettingIgnoredError, write_sealed
from specgym.envs import ComparedText, EngineBackend, prompts_at

from ..evaluation.results import resampled
from ..training.run_folder import read_json

FORMAT: Final = "specgym-engine-measurements-1"
Floats = NDArray[np.float64]
_COUNTS: Final = ("new_tokens", "seconds", "prompt_seconds", "drafted", "accepted", "rounds", "first_tokens")


@dataclass(frozen=True)
class Trial:
    """One measurement of a setting.

    Attributes:
        draft: that drafted, by its name.
        knobs: in the engine's terms; None for plain decoding.
        why: who asked for it.
        texts: decoded plainly and with the setting; without their tokens once they were stored.
        seconds: that the measurement took, with what had to be started for it.
        failed: the engine's failure to follow the setting, in words; empty if it did.
    """

    draft: str
    knobs: Mapping[str, float] | None
    why: str
    texts: Sequence[ComparedText]
    seconds: float
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without texts and tokens."""
        texts = [
            {**asdict(text), **{side: _counts(getattr(text, side)) for side in ("plain", "drafted")}}
            for text in self.texts
        ]
        return {**vars(self), "texts": texts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Trial:
        """Read what `to_json` gave. Raises KeyError or TypeError for anything else."""
        texts = [
            ComparedText(**{**text, **{side: EngineText("", None, **text[side]) for side in ("plain", "drafted")}})
            for text in content["texts"]
        ]
        return cls(**{**content, "texts": texts})


def _counts(text: EngineText) -> dict[str, Any]:
    return {name: getattr(text, name) for name in _COUNTS}


def setting_key(draft: str, knobs: Mapping[str, float] | None) -> tuple[str, tuple[tuple[str, float], ...]]:
    """Return what tells settings apart."""
    return draft, tuple(sorted((knobs or {}).items()))


@dataclass(frozen=True)
class Speeds:
    """Speeds of texts in all resamples of their prompts; the first is that of the prompts themselves.

    Attributes:
        plain: tokens a second decoded plainly, shape (1 + resamples,).
        drafted: with the setting, likewise.
    """

    plain: Floats
    drafted: Floats

    @classmethod
    def of(cls, texts: Sequence[ComparedText]) -> Speeds:
        """Take the speeds of some texts, of which those with one prompt are resampled together."""
        by_prompt: dict[tuple[int, int], Floats] = {}
        for text in texts:
            sums = [
                text.plain.timed_tokens,
                text.plain.seconds,
                text.drafted.timed_tokens,
                text.drafted.seconds,
            ]
            key = text.workload, text.prompt
            by_prompt[key] = by_prompt.get(key, np.zeros(4)) + sums
        ordered = np.stack([by_prompt[key] for key in sorted(by_prompt)])  # so that settings are resampled alike
        sums = ordered[resampled(len(ordered))].sum(1)
        return cls(sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3])

    @property
    def speedup(self) -> Floats:
        """Speed over that of plain decoding of the same texts, shape (1 + resamples,)."""
        return self.drafted / self.plain


def _timed(text: ComparedText) -> bool:
    """True if both sides took a time that can be compared; a text may end with its first token."""
    return all(side.seconds > 0 and side.new_tokens > side.first_tokens for side in (text.plain, text.drafted))


@dataclass
class Journal:
    """Record of all measurements of a run, from which it goes on.

    A run asks for the same measurements in the same order as long as they give the same; those in the record are taken
    from it.

    Attributes:
        path: file, written after every measurement.
        trials: measured so far.
    """

    path: Path
    trials: list[Trial] = field(default_factory=list)
    _asked: int = 0

    @classmethod
    def at(cls, path: Path) -> Journal:
        """Read the record of a run, or begin one.

        Raises:
            RunFileError: the file is damaged.
        """
        if not path.is_file():
            return cls(path)
        content = read_json(path, "delete it to measure anew", FORMAT)
        return cls(path, [Trial.from_json(trial) for trial in content["trials"]])

    @property
    def replaying(self) -> bool:
        """True while what is asked for is in the record already."""
        return self._asked < len(self.trials)

    @property
    def seconds(self) -> float:
        """Time of the measurements that were asked for so far."""
        return sum(trial.seconds for trial in self.trials[: self._asked])

    def take(self, draft: str, knobs: Mapping[str, float] | None, why: str, measure: Callable[[], Trial]) -> Trial:
        """Return the next measurement: the recorded one, or what `measure` gives, which is recorded."""
        if self.replaying:
            recorded = self.trials[self._asked]
            if (setting_key(draft, knobs), why) == (setting_key(recorded.draft, recorded.knobs), recorded.why):
                self._asked += 1
                return recorded
            del self.trials[self._asked :]  # of another version of this package, which asked for something else
        self.trials.append(measure())
        self._asked += 1
        write_sealed(self.path, {"format": FORMAT, "trials": [trial.to_json() for trial in self.trials]})
        return self.trials[-1]


class Measuring:
    """Measures settings of one engine with several drafts, on the next prompts of every set.

    Args:
        backends: by name of the draft; all of the same target and sets of prompts.
        journal: record of the measurements.
        prompts: decoded of every set for a measurement.
        seed: of the order of the prompts.
        report: called before each measurement with what is being done.
    """

    def __init__(
        self,
        backends: Mapping[str, EngineBackend],
        journal: Journal,
        prompts: int,
        seed: int,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.backends, self.journal = backends, journal
        self._prompts, self._seed, self._report = prompts, seed, report
        self._next = 0

    def measure(self, draft: str, knobs: Mapping[str, float], why: str) -> Trial:
        """Measure a setting on the next prompts.

        Raises:
            EngineError: the engine has died or failed. That it ignores the setting is a failed trial instead.
        """
        backend = self.backends[draft]
        texts = [
            (workload, prompt)
            for workload, prompts in enumerate(backend.texts)
            for prompt in prompts_at(self._next, min(self._prompts, len(prompts)), len(prompts), self._seed)
        ]
        self._next += self._prompts
        return self.take(draft, knobs, why, texts)

    def take(self, draft: str, knobs: Mapping[str, float], why: str, texts: Sequence[tuple[int, int]]) -> Trial:
        """Measure a setting on some texts, or take them from the record."""
        backend = self.backends[draft]

        def measured() -> Trial:
            setting = ", ".join(f"{name}={value:g}" for name, value in knobs.items())
            self._report(f"{backend.engine.name}, {draft}: {setting} ({why})")
            started = time.monotonic()
            compared: list[ComparedText] = []
            try:
                compared = [text for text in backend.compare(knobs, texts) if _timed(text)]
                failed = "" if compared else "no text was longer than its first tokens, which are not timed"
            except SettingIgnoredError as error:
                failed = str(error)
            return Trial(draft, dict(knobs), why, compared, time.monotonic() - started, failed)

        return self.journal.take(draft, knobs, why, measured)
