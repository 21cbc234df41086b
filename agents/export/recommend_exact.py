"""Recommended settings of exact decoding for a real pair, by a policy that has learned in simulated worlds.

The policy sees what a user can measure in a minute: the times of plain decoding and of two rounds, and what a few
settings gave on training prompts. What it recommends comes with the arguments of the engine that one serves with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich import box
from rich.table import Table

from specgym.decoding import (
    ENGINE_SETTINGS,
    ModelType,
    SpeculativeDecoder,
    engine_arguments,
    file_name,
    resolve,
    whole_number,
    write_json,
)
from specgym.envs import (
    LONGEST,
    MOST_MEASUREMENTS,
    PROFILED,
    Readings,
    RealWorld,
    RewardSettings,
    Workload,
    knobs_of,
    profile_of,
    real_world,
)

from ..evaluation.contenders import CLOSED_FORM, DEFAULT, live_verdict
from ..evaluation.live import Contender, judge_live, live_columns
from ..evaluation.results import LEARNED, ResultTable, Row
from ..evaluation.text_quality import require_text_quality, scored_texts
from ..evaluation.worlds.methods import ClosedForm, Learned, Tuner
from ..evaluation.worlds.sessions import Session
from ..experiments.experiment import RunSettings
from ..training.run_folder import console, on_machine, quieten, require_writable, this_command
from ..training.settings_io import SettingsError
from .recommend_pair import workload_of

FORMAT = "specgym-exact-recommendation-1"
MEASUREMENTS: Final = 4
"""Settings that are measured, unless another number is asked for."""
FOLDER: Final = Path("recommendations")
"""Folder of the recommendations, unless another one is asked for."""
SPEED = RewardSettings(acceptance_weight=0.0, range_weight=0.0, ranges={})
_PLACES = 6
_USUAL_LENGTH = 5  # where an engine has no default of its own for a kind of draft


@dataclass(frozen=True)
class Trial:
    """A setting, measured on a few training prompts.

    Attributes:
        knobs: of `SpeculativeDecoder`; a draft length of 0 is plain decoding.
        speedup: over plain decoding.
        tokens_per_round: emitted, the target's own included.
        kept_by_place: shares of the drafted tokens that were kept, by their place in a draft; None where none was
            judged.
    """

    knobs: Mapping[str, float]
    speedup: float
    tokens_per_round: float
    kept_by_place: Sequence[float | None]

    @classmethod
    def of(cls, world: RealWorld, setting: int, *measured: Readings) -> Trial:
        """Take the readings of one measurement or several, of which speedups are averaged and rounds counted."""
        counts = zip(*((readings.drafts, readings.kept, readings.reached) for readings in measured), strict=True)
        drafts, kept, reached = (np.sum(of_all, axis=0) for of_all in counts)
        rates = [float(a / b) if b else None for a, b in zip(kept[0, :_PLACES], reached[0, :_PLACES], strict=True)]
        tokens = 1 + float(kept.sum() / max(drafts.sum(), 1))
        speedup = float(np.mean([readings.speedup[0] for readings in measured]))
        return cls(knobs_of(setting, world.threshold), speedup, tokens, rates)


@dataclass(frozen=True)
class ExactRecommendation:
    """The recommended setting of exact decoding for a workload, and the measurements before.

    Attributes:
        workload: its name.
        engine: that is served with.
        backend: what the measurements were taken with, ``live`` or ``replay``.
        plain_ms: milliseconds of a plain token.
        round_costs: seconds of a round over those of a plain token, by its drafted tokens.
        measurements: that were allowed.
        tried: the measurements, in order.
        expected: what the recommended setting gave when it was measured; None where it is plain decoding.
        closed_form: what the closed form of Leviathan et al. recommends by the same measurements.
        arguments: of the engine, for what is recommended.
    """

    workload: str
    engine: str
    backend: str
    plain_ms: float
    round_costs: Mapping[int, float]
    measurements: int
    tried: Sequence[Trial]
    expected: Trial | None
    closed_form: Mapping[str, float]
    arguments: str

    @property
    def knobs(self) -> Mapping[str, float] | None:
        """The recommended setting; None where the advice is not to speculate."""
        return None if self.expected is None or self.expected.speedup <= 1 else self.expected.knobs

    @property
    def advice(self) -> str:
        """Advice in a sentence or two."""
        if self.knobs is not None and self.expected is not None:
            setting = ", ".join(f"{name}={value:.3g}" for name, value in self.knobs.items())
            return (
                f"Recommended for {self.workload} with {self.engine}: {setting}. Expected: "
                f"{self.expected.speedup:.2f} times plain decoding."
            )
        measured = "" if self.expected is None else f" What would be recommended gives {self.expected.speedup:.2f}."
        return f"Do not speculate on {self.workload} with {self.engine}: nothing pays.{measured}"

    def save(self, path: Path, command: str) -> None:
        """Write it as JSON, atomically; the recommended setting is null where the advice is not to speculate."""
        costs = {str(tokens): cost for tokens, cost in self.round_costs.items()}
        content = {**asdict(self), "round_costs": costs, "recommended": self.knobs, "advice": self.advice}
        write_json(path, {"format": FORMAT, "command": command, **content})

    def render(self) -> Table:
        """The measurements, and what is recommended, as a rich table."""
        title = f"{self.workload}, {self.engine} ({self.backend})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("measurement")
        names = list(self.tried[0].knobs if self.tried else self.closed_form)
        headings = (*(name.replace("_", " ") for name in names), "speedup", "ms/token", "tokens\n/round")
        for heading in headings:
            table.add_column(heading, justify="right")
        table.add_column(f"kept at place 1 to {_PLACES}")
        rows = [(str(number), trial) for number, trial in enumerate(self.tried, 1)]
        if self.expected is not None:
            rows.append(("recommended", self.expected))
        for label, trial in rows:
            kept = " ".join("   -" if rate is None else f"{rate:.2f}" for rate in trial.kept_by_place)
            table.add_row(
                label,
                *(f"{trial.knobs[name]:.3g}" for name in names),
                f"{trial.speedup:.2f}",
                f"{self.plain_ms / trial.speedup:.2f}",
                f"{trial.tokens_per_round:.2f}",
                kept,
                style="bold" if label == "recommended" else None,
            )
        charged = "by the clock" if self.backend == "live" else "charged by the pair's reference profile"
        costs = ", ".join(f"with {tokens} drafted tokens {cost:.2f}" for tokens, cost in self.round_costs.items())
        early = "" if len(self.tried) == self.measurements else f" Stopped after {len(self.tried)}."
        table.caption = (
            f"On training prompts, {charged}. A plain token takes {self.plain_ms:.2f} ms, and a round {costs} times "
            f"that.{early}"
        )
        return table


def play(
    session: Session, world: RealWorld, measurements: int, report: Callable[[str], None]
) -> list[tuple[int, Readings]]:
    """Let a method tune a real pair.

    Args:
        session: of the method, for `world` alone.
        world: the pair.
        measurements: at most.
        report: called before each measurement with what is being done.

    Returns:
        The settings that were measured, and what they gave, in order.
    """
    taken: list[tuple[int, Readings]] = []
    while len(taken) < measurements:
        settings = session.propose()
        if session.stopped[0]:
            break
        report(f"{world.workload}: measurement {len(taken) + 1} of {measurements} at most")
        readings = world.measure(int(settings[0]))
        session.add(settings, readings)
        taken.append((int(settings[0]), readings))
    return taken


def recommend_exact(
    tuner: Tuner,
    world: RealWorld,
    measurements: int = MEASUREMENTS,
    report: Callable[[str], None] = lambda message: None,
) -> ExactRecommendation:
    """Tune a real pair with a learned policy, on its training prompts.

    What is recommended and was not among the settings measured is measured once more, so that nobody is told to use
    what does not pay.

    Args:
        tuner: the policy.
        world: the pair; its name can be loaded.
        measurements: settings to try at most before one is recommended, 1 to 8.
        report: called before each measurement with what is being done.

    Raises:
        SettingsError: `measurements` is out of range.
    """
    measurements = _measurements(measurements)
    session, closed_form = Learned(world, measurements, tuner), ClosedForm(world, measurements)
    taken = play(session, world, measurements, report)
    for setting, readings in taken:
        closed_form.add(np.array([setting]), readings)
    chosen = int(session.recommend()[0])
    again = [readings for setting, readings in taken if setting == chosen]
    expected = None
    if knobs_of(chosen)["draft_length"]:
        report(f"{world.workload}: the setting to be recommended")
        expected = Trial.of(world, chosen, *(again or [world.measure(chosen)]))
    pays = expected is not None and expected.speedup > 1
    profile = world.profile
    return ExactRecommendation(
        world.workload.name,
        world.engine,
        world.backend,
        1000 * profile.autoregressive_seconds,
        dict(zip(PROFILED, (float(world.facts.short_round[0]), float(world.facts.long_round[0])), strict=True)),
        measurements,
        [Trial.of(world, setting, readings) for setting, readings in taken],
        expected,
        knobs_of(int(closed_form.recommend()[0]), world.threshold),
        engine_arguments(world.engine, str(world.workload.pair), knobs_of(chosen if pays else 0, world.threshold)),
    )


def confirm_exact(
    workload: Workload,
    recommendation: ExactRecommendation,
    report: Callable[[str], None] = lambda message: None,
    **judging: Any,
) -> list[Row]:
    """Decode held-out prompts live: plainly, with the engine's defaults, by the closed form, and as recommended.

    Args:
        workload: that was tuned.
        recommendation: what came of it.
        report: called with what is being done.
        judging: further arguments of `judge_live`.
    """
    profile = profile_of(workload, None, replayed=False)
    usual = usual_setting(recommendation.engine, "stop_threshold" in recommendation.closed_form)
    longest = max(LONGEST, int(usual["draft_length"]))
    stop = ENGINE_SETTINGS[recommendation.engine].stop if "stop_threshold" in usual else "never"
    decoder = SpeculativeDecoder(workload.load(), longest, stop=stop)
    company = [
        Contender(DEFAULT, decoder, usual),
        _contender(CLOSED_FORM, decoder, recommendation.closed_form),
        _contender(LEARNED, decoder, recommendation.knobs),
    ]
    return judge_live(workload, company, profile, SPEED, report=report, **judging)


def usual_setting(engine: str, threshold: bool) -> dict[str, float]:
    """Return an engine's own setting, for drafts that a threshold may end or for others.

    Engines have no default for drafts that are copied from the prompt; their documentation takes some 5 tokens.
    """
    has_threshold = ENGINE_SETTINGS[engine].stop != "never"
    return dict(ENGINE_SETTINGS[engine].defaults) if threshold or not has_threshold else {"draft_length": _USUAL_LENGTH}


def recommend_for_pair(
    tuner: Tuner,
    pair: str,
    prompts: str,
    temperature: float,
    engine: str,
    measurements: int | None = None,
    live: bool = False,
    out: Path | None = None,
    dtype: ModelType | None = None,
    device: str | None = None,
    max_prompt_tokens: int | None = None,
) -> None:
    """Tune a pair with a policy, print what to use and how the engine is told, and store it.

    Args:
        tuner: the policy.
        pair: as `load_pair` takes it.
        prompts: as `load_prompts` takes it.
        temperature: of sampling; 0 for greedy decoding.
        engine: that is served with.
        measurements: at most; `MEASUREMENTS` by default.
        live: measure by decoding even where the pair has a shipped trace, and confirm on held-out prompts.
        out: folder of the result; by default one named after the workload, in `FOLDER`.
        dtype: of the pair's weights; by default as for `load_pair`.
        device: of the pair; likewise.
        max_prompt_tokens: tokens of a prompt, at most; by default whole prompts.

    Raises:
        SettingsError: the pair has no draft, or `measurements` is out of range.
        OSError: the result cannot be written. Loading errors as for `load_pair` and `load_prompts`.
    """
    quieten()
    workload = workload_of(pair, prompts, temperature)
    if resolve(str(workload.pair)).draft is None:
        raise SettingsError(f"the pair {pair} has no draft whose settings could be recommended; give target+draft")
    if live:
        require_text_quality([workload])
    placed = RunSettings((workload.name,), dtype=dtype, device=device, max_prompt_tokens=max_prompt_tokens)
    folder = out or FOLDER / file_name(workload.name)
    # What can be refused is refused before anything is loaded and timed.
    workload.prompt_set()
    allowed = MEASUREMENTS if measurements is None else _measurements(measurements)
    require_writable(folder)
    with on_machine(placed), console.status(f"Tuning {workload}") as status:
        world = real_world(workload, engine, live)
        recommendation = recommend_exact(tuner, world, allowed, status.update)
        recommendation.save(folder / "recommendation.json", this_command())
        console.print(recommendation.render())
        if live:
            rows = confirm_exact(workload, recommendation, status.update)
            columns, caption = live_columns(rows)
            table = ResultTable(rows, columns, caption=caption, notes=scored_texts(rows))
            console.print(table.render(f"Held-out prompts of {workload}, decoded live"))
            console.print(live_verdict(rows, "settings"), highlight=False)
    console.print(recommendation.advice, highlight=False, soft_wrap=True)
    console.print(recommendation.arguments, highlight=False, soft_wrap=True, markup=False)
    console.print(f"Stored in {folder / 'recommendation.json'}.", highlight=False, soft_wrap=True)


def _measurements(number: int) -> int:
    return whole_number("measurements", number, at_most=MOST_MEASUREMENTS, error=SettingsError)


def _contender(method: str, decoder: SpeculativeDecoder, knobs: Mapping[str, float] | None) -> Contender:
    """A method's setting, or plain decoding where it says not to speculate."""
    if knobs is None or not knobs["draft_length"]:
        return Contender(method, None, rule="do not speculate")
    return Contender(method, decoder, knobs)
