"""``train.py --engine``: tune an engine that one serves with, judge the setting on held-out prompts, tell it."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

from specgym.decoding import (
    LOOKUP,
    Engine,
    EngineError,
    PromptSet,
    SpecgymError,
    interruption_code,
    load_prompts,
    open_engine,
    remove_leftovers,
    write_json,
    write_sealed,
)
from specgym.envs import EngineBackend

from ..evaluation.contenders import CLOSED_FORM, DEFAULT, ONE_FOR_ALL
from ..evaluation.results import RECOMMENDED, ResultTable
from ..report.content import Report, versions
from ..report.page import write_report
from ..training.ppo import TrainingInterruptedError, way_on
from ..training.run_folder import RunFolder, console, quieten, read_json, this_command
from ..training.settings_io import SETTINGS_FORMAT, SettingsError, to_json
from .judge import CAPTION, Setting, judge, pays, tried_table, verdict
from .practice import check_recorded
from .search import Candidate, EngineSearch, candidates_of
from .settings import EXPERIMENT, EngineSettings, load_engine_settings
from .trials import Journal, Measuring, Speeds, Trial

FORMAT: Final = "specgym-engine-recommendation-1"
ONE_LENGTH: Final = 4
"""Draft length of the single setting for all engines and drafts that others are compared with."""


def tune_engine(settings: EngineSettings, resume: Path | None = None) -> Path:
    """Tune an engine, and write ``settings.json``, ``measurements.json``, ``table.json`` and ``recommendation.json``.

    Args:
        settings: what to tune; ignored when resuming.
        resume: folder of a run to go on with. What it has measured is not measured again.

    Returns:
        The folder of the run.

    Raises:
        SettingsError: the settings do not suit each other, or the folder is taken.
        EngineError: the engine cannot be started, has died or failed.
        TrainingInterruptedError: interrupted by the user.
    """
    quieten()
    if resume is not None:
        settings = load_engine_settings(resume)
    settings.check()
    check_recorded(settings.recorded)
    sets = [load_prompts(name) for name in settings.prompts]
    if not settings.name:
        settings = replace(settings, name=time.strftime(f"{settings.engine}-%Y%m%d-%H%M%S"))
    folder = settings.folder
    with ExitStack() as stack:
        engines = _opened(settings, stack)
        if resume is None:
            _begin(settings)
        remove_leftovers(folder)
        journal = Journal.at(folder / "measurements.json")
        _warn_if_busy()
        if journal.trials:
            console.print(f"Going on after {len(journal.trials)} measurements.")
        try:
            _tune(settings, engines, sets, journal)
        except KeyboardInterrupt as interruption:
            message = f"interrupted after {len(journal.trials)} measurements. {way_on(folder)}"
            raise TrainingInterruptedError(message, interruption_code(interruption)) from None
        except SpecgymError:
            if resume is None and not any(trial.texts for trial in journal.trials):
                for path in (RunFolder(folder).settings, journal.path):  # so that the command can be given again
                    path.unlink(missing_ok=True)
            raise
    return folder


def judge_again(folder: Path) -> None:
    """Decode the held-out prompts of a run once more, and print the table. Errors as for `tune_engine`."""
    quieten()
    settings = load_engine_settings(folder)
    stored = ResultTable.load(folder / "table.json", f"go on with: python train.py --resume {folder}")
    content = read_json(folder / "recommendation.json", f"go on with: python train.py --resume {folder}")
    judged = {name: Setting(**setting) for name, setting in content["judged"].items()}
    sets = [load_prompts(name) for name in settings.prompts]
    with ExitStack() as stack:
        engines = _opened(settings, stack)
        with _measuring(settings, engines, sets, Journal(folder / "judged-again.json"), "test") as measuring:
            table = judge(measuring, judged, settings.judged_prompts, settings.temperature == 0)
    table = replace(table, verdict=verdict(table))
    table.save(folder / "evaluation.json", this_command())
    console.print(table.render(f"Held-out prompts of {folder}, once more"))
    console.print(table.verdict, highlight=False)
    console.print(f"Before: {stored.verdict}", highlight=False)


def report_engine(folder: Path) -> Path:
    """Write the report of a run that tuned an engine, one page with its table, and return its path.

    Raises:
        RunFileError: the run is not finished, or a file of it is damaged.
    """
    settings, way_out = load_engine_settings(folder), f"go on with: python train.py --resume {folder}"
    table = ResultTable.load(folder / "table.json", way_out)
    content = read_json(folder / "recommendation.json", way_out)
    report = Report(
        title=f"{settings.engine} tuned in {folder.resolve().name}",
        command=this_command(),
        created=time.strftime("%Y-%m-%d %H:%M %Z").strip(),
        summary=[table.verdict],
        settings=to_json(settings),
        versions={**versions(), str(content["engine"]): str(content["version"])},
        missing={},
        table=replace(table, caption=CAPTION),
        made_by={"the run": str(content["command"])},
    )
    path = write_report(report, folder)
    console.print(f"The report is in {path}.", soft_wrap=True)
    return path


def _warn_if_busy() -> None:
    """Say that others compute on this machine: whoever runs fewer passes then waits less, and looks faster."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores:
        console.print(
            f"This machine is busy (load {load:.1f} on {cores} cores). Speedups measured now are those of a machine "
            "that is busy; measure again on an idle one before you rely on them.",
            highlight=False,
            soft_wrap=True,
        )


