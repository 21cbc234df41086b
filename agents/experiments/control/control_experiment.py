"""Protocol of experiments that learn to control drafts by replay, while time is priced at the throughput reached."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from specgym import __version__
from specgym.callbacks import RateCallback
from specgym.decoding import LatencyProfile, MixedProfile, Sampling
from specgym.envs import ControlVectorEnv, workload

from ...evaluation.results import Column, ResultTable, Row, machine
from ...training.run_folder import RunFolder, console, on_machine, quieten, this_command
from ...training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from ..experiment import Experiment, Learner, experiment_of, load_settings
from .control_settings import ControlSettings
from .stop_policy import RoundEpisodes

_C = TypeVar("_C", bound=ControlSettings)
_P = TypeVar("_P", LatencyProfile, MixedProfile)


class ControlExperiment(Experiment[_C], Generic[_C, _P]):
    """Learning to control drafts, one policy a seed.

    Attributes:
        PROFILE: kind of latency profile that time is charged by.
    """

    FIGURES = "throughputs"
    PROFILE: type[_P]

    def prepare(self) -> None:
        """Keep a latency profile for every workload; loads the pairs of new ones."""
        console.print(f"Latency profiles ({self.timing}):")
        # Workloads that share a pair share its profile, or noise would tell them apart.
        shared: dict[tuple[str, Sampling], _P] = {}

        def profile(name: str) -> _P:
            key = str(workload(name).pair), workload(name).sampling
            if key not in shared:
                shared[key] = self.new_profile(name, refresh=self.settings.refresh_latency)
            return shared[key]

        self.run.keep_profiles(self.settings.workloads, profile, self.describe, self.PROFILE.load)

    @property
    def profiles(self) -> list[_P]:
        """The latency profile of every workload, as it is kept."""
        return [self.PROFILE.load(path) for path in self.run.profile_paths(self.settings.workloads)]

    def learners(self) -> Sequence[Learner]:
        """A policy for each seed."""
        return [Learner(seed, self.run.learned(f"seed-{seed}")) for seed in self.settings.seeds]

    def environments(self, learner: Learner) -> VecEnv:
        """Recorded texts side by side, each round an episode."""
        return FiniteGuard(RoundEpisodes(VectorEnvAdaptor(self.recorded())))

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The price of time, which follows the throughput."""
        return [RateCallback(self.settings.learning.rate_smoothing)]

    def hints(self) -> Sequence[str]:
        """Hints: how to compare with live decoding."""
        return (f"Live: python evaluate.py {self.run.path} --live {self.settings.workloads[0]}.",)

    @property
    def timing(self) -> str:
        """Words on how profiles are made."""
        return "measured once for this hardware, then cached"

    @property
    def layers(self) -> dict[str, list[int]]:
        """Widths of the networks, as policies of Stable-Baselines3 take them."""
        learning = self.settings.learning
        return {"pi": list(learning.policy_layers), "vf": list(learning.value_layers)}

    @abstractmethod
    def new_profile(self, name: str, refresh: bool = False) -> _P:
        """Latency profile of a workload.

        Args:
            name: of the workload.
            refresh: measure it now, even if the cache has it.
        """

    @abstractmethod
    def describe(self, profile: _P) -> str:
        """Say in words what is notable about a profile."""

    @abstractmethod
    def recorded(self) -> ControlVectorEnv:
        """Environment of the training prompts."""

    @abstractmethod
    def judge_live(self, workloads: Sequence[str], report: Callable[[str], None]) -> ResultTable:
        """Decode the test prompts of some workloads live, by the clock too, beside their replay.

        Args:
            workloads: names; with the policy of the first seed.
            report: called with what is being done.

        Raises:
            WorkloadError, TraceError: a workload is not known, or has no trace. Loading errors as for `load_pair`.
        """

    def result_table(
        self,
        rows: Sequence[Row],
        table: tuple[Sequence[Column], Sequence[str]],
        *,
        verdict: str,
        caption: str,
        charged: Mapping[str, Any],
        protocol: Mapping[str, Any],
        notes: Sequence[str] = (),
    ) -> ResultTable:
        """Table of the test prompts, with the machine and the protocol that made it.

        Args:
            rows: in order.
            table: columns, and the names of those that are compared.
            verdict: in words.
            caption: explanation.
            charged: hardware that time is charged for, by workload.
            protocol: what is this experiment's own.
            notes: sentences on this run.
        """
        comparison = self.settings.comparison
        return ResultTable(
            rows,
            *table,
            verdict=verdict,
            caption=caption,
            hardware={
                "charged": charged,
                "replayed on": {
                    **machine(),
                    "numpy": np.__version__,
                    "torch": torch.__version__,
                    "specgym": __version__,
                },
            },
            protocol={
                "throughput": "all tokens over all seconds, relative to plain decoding, by replay of all test prompts",
                **protocol,
                "tokens": self.settings.max_new_tokens,
                "passes": f"1 where greedy, {comparison.passes} where sampled",
                "seeds": list(self.settings.seeds),
                "intervals": f"95 %, bootstrap with {comparison.resamples} resamples over prompts, and for learned "
                "policies over seeds",
            },
            notes=notes,
        )


def evaluate_live(folder: Path, workloads: Sequence[str]) -> None:
    """Judge a run by live decoding, print the table, and write it to ``live.json``.

    Args:
        folder: of a finished run.
        workloads: names.

    Raises:
        RunFileError: the folder is not that of a finished run, or a file in it is damaged. Others as for
            `ControlExperiment.judge_live`.
    """
    quieten()
    run = RunFolder.existing(folder)
    settings = load_settings(run.settings)
    experiment = experiment_of(settings)(settings, run)
    assert isinstance(experiment, ControlExperiment)
    with on_machine(settings), console.status("Decoding test prompts live") as status:
        table = experiment.judge_live(workloads, status.update)
    table.save(run.path / "live.json", this_command())
    console.print(table.render(f"Test prompts, {run.path}, the policy of seed {settings.seeds[0]}"))
    console.print(table.verdict, highlight=False)
    console.print(f"The table is in {run.path / 'live.json'}.", soft_wrap=True)
