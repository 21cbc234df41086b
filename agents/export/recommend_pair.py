"""Recommended settings for a pair that the tuner never saw: a few measurements, and what to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
from rich import box
from rich.table import Table

from specgym.decoding import build_decoder, whole_number, write_json
from specgym.envs import ObserveContext, TraceError, TuningEnv, Workload, profile_of, replay_backend, workload

from ..evaluation.contenders import contenders
from ..evaluation.live import judge_live
from ..evaluation.replayed import Measurement, split_options
from ..evaluation.results import Row
from ..experiments.learned_tuner import LearnedTuner
from ..experiments.tune_unseen_settings import MOST_MEASUREMENTS, TunerSettings
from ..training.settings_io import SettingsError
from .knob_policy import ExportedPolicy

FORMAT = "specgym-recommendation-1"
SHOWN = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
_FORMS = (".2f", ".2f", ".3f", ".2f", ".3f")


@dataclass(frozen=True)
class Recommendation:
    """The recommended setting of a workload, and the measurements before.

    Attributes:
        workload: its name.
        backend: what the measurements were taken with, ``live`` or ``replay``.
        tried: the measurements, in order.
        knobs: the recommended setting.
        expected: one more measurement, of the recommended setting.
    """

    workload: str
    backend: str
    tried: list[Measurement]
    knobs: dict[str, float]
    expected: Measurement

    @property
    def advice(self) -> str:
        """Advice not to speculate, where even the recommended setting does not pay; else empty."""
        speedup = self.expected.values["speedup"]
        if speedup > 1:
            return ""
        return (
            f"Do not speculate on {self.workload}: what would be recommended decodes at {speedup:.2f} times the speed "
            "of plain decoding, by the latency profile that charged it."
        )

    def save(self, path: Path, command: str) -> None:
        """Write it as JSON, atomically; the recommended setting is null where the advice is not to speculate."""
        write_json(
            path,
            {
                "format": FORMAT,
                "command": command,
                "workload": self.workload,
                "backend": self.backend,
                "tried": [vars(measurement) for measurement in self.tried],
                "recommended": None if self.advice else self.knobs,
                "advice": self.advice,
                "expected": vars(self.expected),
            },
        )

    def render(self) -> Table:
        """The measurements, and what is recommended, as a rich table."""
        table = Table(title=f"{self.workload} ({self.backend})", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("measurement")
        headings = ("speedup", "ms/token", "acceptance\nrate", "tokens\n/round", "divergence", "reward")
        for heading in (*(name.replace("_", "_\n") for name in self.knobs), *headings):
            table.add_column(heading, justify="right")
        rows = [*((str(number), trial) for number, trial in enumerate(self.tried, 1)), ("recommended", self.expected)]
        for label, trial in rows:
            table.add_row(
                label,
                *(f"{trial.knobs[name]:.3g}" for name in self.knobs),
                *(format(trial.values[name], form) for name, form in zip(SHOWN, _FORMS, strict=True)),
                f"{trial.reward:.2f}",
                style="bold" if label == "recommended" else None,
            )
        caption = "On training prompts, charged by the latency profile. The last line is what to expect."
        table.caption = f"{caption} {self.advice}".strip()
        return table


def workload_of(pair: str, prompts: str, temperature: float) -> Workload:
    """The workload of a pair. Errors as for `workload`."""
    return workload(f"{pair}/{prompts}" + (f"@{temperature}" if temperature else ""))


def recommend_pair(
    settings: TunerSettings,
    policy: ExportedPolicy,
    workload: Workload,
    measurements: int | None = None,
    live: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Recommendation:
    """Tune a workload with a learned policy, on its training prompts.

    Args:
        settings: of the run that the policy was learned in.
        policy: the learned policy.
        workload: what to tune.
        measurements: settings to try before recommending one; 0 for none, by default as many as the tuner has learned
            with.
        live: run the models even where a recording ships.
        report: called before each measurement with what is being done.

    Raises:
        RunFileError: the policy has not learned to tune.
        SettingsError: `measurements` is negative. Loading errors as for `TuningEnv`.
    """
    if measurements is None:
        measurements = settings.measurements
    measurements = whole_number(
        "measurements", measurements, at_least=0, at_most=MOST_MEASUREMENTS, error=SettingsError
    )
    tuner = LearnedTuner(policy)
    replayed = not live and _replays(settings, workload)
    inner = TuningEnv(
        decoder=settings.decoder,
        workload=workload,
        max_new_tokens=settings.max_new_tokens,
        prompts_per_step=settings.prompts_per_measurement,
        reward=settings.bounded_reward,
        start="default",
        action="place",
        split="train",
        backend="replay" if replayed else "live",
        recording=settings.recording(workload.name, "train") if replayed else None,
        **split_options(settings.options, "decoder_options"),
    )
    env: gymnasium.Env[Any, Any] = ObserveContext(inner, tuner.layout.history)
    observation, _ = env.reset(seed=settings.seed)
    tried: list[Measurement] = []
    for number in range(measurements + 1):
        report(f"{workload}: measurement {number + 1} of {measurements + 1}")
        observation, reward, _, _, info = env.step(policy(observation))
        knobs = {knob.name: float(info[f"knobs/{knob.name}"]) for knob in inner.knobs}
        tried.append(Measurement(knobs, {name: float(info[name]) for name in SHOWN}, float(reward)))
    # What the policy would try next is what it recommends; so the last measurement is of the recommended setting.
    backend = "replay" if replayed else "live"
    return Recommendation(workload.name, backend, tried[:-1], tried[-1].knobs, tried[-1])


def confirm(settings: TunerSettings, workload: Workload, knobs: dict[str, float], folder: Path) -> list[Row]:
    """Decode held-out prompts live, plainly, with the decoder's defaults and as recommended.

    Args:
        settings: of the run.
        workload: what was tuned.
        knobs: as recommended.
        folder: where the latency profile is kept.

    Returns:
        The rows of `judge_live`, where the method ``learned`` is what was recommended.
    """
    decoder = build_decoder(settings.decoder, workload.load(), **settings.options)
    profile = profile_of(workload, None, replayed=False, decoder=decoder)
    profile.save(folder / "latency.json")
    company = contenders(decoder, knobs)
    return judge_live(workload, company, profile, settings.bounded_reward, max_new_tokens=settings.max_new_tokens)


def _replays(settings: TunerSettings, workload: Workload) -> bool:
    """True where a recording of the workload's training prompts holds what the run's measurements need."""
    try:
        replay_backend(
            settings.decoder,
            workload.with_split("train"),
            settings.recording(workload.name, "train"),
            split="train",
            max_new_tokens=settings.max_new_tokens,
            **split_options(settings.options, "options"),
        )
    except TraceError:
        return False
    return True