def _opened(settings: EngineSettings, stack: ExitStack) -> dict[str, Engine]:
    """The engine with every draft, by the draft's name."""
    names = {draft: draft if draft == LOOKUP else Path(draft).stem for draft in settings.draft}
    if len(set(names.values())) < len(names):
        names = {draft: draft for draft in names}
    assert settings.engine is not None
    return {
        name: stack.enter_context(open_engine(settings.engine, settings.target, draft, settings.options))
        for draft, name in names.items()
    }


@contextmanager
def _measuring(
    settings: EngineSettings,
    engines: Mapping[str, Engine],
    sets: Sequence[PromptSet],
    journal: Journal,
    split: Literal["train", "test"],
) -> Iterator[Measuring]:
    """The engines at work on the prompts of a split, until the context is left."""
    backends: dict[str, EngineBackend] = {}
    with ExitStack() as stack, console.status("Starting") as status:
        for name, engine in engines.items():
            first = next(iter(backends.values()), None)
            backends[name] = EngineBackend(
                engine, sets, split, settings.tokens, settings.temperature, settings.seed, plain=first
            )
        for backend in backends.values():  # the first, whose plain engine the others use, is closed last
            stack.callback(backend.close)
        yield Measuring(backends, journal, settings.measured_prompts, settings.seed, status.update)


def _begin(settings: EngineSettings) -> None:
    folder = settings.folder
    if folder.exists() and (not folder.is_dir() or any(path.name != "engine.log" for path in folder.iterdir())):
        raise SettingsError(f"{folder} exists already; go on with --resume {folder}, or choose another --name")
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"experiment": EXPERIMENT, "command": this_command(), "settings": to_json(settings)}
    write_sealed(RunFolder(folder).settings, {"format": SETTINGS_FORMAT, **stored})


