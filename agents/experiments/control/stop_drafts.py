"""Experiment: learn when to stop a draft by replay, while the price of time follows the throughput that it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from specgym.decoding import (
    LatencyProfile,
    ModelDrafter,
    ModelShape,
    Pair,
    Split,
    measure,
    measured,
    roofline,
)
from specgym.envs import DraftLengthVectorEnv, DraftTable, Trace, trace_in, workload

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
from ..experiment import PolicyChoice
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

    @property
    def timing(self) -> str:
        """Words on how profiles are made: measured, or computed for some hardware."""
        hardware = self.settings.hardware
        return f"computed for {hardware}" if hardware else super().timing

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
        rows = compare(settings, self.rules(), profiles, self.traces("train"), self.traces("test"), report)
        return self.result_table(
            rows,
            TABLE,
            verdict=stop_verdict(rows),
            caption=CAPTION,
            charged={name: profile.hardware for name, profile in zip(settings.workloads, profiles, strict=True)},
            protocol={
                "chosen": "fixed lengths and thresholds on the training prompts, by throughput; the bandit decoded "
                "those once before; the oracle knows what will be accepted",
            },
        )

    def judge_live(self, workloads: Sequence[str], report: Callable[[str], None]) -> ResultTable:
        """Decode the test prompts of some workloads live; see `ControlExperiment`."""
        kept = dict(zip(self.settings.workloads, self.profiles, strict=True))
        learned, rows = self.rules()[0], []
        for name in workloads:
            train, test = (trace_in(self.settings.recordings, name, split) for split in ("train", "test"))
            profile = kept[name] if name in kept else self.new_profile(name)
            rows += compare_live(self.settings, name, learned, profile, train, test, report)
        return ResultTable(rows, *AGREEMENT, verdict=live_agreement(rows), caption=LIVE_CAPTION, hardware=machine())

    def new_profile(self, name: str, refresh: bool = False) -> LatencyProfile:
        """Latency profile of a workload at all of the run's batch sizes; see `ControlExperiment`."""
        settings, pair = self.settings, workload(name).load()
        if settings.hardware is not None:
            return _computed(settings, pair)
        if settings.batch_sizes == (1,):
            return measured(pair, refresh=refresh, sampling=workload(name).sampling)
        return measure(
            pair,
            max_draft_length=settings.max_draft_length,
            sampling=workload(name).sampling,
            batch_sizes=settings.batch_sizes,
        )

    def describe(self, profile: LatencyProfile) -> str:
        """Say what a drafted token costs."""
        return f"one more drafted token costs {profile.marginal_cost():.2f} of that"


def _computed(settings: StopSettings, pair: Pair) -> LatencyProfile:
    assert settings.hardware is not None
    draft = ModelShape.of(pair.draft.model.model, name="draft") if isinstance(pair.draft, ModelDrafter) else None
    return roofline(
        ModelShape.of(pair.target.model, name="target"),
        draft,
        settings.hardware,
        max_draft_length=settings.max_draft_length,
        batch_sizes=settings.batch_sizes,
        contexts=(_ROOFLINE_CONTEXT,),
        pair=pair.name,
    )
