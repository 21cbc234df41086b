"""Experiment: learn to tune exact decoding, in sessions in simulated worlds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from specgym.envs import Source, WorldsVectorEnv, training_sampler

from ..evaluation.results import ResultTable
from ..evaluation.worlds.judge import judge_worlds
from ..export.worlds_policy import WorldsTuner
from ..policy import KnobPolicy
from ..training.run_folder import console, this_command
from ..training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from .experiment import Experiment, Learner, PolicyChoice
from .tune_worlds_settings import WorldsSettings


class TuneWorlds(Experiment[WorldsSettings]):
    """Learning to tune exact decoding in simulated worlds."""

    RESULTS = ("worlds.json",)
    FIGURES = "numbers"

    @classmethod
    def check(cls, settings: WorldsSettings) -> None:
        """Raise an error unless every workload has its recordings."""
        for name in settings.workloads:
            Source.find(name)

    def learners(self) -> Sequence[Learner]:
        """A policy for each seed; a single one lies in the run's own folder."""
        seeds = self.settings.seeds
        return [Learner(seed, self.run.learned(f"seed-{seed}" if len(seeds) > 1 else "")) for seed in seeds]

    def environments(self, learner: Learner) -> VecEnv:
        """Sessions side by side, in worlds of the learner's own."""
        settings = self.settings
        with console.status("Worlds") as status:
            sampler = training_sampler(
                settings.acceptance_worlds,
                learner.seed,
                settings.workloads,
                settings.engines,
                lambda done: status.update(f"Worlds: {done} of {settings.acceptance_worlds} decoded"),
            )
        env = WorldsVectorEnv(settings.environments, sampler, None, seed=learner.seed)
        monitored = VecMonitor(FiniteGuard(VectorEnvAdaptor(env)))
        return VecNormalize(monitored, norm_obs=False, gamma=settings.learning.gamma)

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A Gaussian over moves of the length, places of the threshold, and whether to stop."""
        learning = self.settings.learning
        start = (learning.std_low * learning.std_high**2) ** (1 / 3)
        stds = {"std_low": learning.std_low, "std_high": learning.std_high, "std_start": start}
        return PolicyChoice(KnobPolicy, {"knob_names": WorldsTuner.ACTIONS, **stds})

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy with the names of what it sees and does."""
        assert isinstance(model.policy, KnobPolicy)
        WorldsTuner.of(model.policy).save(folder)

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Let every policy tune worlds of all kinds that it never saw, beside simpler methods."""
        policies = {learner.seed: WorldsTuner.load(learner.folder.path) for learner in self.learners()}
        transfer = judge_worlds(policies, this_command(), worlds=self.settings.judged_worlds, report=report)
        transfer.save(self.run.path / "worlds.json")
        return transfer.table

    def hints(self) -> Sequence[str]:
        """Sentence on how to use the policy."""
        return (f"For a pair of your own: python evaluate.py {self.run.path} --pair <target>+<draft>.",)
