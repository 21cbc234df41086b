"""Thresholds for a pair that the tuner never saw: a few measurements, a recommendation, and what to expect of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from rich import box
from rich.table import Table

from specgym.decoding import build_decoder, write_json
from specgym.envs import (
    ObserveContext,
    Trace,
    TraceError,
    TuningEnv,
    Workload,
    profile_of,
    require_replayable,
    trace_in,
    workload,
)

from ..evaluation.live import judge_live
from ..evaluation.measurements import Measurement
from ..evaluation.results import Row
from ..experiments.learned_tuner import LearnedTuner
from ..experiments.tune_unseen_settings import TunerSettings
from ..training.settings_io import SettingsError
from .knob_policy import ExportedPolicy

FORMAT = "specgym-recommendation-1"
SHOWN = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")


@dataclass(frozen=True)
class Recommendation:
    """What a tuner recommends for a workload.

    Attributes:
        workload: its name.
        backend: what the measurements were taken with, ``live`` or ``replay``.
        tried: the measurements, in order.
        knobs: the recommended thresholds.
        expected: one more measurement, of the recommended thresholds.
    """

    workload: str
    backend: str
    tried: list[Measurement]
    knobs: dict[str, float]
    expected: Measurement

    def save(self, path: Path, command: str) -> None:
        """Write it as JSON, atomically."""
        write_json(
            path,
            {
                "format": FORMAT,
                "command": command,
                "workload": self.workload,
                "backend": self.backend,
                "tried": [vars(measurement) for measurement in self.tried],
                "recommended": self.knobs,
                "expected": vars(self.expected),
            },
        )


def workload_of(pair: str, prompts: str, temperature: float) -> Workload:
    """The workload of a pair. Errors as for `workload`."""
    return workload(f"{pair}/{prompts}" + (f"@{temperature}" if temperature else ""))


def recommend(
    settings: TunerSettings,
    policy: ExportedPolicy,
    found: Workload,
    measurements: int,
    live: bool = False,
    tell: Callable[[str], None] = lambda message: None,
) -> Recommendation:
    """Tune a workload with a learned policy, on its training prompts.

    Args:
        settings: of the run that the policy was learned in.
        policy: it.
        found: what to tune.
        measurements: settings to try before recommending one; 0 for none.
        live: run the models even where a trace ships.
        tell: called before each measurement with what is being done.

    Raises:
        RunFileError: the policy has not learned to tune.
        SettingsError: `measurements` is negative. Loading errors as for `TuningEnv`.
    """
    if measurements < 0:
        raise SettingsError(f"measurements must be at least 0, got {measurements}")
    tuner = LearnedTuner(policy)
    trace = None if live else _trace(settings, found)
    inner = TuningEnv(
        workload=found,
        max_new_tokens=settings.max_new_tokens,
        prompts_per_step=settings.prompts_per_measurement,
        reward=settings.reward,
        start="default",
        action="place",
        split="train",
        backend="live" if trace is None else "replay",
        max_draft_length=settings.max_draft_length,
        recording=trace,
    )
    env: gymnasium.Env[Any, Any] = ObserveContext(inner, tuner.layout.history)
    observation, _ = env.reset(seed=settings.seed)
    tried: list[Measurement] = []
    for number in range(measurements + 1):
        tell(f"{found}: measurement {number + 1} of {measurements + 1}")
        observation, reward, _, _, info = env.step(policy(observation))
        knobs = {knob.name: float(info[f"knobs/{knob.name}"]) for knob in inner.knobs}
        tried.append(Measurement(knobs, {name: float(info[name]) for name in SHOWN}, float(reward)))
    # What the policy would try next is what it recommends; so the last measurement is of the recommended setting.
    backend = "live" if trace is None else "replay"
    return Recommendation(found.name, backend, tried[:-1], tried[-1].knobs, tried[-1])


def confirm(settings: TunerSettings, found: Workload, knobs: dict[str, float], folder: Path) -> list[Row]:
    """Decode held-out prompts live, plainly, with the decoder's defaults and as recommended.

    Args:
        settings: of the run.
        found: the workload.
        knobs: as recommended.
        folder: where the latency profile is kept.

    Returns:
        The rows of `judge_live`, where the method ``learned`` is what was recommended.
    """
    profile = profile_of(found, None, replayed=False)
    profile.save(folder / "latency.json")
    decoder = build_decoder("threshold", found.load(), max_draft_length=settings.max_draft_length)
    return judge_live(found, decoder, knobs, profile, settings.reward, max_new_tokens=settings.max_new_tokens)


def rendered(found: Recommendation) -> Table:
    """The measurements, and what is recommended, as a rich table."""
    table = Table(title=f"{found.workload} ({found.backend})", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measurement")
    names = list(found.knobs)
    for heading in (*names, "speedup", "ms/token", "acceptance\nrate", "tokens\n/round", "divergence", "reward"):
        table.add_column(heading, justify="right")
    rows = [*((str(number), trial) for number, trial in enumerate(found.tried, 1)), ("recommended", found.expected)]
    for label, trial in rows:
        table.add_row(
            label,
            *(f"{trial.knobs[name]:.3g}" for name in names),
            f"{trial.values['speedup']:.2f}",
            f"{trial.values['ms_per_token']:.2f}",
            f"{trial.values['draft_acceptance_rate']:.3f}",
            f"{trial.values['mean_acceptance_length']:.2f}",
            f"{trial.values['divergence']:.3f}",
            f"{trial.reward:.2f}",
            style="bold" if label == "recommended" else None,
        )
    table.caption = "On training prompts, charged by the latency profile. The last line is what to expect."
    return table


def _trace(settings: TunerSettings, found: Workload) -> Trace | None:
    """The trace of the workload's training prompts, if there is one that holds what the run's measurements need."""
    try:
        trace = trace_in(settings.recordings, found.name, "train")
        require_replayable(trace, "threshold", settings.max_new_tokens, settings.max_draft_length)
    except TraceError:
        return None
    return trace
