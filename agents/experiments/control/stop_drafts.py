"""Experiment: learn when to stop a draft by replay, while the price of time follows the throughput that it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from specgym.decoding import (
    MODEL_SHAPES,
    LatencyProfile,
    ModelDrafter,
    ModelShape,
    Split,
    measure,
    measured,
    roofline,
)
from specgym.envs import DraftLengthVectorEnv, DraftTable, Trace, profile_of, trace_in, workload

from ...evaluation.control import overlapping_comparison as overlapping
from ...evaluation.control.stop_comparison import (
    AGREEMENT,
    CAPTION,
    LIVE_CAPTION,
    TABLE,
    compare,
    compare_live,
    live_agreement,
    stop_verdict,
)
from ...evaluation.results import ResultTable, machine
from ...export.stop_rule import ExportedStopRule
from ...training.run_folder import RunFolder
from ...training.settings_io import SettingsError
from ..experiment import PolicyChoice, load_settings
from .control_experiment import ControlExperiment
from .stop_drafts_settings import StopSettings
from .stop_policy import StoppingPolicy

_ROOFLINE_CONTEXT = 512


class StopDrafts(ControlExperiment[StopSettings, LatencyProfile]):
    """Learning when to stop a draft, one policy a seed."""

    PROFILE = LatencyProfile

    @classmethod
    def check(cls, settings: StopSettings) -> None:
        """Raise an error unless every workload has its traces, with texts and drafts that are long enough."""
        for name in settings.workloads:
            both = [trace_in(settings.recordings, name, split) for split in ("train", "test")]
            DraftTable(both, settings.max_draft_length, settings.max_new_tokens)
        if settings.in_turns is not None:
            _in_turns(settings)

    @property
    def timing(self) -> str:
        """Words on how profiles are made: measured, or computed for some hardware."""
        settings = self.settings
        if settings.hardware:
            of = f" and the shapes of {' and '.join(settings.shapes)}" if settings.shapes else ""
            return f"computed for {settings.hardware}{of}"
        return "those that ship, or measured here" if settings.shipped_latency else super().timing

    def traces(self, split: Split) -> list[Trace]:
        """The trace of every workload's prompts."""
        return [trace_in(self.settings.recordings, name, split) for name in self.settings.workloads]

    def recorded(self) -> DraftLengthVectorEnv:
        """Environment of the training prompts, at every batch size."""
        settings = self.settings
        return DraftLengthVectorEnv(
            settings.environments,
            workload=settings.workloads,
            recording=self.traces("train"),
            profile=self.profiles,
            max_draft_length=settings.max_draft_length,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_sizes,
            decision_seconds=settings.decision_seconds,
            decoder=settings.overlap,
            pre_verify=settings.begins_by,
        )

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A small network that decides after every drafted token."""
        return PolicyChoice(StoppingPolicy, {"net_arch": self.layers})

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy as a rule to decode with."""
        assert isinstance(model.policy, StoppingPolicy)
        ExportedStopRule.of(model.policy).save(folder)

    def rules(self) -> list[ExportedStopRule]:
        """The learned rule of every seed."""
        return [ExportedStopRule.load(learner.folder.path) for learner in self.learners()]

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Compare the learned policies with rules chosen on training prompts, on test prompts, by replay."""
        settings, profiles = self.settings, self.profiles
        compared = settings, self.rules(), profiles, self.traces("train"), self.traces("test")
        charged = {name: profile.hardware for name, profile in zip(settings.workloads, profiles, strict=True)}
        if settings.overlap is not None:
            turns = None if settings.in_turns is None else _in_turns(settings)
            rows = overlapping.compare_overlapping(*compared, turns, report)
            return self.result_table(
                rows,
                overlapping.table_of(rows),
                verdict=overlapping.overlapping_verdict(rows),
                caption=overlapping.CAPTION,
                charged=charged,
                protocol={"chosen": "windows, thresholds and pre_verify on the training prompts, by throughput"},
            )
        rows = compare(*compared, report)
        return self.result_table(
            rows,
            TABLE,
            verdict=stop_verdict(rows),
            caption=CAPTION,
            charged=charged,
            protocol={
                "chosen": "fixed lengths and thresholds on the training prompts, by throughput; the bandit decoded "
                "those once before; the oracle knows what will be accepted",
            },
        )

    def judge_live(self, workloads: Sequence[str], report: Callable[[str], None]) -> ResultTable:
        """Decode the test prompts of some workloads live; see `ControlExperiment`."""
        if self.settings.overlap is not None:
            raise SettingsError(
                f"the draft of decoder {self.settings.overlap} asks its rule itself, and is judged by replay alone; to "
                f"decode live give it the rule of {self.run.path / 'seed-0'} (ExportedStopRule.load) as stop=..."
            )
        kept = dict(zip(self.settings.workloads, self.profiles, strict=True))
        learned, rows = self.rules()[0], []
        for name in workloads:
            train, test = (trace_in(self.settings.recordings, name, split) for split in ("train", "test"))
            profile = kept[name] if name in kept else self.new_profile(name)
            rows += compare_live(self.settings, name, learned, profile, train, test, report)
        return ResultTable(rows, *AGREEMENT, verdict=live_agreement(rows), caption=LIVE_CAPTION, hardware=machine())

    def new_profile(self, name: str, refresh: bool = False) -> LatencyProfile:
        """Latency profile of a workload at all of the run's batch sizes; see `ControlExperiment`."""
        settings, named = self.settings, workload(name)
        if settings.hardware is not None:
            return _computed(settings, name)
        if settings.shipped_latency:
            return profile_of(named, None, replayed=True, decoder=settings.overlap)
        if settings.batch_sizes == (1,):
            return measured(named.load(), settings.overlap, refresh=refresh, sampling=named.sampling)
        return measure(
            named.load(),
            settings.overlap,
            max_draft_length=settings.max_draft_length,
            sampling=named.sampling,
            batch_sizes=settings.batch_sizes,
        )

    def describe(self, profile: LatencyProfile) -> str:
        """Say what a drafted token costs."""
        hidden = ", where the target does not hide it" if profile.overlaps else ""
        return f"one more drafted token costs {profile.marginal_cost():.2f} of that{hidden}"


