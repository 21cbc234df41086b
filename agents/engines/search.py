"""Search for an engine's best setting within a number of measurements and minutes, and what comes of it.

1. The engine's own setting is measured, and a second one of another draft length: two points of what a round costs. Of
   a look-up the second also looks up another number of tokens; whichever is faster goes on with its number.
2. A method proposes settings, which are measured: the tuner that ships, or a rival.
3. The fastest so far and the next are measured again, on other prompts, until their intervals part, or the fastest is
   known to a fiftieth, and it is clear whether it is slower than plain decoding on one of the sets of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from specgym.decoding import LOOKUP, Engine
from specgym.envs import MOST_MEASUREMENTS, Facts, length_of, setting_of, threshold_of

from ..evaluation.statistics import interval
from ..evaluation.worlds.methods import ClosedForm, Learned
from ..evaluation.worlds.searches import GaussianProcess, Optuna
from ..evaluation.worlds.sessions import Integers, Searchable, Session
from .practice import practised
from .readings import Counts, RoundCost, facts_of, readings_of, rounds_with_draft
from .settings import MethodName
from .trials import Measuring, Speeds, Trial, setting_key

NEEDS_COUNTS: Final = ("tuner", "closed-form")
"""Methods that go by what was drafted and kept, not by speed alone."""
PRECISE: Final = 0.02
"""Half the width of the interval of a speedup, as a share, from which on it is known well enough."""
LEAST: Final = 0.98
"""Speedup below which a setting counts as slower than plain decoding."""
_LONG, _SHORT = 12, 4  # draft lengths of the second measurement
_REHEARSED: Final = 2  # settings that practice may propose for a draft
_RACES: Final = 2  # measurements kept for the last part
_UNKNOWN = Facts(np.array([True]), np.array([False]), np.array([0.0]), np.array([1]), np.array([1.0]), np.array([1.0]))


@dataclass(frozen=True)
class KnownEngine:
    """An engine with a draft as a single world, after its first measurements.

    Attributes:
        facts: known of it.
        defaults: the engine's own setting, nearest of those that worlds have, shape (1,).
        seed: fixes what searches draw.
    """

    facts: Facts
    defaults: Integers
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return 1

    @property
    def kinds(self) -> Integers:
        """Kind of the engine, as `Problem.kinds` has it, shape (1,)."""
        return np.where(self.facts.fixed, 0, np.where(self.facts.before, 2, 1))


@dataclass(frozen=True)
class Candidate:
    """A setting that was measured, with all texts of all its measurements.

    Attributes:
        draft: that drafts, by its name.
        knobs: in the engine's terms.
        speeds: of all its texts.
        by_set: its speedups on every set of prompts, likewise.
        texts: how many.
    """

    draft: str
    knobs: Mapping[str, float]
    speeds: Speeds
    by_set: Sequence[Speeds]
    texts: int

    @property
    def speedup(self) -> float:
        """Speed over that of plain decoding."""
        return float(self.speeds.speedup[0])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the speedup."""
        return interval(self.speeds.speedup)

    def loses(self, surely: bool) -> bool:
        """Return whether it is slower than plain decoding on some set of prompts, by less than `LEAST`.

        Args:
            surely: whether the whole interval must be below 1.
        """
        return any(
            speeds.speedup[0] < LEAST and (not surely or interval(speeds.speedup)[1] < 1) for speeds in self.by_set
        )


def candidates_of(trials: Sequence[Trial]) -> list[Candidate]:
    """Return the settings of some trials, the fastest first."""
    by_setting: dict[object, list[Trial]] = {}
    for trial in trials:
        if trial.texts and trial.knobs is not None:
            by_setting.setdefault(setting_key(trial.draft, trial.knobs), []).append(trial)
    candidates = []
    for same in by_setting.values():
        texts = [text for trial in same for text in trial.texts]
        sets = sorted({text.workload for text in texts})
        by_set = [Speeds.of([text for text in texts if text.workload == place]) for place in sets]
        candidates.append(Candidate(same[0].draft, same[0].knobs or {}, Speeds.of(texts), by_set, len(texts)))
    return sorted(candidates, key=lambda candidate: -candidate.speedup)