def _tune(settings: EngineSettings, engines: Mapping[str, Engine], sets: Sequence[PromptSet], journal: Journal) -> None:
    chosen: dict[str, Candidate | None] = {}
    ranked: dict[str, list[Candidate]] = {}
    with _measuring(settings, engines, sets, journal, "train") as measuring:
        searches = [
            EngineSearch(
                measuring,
                method,
                temperature=settings.temperature,
                measurements=settings.measurements,
                seconds=60 * settings.minutes,
                slower_sets=settings.slower_sets,
                seed=settings.seed,
                recorded=settings.recorded,
                tell=_tell,
            )
            for method in settings.methods
        ]
        for search in searches:
            chosen[search.method] = search.run()
            ranked[search.method] = candidates_of(search.trials)
            console.print(tried_table(ranked[search.method], [texts.name for texts in sets]))
    if not any(ranked.values()):
        failures = [trial.failed for trial in journal.trials if trial.failed]
        raise EngineError(f"nothing could be measured. {failures[0] if failures else 'Give it more --minutes'}")
    first = chosen[settings.methods[0]]
    judged = _judged(settings, engines, searches[0], chosen)
    console.print("Judging on held-out prompts.")
    with _measuring(settings, engines, sets, journal, "test") as measuring:
        table = judge(measuring, judged, settings.judged_prompts, settings.temperature == 0)
    notes = [note for search in searches for note in search.notes]
    if settings.temperature:
        notes += [
            f"Text sampled with {name} does not follow the target's distribution in {settings.engine}."
            for name, engine in engines.items()
            if not engine.lossless_when_sampling
        ]
    table = replace(table, verdict=verdict(table), notes=[*table.notes, *notes])
    folder = settings.folder
    table.save(folder / "table.json", this_command())
    engine = engines[judged[RECOMMENDED].draft]
    knobs = None if first is None or not pays(table) else first.knobs
    recommendation: dict[str, Any] = {
        "format": FORMAT,
        "command": this_command(),
        "engine": settings.engine,
        "version": engine.version(),
        "target": settings.target,
        "draft": engine.draft,
        "temperature": settings.temperature,
        "recommended": knobs,
        "draft_length": 0 if knobs is None else int(knobs[engine.length_knob]),
        "stop_threshold": 0.0 if knobs is None or engine.threshold_knob is None else knobs[engine.threshold_knob],
        "measurements": len(searches[0].trials),
        "seconds": sum(trial.seconds for trial in searches[0].trials),
        "advice": table.verdict,
        "tried": {
            method: [
                {
                    "draft": tried.draft,
                    "knobs": dict(tried.knobs),
                    "speedup": tried.speedup,
                    "interval": tried.interval,
                    "by_set": [float(speeds.speedup[0]) for speeds in tried.by_set],
                    "texts": tried.texts,
                }
                for tried in of_method
            ]
            for method, of_method in ranked.items()
        },
        "judged": {name: vars(setting) for name, setting in judged.items()},
    }
    write_json(folder / "recommendation.json", recommendation)
    console.print(table.render(f"Held-out prompts, {settings.engine} {engine.version()}, {Path(settings.target).name}"))
    console.print(table.verdict, highlight=False, soft_wrap=True)
    console.print(
        f"Found with {len(searches[0].trials)} measurements in {recommendation['seconds']:.0f} s. Stored in {folder}; "
        f"how your engine is told: python evaluate.py {shlex.quote(str(folder))} --export {settings.engine}",
        highlight=False,
        soft_wrap=True,
    )


def _judged(
    settings: EngineSettings,
    engines: Mapping[str, Engine],
    search: EngineSearch,
    chosen: Mapping[str, Candidate | None],
) -> dict[str, Setting]:
    """Settings to decode held-out prompts with, by method."""
    recommended = chosen[settings.methods[0]]
    first = next(iter(engines))
    draft = first if recommended is None else recommended.draft
    judged = {
        DEFAULT if name == first else f"{DEFAULT}, {name}": Setting(name, engine.defaults)
        for name, engine in engines.items()
    }
    judged[ONE_FOR_ALL] = Setting(draft, engines[draft].setting(ONE_LENGTH))
    if search.closed_forms:
        name, (speedup, knobs) = max(search.closed_forms.items(), key=lambda item: item[1][0])
        judged[CLOSED_FORM] = Setting(name, knobs if speedup > 1 else None)
    for method, candidate in chosen.items():
        label = RECOMMENDED if method == settings.methods[0] else method
        judged[label] = Setting(draft, None) if candidate is None else Setting(candidate.draft, candidate.knobs)
    return judged


def _tell(trial: Trial) -> None:
    """Print a line on a measurement."""
    setting = ", ".join(f"{name}={value:g}" for name, value in (trial.knobs or {}).items())
    if not trial.texts:
        console.print(f"  {trial.draft}, {setting}: {trial.failed}", highlight=False, soft_wrap=True)
        return
    speeds = Speeds.of(trial.texts)
    console.print(
        f"  {trial.draft}, {setting}: {speeds.speedup[0]:.2f} times plain decoding's {speeds.plain[0]:.0f} tokens/s "
        f"({trial.why}, {trial.seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