def _computed(settings: StopSettings, name: str) -> LatencyProfile:
    assert settings.hardware is not None
    draft: ModelShape | None
    if settings.shapes is not None:
        target, draft = (MODEL_SHAPES[shape] for shape in settings.shapes)
        pair = None
    else:
        models = workload(name).load()
        target, pair = ModelShape.of(models.target.model, name="target"), models.name
        drafter = models.draft
        draft = ModelShape.of(drafter.model.model, name="draft") if isinstance(drafter, ModelDrafter) else None
    decoder: dict[str, Any] = {} if settings.overlap is None else {"decoder": settings.overlap}
    return roofline(
        target,
        draft,
        settings.hardware,
        max_draft_length=settings.max_draft_length,
        batch_sizes=settings.batch_sizes,
        contexts=(_ROOFLINE_CONTEXT,),
        pair=pair,
        **decoder,
    )


def _in_turns(settings: StopSettings) -> overlapping.InTurns:
    """Load the rules of the run in turns, and the profiles that it is charged by.

    Raises:
        SettingsError: it is no finished run in turns, or of other workloads or sizes.
    """
    assert settings.in_turns is not None
    run = RunFolder.existing(settings.in_turns)
    theirs = load_settings(run.settings)
    shared = ("workloads", "batch_sizes", "hardware", "shapes", "max_draft_length", "max_new_tokens")
    if not isinstance(theirs, StopSettings) or theirs.overlap is not None:
        raise SettingsError(f"in_turns: {run.path} is no run of {settings.option} without --overlap")
    if other := [name for name in shared if getattr(theirs, name) != getattr(settings, name)]:
        raise SettingsError(
            f"in_turns: {run.path} was learned with other {', '.join(other)}; start one with the options of this run"
        )
    experiment = StopDrafts(theirs, run)
    for learner in experiment.learners():
        learner.folder.require_complete()
    return overlapping.InTurns(experiment.rules(), experiment.profiles)