class EngineSearch:
    """Search with one method over one draft or several.

    Args:
        measuring: measures settings.
        method: that proposes.
        temperature: of sampling.
        measurements: at most, for all drafts together; 3 for each draft at least.
        seconds: of measuring, at most; no measurement begins that would probably end later.
        slower_sets: whether a setting may be slower than plain decoding on one of the sets of prompts.
        seed: fixes what the method draws.
        recorded: workloads to practise on before the method proposes anything, as `practised` takes them.
        tell: called with each measurement.
    """

    def __init__(
        self,
        measuring: Measuring,
        method: MethodName,
        *,
        temperature: float,
        measurements: int,
        seconds: float,
        slower_sets: bool = False,
        seed: int = 0,
        recorded: Sequence[str] = (),
        tell: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self._measuring, self.method, self._tell = measuring, method, tell
        self._temperature, self._seed, self._recorded = temperature, seed, recorded
        self._budget, self._seconds, self._slower_sets = measurements, seconds, slower_sets
        self._begun = 0.0
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        """Sentences on what this search could not do."""
        self.closed_forms: dict[str, tuple[float, dict[str, float]]] = {}
        """Setting by the closed form of each draft and the speedup that it expects, from the same measurements."""

    def run(self) -> Candidate | None:
        """Measure, and return the setting to serve with; None for plain decoding.

        Raises:
            EngineError: the engine has died or failed.
        """
        self._begun = self._measuring.journal.seconds
        backends = self._measuring.backends
        share = min((self._budget - _RACES) // len(backends), MOST_MEASUREMENTS)
        for draft in backends:
            self._explore(draft, max(share, 2))
        self._race()
        return self.recommended()

    def recommended(self) -> Candidate | None:
        """Return the fastest setting that was measured and pays; None if none does.

        It pays if it is faster than plain decoding, by an interval that reaches down to `LEAST` at most, and is not
        surely slower on a set of prompts.
        """
        for candidate in candidates_of(self.trials):
            pays = candidate.speedup > 1 and candidate.interval[0] >= LEAST
            if pays and (self._slower_sets or not candidate.loses(surely=True)):
                return candidate
        return None

    def _explore(self, draft: str, share: int) -> None:
        engine = self._measuring.backends[draft].engine
        usual, others = engine.defaults, _middle(engine)
        length = _SHORT if usual[engine.length_knob] > (_LONG + _SHORT) / 2 else _LONG
        settings = {"default": usual, "second setting": {**engine.setting(length), **others}}
        first = [self._measure(draft, knobs, why) for why, knobs in settings.items()]
        taken = [trial for trial in first if trial is not None and trial.texts]
        if not taken:
            return
        session, method = self._session(engine, taken, share, draft)
        for trial in taken:
            self._add(session, engine, trial)
        fastest = candidates_of(taken)[0].knobs
        kept = {name: fastest[name] for name in others}
        rehearsed = self._practised(engine, taken)
        for proposed in range(share - len(first)):
            if proposed < len(rehearsed):
                knobs, why = rehearsed[proposed], "practice"
            else:
                setting, why = session.propose(), method
                if session.stopped[0] or not length_of(setting)[0]:
                    break
                knobs = engine.setting(int(length_of(setting)[0]), float(threshold_of(setting)[0]))
            measured = self._measure(draft, {**knobs, **kept}, why)
            if measured is None:
                break
            if measured.texts:
                self._add(session, engine, measured)
        self._recall_closed_form(draft, engine, kept)

    def _practised(self, engine: Engine, taken: Sequence[Trial]) -> Sequence[Mapping[str, float]]:
        """Settings that practice recommends, the best first; none without traces, or counts to charge them by."""
        costs = _costs(engine, taken)
        if not self._recorded or not costs:
            return []
        plain = 1 / Speeds.of([text for trial in taken for text in trial.texts]).plain[0]
        facts = facts_of(engine, self._temperature, costs)
        return practised(self._recorded, engine, facts, float(plain), self._seed)[:_REHEARSED]

    def _session(self, engine: Engine, taken: Sequence[Trial], share: int, draft: str) -> tuple[Session, MethodName]:
        """Session of the method, which knows what the first measurements tell of rounds."""
        costs, method = _costs(engine, taken), self.method
        if not costs and method in NEEDS_COUNTS:
            uncounted = any(Counts.of(trial.texts) is None for trial in taken)
            why = (
                f"{engine.name} does not tell what it drafts from {draft}" if uncounted else f"{draft} drafted nothing"
            )
            self.notes.append(f"{why}, so gp proposes its settings.")
            method = "gp"
        usual = engine.defaults
        threshold = 0.0 if engine.threshold_knob is None else usual[engine.threshold_knob]
        start = setting_of(np.array([usual[engine.length_knob]]), np.array([threshold]))
        facts = facts_of(engine, self._temperature, costs) if costs else _UNKNOWN
        return _begin(method, KnownEngine(facts, start, (self._seed,)), share), method

    def _recall_closed_form(self, draft: str, engine: Engine, kept: Mapping[str, float]) -> None:
        """Let the closed form recommend by all that was measured of a draft."""
        taken = [trial for trial in self.trials if trial.draft == draft and trial.texts]
        if not (costs := _costs(engine, taken)):
            return
        known = KnownEngine(facts_of(engine, self._temperature, costs), np.zeros(1, np.int64), (self._seed,))
        formula = ClosedForm(known, len(taken))
        for trial in taken:
            self._add(formula, engine, trial)
        length = int(length_of(formula.recommend())[0])
        self.closed_forms[draft] = float(formula.predicted()[0, length]), {**engine.setting(length), **kept}

    def _add(self, session: Session, engine: Engine, trial: Trial) -> None:
        assert trial.knobs is not None
        threshold = 0.0 if engine.threshold_knob is None else trial.knobs[engine.threshold_knob]
        length = int(trial.knobs[engine.length_knob])
        counts = Counts.of(trial.texts)
        if counts is None:
            speedup = float(Speeds.of(trial.texts).speedup[0])
            readings = readings_of(Counts(1, 0, 0, 0, 1.0, speedup), 0, length)
        else:
            readings = readings_of(counts, rounds_with_draft(engine, trial.knobs, counts), length)
        session.add(setting_of(np.array([length]), np.array([threshold])), readings)

    def _race(self) -> None:
        """Measure the fastest settings again until it is clear which is best, and whether it pays."""
        while ranked := [
            candidate
            for candidate in candidates_of(self.trials)
            if self._slower_sets or not candidate.loses(surely=True)
        ]:
            best = ranked[0]
            low, high = best.interval
            rival = ranked[1] if len(ranked) > 1 else None
            bar = max(1.0, rival.interval[1] if rival else 1.0)
            doubtful = not self._slower_sets and best.loses(surely=False) and not best.loses(surely=True)
            if not doubtful and (high < 1 or low > bar or (high - low) / 2 < PRECISE * best.speedup):
                return
            chosen = rival if rival and rival.interval[1] > low and rival.texts < best.texts else best
            if self._measure(chosen.draft, chosen.knobs, "once more") is None:
                return

    def _measure(self, draft: str, knobs: Mapping[str, float], why: str) -> Trial | None:
        """Measure a setting if measurements and time are left."""
        spent = self._measuring.journal.seconds - self._begun
        expected = max((trial.seconds for trial in self.trials), default=0.0)
        if len(self.trials) >= self._budget or spent + expected > self._seconds:
            return None
        trial = self._measuring.measure(draft, knobs, why)
        self.trials.append(trial)
        self._tell(trial)
        return trial


def _middle(engine: Engine) -> dict[str, float]:
    """Further knobs of a look-up, such as the tokens looked up, in the middle of their search ranges, in doublings."""
    if engine.draft != LOOKUP:
        return {}
    further = [knob for knob in engine.knobs if knob.name not in (engine.length_knob, engine.threshold_knob)]
    return {knob.name: float(round(math.sqrt(low * high))) for knob in further for low, high in [knob.search or (0, 0)]}


def _costs(engine: Engine, trials: Sequence[Trial]) -> list[RoundCost]:
    """Cost of the rounds of some trials, the shortest and the longest drafts; none where the engine tells no counts."""
    costs = []
    for trial in trials:
        counts = Counts.of(trial.texts)
        if counts is None or trial.knobs is None:
            return []
        drafting = rounds_with_draft(engine, trial.knobs, counts)
        if drafting:
            costs.append(RoundCost.of(counts, drafting))
    return [min(costs), max(costs)] if costs else []


def _begin(method: MethodName, known: Searchable, share: int) -> Session:
    if method == "tuner":
        from ..export.worlds_policy import shipped_tuner

        return Learned(known, share, shipped_tuner())
    beginnings: Mapping[MethodName, Callable[[Searchable, int], Session]] = {
        "closed-form": ClosedForm,
        "gp": GaussianProcess,
        "tpe": Optuna,
    }
    return beginnings[method](known, share)
