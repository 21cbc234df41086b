"""Experiment: learn which of several drafts proposes the next token, and when the target verifies, by replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from specgym.decoding import MixedProfile, Split, measured_mixed
from specgym.envs import ChoiceTable, DraftChoiceVectorEnv, MixedTrace, mixed_trace_in, workload

from ...evaluation.control.choice_comparison import (
    CAPTION,
    TABLE,
    TUNING_PASSES,
    choice_verdict,
    compare_choices,
    compare_live,
    mixed_prompts,
)
from ...evaluation.control.choice_tuning import MixedPrompts
from ...evaluation.control.stop_comparison import AGREEMENT, LIVE_CAPTION, live_agreement
from ...evaluation.results import ResultTable, machine
from ...export.choice_rule import ExportedChoiceRule
from ..experiment import PolicyChoice
from .choice_policy import ChoicePolicy
from .choose_drafts_settings import ChoiceSettings
from .control_experiment import ControlExperiment

_SPLITS: Final[tuple[Split, ...]] = ("train", "test")


class ChooseDrafts(ControlExperiment[ChoiceSettings, MixedProfile]):
    """Learning which draft proposes the next token, one policy a seed."""

    PROFILE = MixedProfile

    @classmethod
    def check(cls, settings: ChoiceSettings) -> None:
        """Raise an error unless every workload has its recordings, with texts and drafts that are long enough."""
        for split in _SPLITS:
            traces = [mixed_trace_in(settings.recordings, name, split) for name in settings.workloads]
            ChoiceTable(traces, settings.max_draft_length, settings.max_new_tokens)

    def traces(self, split: Split) -> list[MixedTrace]:
        """The recording of every workload's prompts."""
        return [mixed_trace_in(self.settings.recordings, name, split) for name in self.settings.workloads]

    def recorded(self) -> DraftChoiceVectorEnv:
        """Environment of the training prompts."""
        settings = self.settings
        return DraftChoiceVectorEnv(
            settings.environments,
            workload=settings.workloads,
            recording=self.traces("train"),
            profile=self.profiles,
            max_draft_length=settings.max_draft_length,
            max_new_tokens=settings.max_new_tokens,
            decision_seconds=settings.decision_seconds,
            missing_drafts=settings.missing_drafts,
        )

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A small network that scores every draft before every token."""
        return PolicyChoice(ChoicePolicy, {"net_arch": self.layers})

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy as a rule to decode with."""
        assert isinstance(model.policy, ChoicePolicy)
        ExportedChoiceRule.of(model.policy).save(folder)

    def rules(self) -> list[ExportedChoiceRule]:
        """The learned rule of every seed."""
        return [ExportedChoiceRule.load(learner.folder.path) for learner in self.learners()]

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Compare the learned policies with rules chosen on training prompts, on test prompts, by replay."""
        settings, profiles = self.settings, self.profiles
        train = self._prompts("train", TUNING_PASSES)
        test = self._prompts("test", settings.comparison.passes)
        rows, notes = compare_choices(settings, self.rules(), train, test, report)
        return self.result_table(
            rows,
            TABLE,
            verdict=choice_verdict(rows),
            caption=CAPTION,
            charged={name: profile.hardware for name, profile in zip(settings.workloads, profiles, strict=True)},
            protocol={
                "chosen": "single drafts, hybrids and the closed form's rate on the training prompts, by throughput; "
                "the bandit decoded those once before; the clairvoyant knows what will be accepted",
            },
            notes=notes,
        )

    def _prompts(self, split: Split, passes: int) -> list[MixedPrompts]:
        return [
            mixed_prompts(self.settings, trace, profile, passes)
            for trace, profile in zip(self.traces(split), self.profiles, strict=True)
        ]

    def judge_live(self, workloads: Sequence[str], report: Callable[[str], None]) -> ResultTable:
        """Decode the test prompts of some workloads live; see `ControlExperiment`."""
        kept = dict(zip(self.settings.workloads, self.profiles, strict=True))
        learned, rows = self.rules()[0], []
        for name in workloads:
            train, test = (mixed_trace_in(self.settings.recordings, name, split) for split in ("train", "test"))
            profile = kept[name] if name in kept else self.new_profile(name)
            rows += compare_live(self.settings, name, learned, profile, train, test, report)
        return ResultTable(rows, *AGREEMENT, verdict=live_agreement(rows), caption=LIVE_CAPTION, hardware=machine())

    def new_profile(self, name: str, refresh: bool = False) -> MixedProfile:
        """Latency profile of a workload's pair, measured on this machine; see `ControlExperiment`."""
        return measured_mixed(workload(name).load(), refresh, sampling=workload(name).sampling)

    def describe(self, profile: MixedProfile) -> str:
        """Say what a token of each draft costs."""
        plain = profile.autoregressive_seconds
        costs = ", ".join(f"{draft.name} {draft.reading(1) / plain:.3f}" for draft in profile.drafts)
        return f"a token of each draft costs of that: {costs}"
