"""Experiment: learn when to stop a draft by replay, while the price of time follows the throughput that it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from specgym import __version__
from specgym.callbacks import RateCallback
from specgym.decoding import (
    LatencyProfile,
    ModelDrafter,
    ModelShape,
    Pair,
    Sampling,
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
from ...training.run_folder import RunFolder, console, on_machine, quieten, this_command
from ...training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from ..experiment import Experiment, Learner, PolicyChoice, load_settings
from .stop_drafts_settings import StopSettings
from .stop_policy import RoundEpisodes, StoppingPolicy

_ROOFLINE_CONTEXT = 512


class StopDrafts(Experiment[StopSettings]):
    """Learning when to stop a draft, one policy a seed."""

    FIGURES = "throughputs"

    @classmethod
    def check(cls, settings: StopSettings) -> None:
        """Raise an error unless every workload has its traces, with texts and drafts that are long enough."""
        for name in settings.workloads:
            both = [trace_in(settings.recordings, name, split) for split in ("train", "test")]
            DraftTable(both, settings.max_draft_length, settings.max_new_tokens)

    def prepare(self) -> None:
        """Keep a latency profile for every workload; loads the pairs of new ones."""
        kind = "measured once for this hardware, then cached"
        if self.settings.hardware:
            kind = f"computed for {self.settings.hardware}"
        console.print(f"Latency profiles ({kind}):")
        # Workloads that share a pair share its profile, or noise would tell them apart.
        profiles: dict[tuple[str, Sampling], LatencyProfile] = {}

        def profile(name: str) -> LatencyProfile:
            key = str(workload(name).pair), workload(name).sampling
            if key not in profiles:
                profiles[key] = self.new_profile(name, refresh=self.settings.refresh_latency)
            return profiles[key]

        self.run.keep_profiles(
            self.settings.workloads,
            profile,
            lambda latency: f"one more drafted token costs {latency.marginal_cost():.2f} of that",
        )

    @property
    def profiles(self) -> list[LatencyProfile]:
        """The latency profile of every workload, as it is kept."""
        return [LatencyProfile.load(path) for path in self.run.profile_paths(self.settings.workloads)]

    def traces(self, split: Split) -> list[Trace]:
        """The trace of every workload's prompts."""
        return [trace_in(self.settings.recordings, name, split) for name in self.settings.workloads]

    def learners(self) -> Sequence[Learner]:
        """A policy for each seed."""
        return [Learner(seed, self.run.learned(f"seed-{seed}")) for seed in self.settings.seeds]

    def environments(self, learner: Learner) -> VecEnv:
        """Recorded texts side by side, each round an episode."""
        settings = self.settings
        env = DraftLengthVectorEnv(
            settings.environments,
            workload=settings.workloads,
            recording=self.traces("train"),
            profile=self.profiles,
            max_draft_length=settings.max_draft_length,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_sizes,
            decision_seconds=settings.decision_seconds,
        )
        return FiniteGuard(RoundEpisodes(VectorEnvAdaptor(env)))

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A small network that decides after every drafted token."""
        learning = self.settings.learning
        widths = {"pi": list(learning.policy_layers), "vf": list(learning.value_layers)}
        return PolicyChoice(StoppingPolicy, {"net_arch": widths})

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The price of time, which follows the throughput."""
        return [RateCallback(self.settings.learning.rate_smoothing)]

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
        return ResultTable(
            rows,
            *TABLE,
            verdict=stop_verdict(rows),
            caption=CAPTION,
            hardware={
                "charged": {name: result.hardware for name, result in zip(settings.workloads, profiles, strict=True)},
                "replayed on": {
                    **machine(),
                    "numpy": np.__version__,
                    "torch": torch.__version__,
                    "specgym": __version__,
                },
            },
            protocol={
                "throughput": "all tokens over all seconds, relative to plain decoding, by replay of all test prompts",
                "chosen": "fixed lengths and thresholds on the training prompts, by throughput; the bandit decoded "
                "those once before; the oracle knows what will be accepted",
                "tokens": settings.max_new_tokens,
                "passes": f"1 where greedy, {settings.comparison.passes} where sampled",
                "seeds": list(settings.seeds),
                "intervals": f"95 %, bootstrap with {settings.comparison.resamples} resamples over prompts, and for "
                "learned policies over seeds",
            },
        )

    def judge_live(self, workloads: Sequence[str], report: Callable[[str], None]) -> ResultTable:
        """Decode the test prompts of some workloads live, by the clock too, beside their replay.

        Args:
            workloads: names; with the policy of the first seed.
            report: called with what is being done.

        Raises:
            WorkloadError, TraceError: a workload is not known, or has no trace. Loading errors as for `load_pair`.
        """
        kept = dict(zip(self.settings.workloads, self.profiles, strict=True))
        learned, rows = self.rules()[0], []
        for name in workloads:
            train, test = (trace_in(self.settings.recordings, name, split) for split in ("train", "test"))
            profile = kept[name] if name in kept else self.new_profile(name)
            rows += compare_live(self.settings, name, learned, profile, train, test, report)
        return ResultTable(rows, *AGREEMENT, verdict=live_agreement(rows), caption=LIVE_CAPTION, hardware=machine())

    def hints(self) -> Sequence[str]:
        """Hints: how to compare with live decoding."""
        return (f"Live: python evaluate.py {self.run.path} --live {self.settings.workloads[0]}.",)

    def new_profile(self, name: str, refresh: bool = False) -> LatencyProfile:
        """Latency profile of a workload at all of the run's batch sizes.

        Args:
            name: of the workload.
            refresh: measure it now, even if the cache has it.
        """
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


def evaluate_live(folder: Path, workloads: Sequence[str]) -> None:
    """Judge a run by live decoding, print the table, and write it to ``live.json``.

    Args:
        folder: of a finished run.
        workloads: names.

    Raises:
        RunFileError: the folder is not that of a finished run, or a file in it is damaged. Others as for
            `StopDrafts.judge_live`.
    """
    quieten()
    run = RunFolder.existing(folder)
    experiment = StopDrafts(load_settings(run.settings), run)
    with on_machine(experiment.settings), console.status("Decoding test prompts live") as status:
        table = experiment.judge_live(workloads, status.update)
    table.save(run.path / "live.json", this_command())
    seed = experiment.settings.seeds[0]
    console.print(table.render(f"Test prompts, {run.path}, the policy of seed {seed}"))
    console.print(table.verdict, highlight=False)
    console.print(f"The table is in {run.path / 'live.json'}.", soft_wrap=True)
