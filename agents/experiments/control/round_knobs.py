"""Experiment: learn which knobs every round of a decoder gets, from live texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from specgym import __version__
from specgym.callbacks import RateCallback
from specgym.decoding import LatencyProfile, Sampling, build_decoder, describe_hardware, measured
from specgym.envs import RoundKnobsVectorEnv, profile_of, workload

from ...evaluation.control.round_comparison import CAPTION, TABLE, compare_rounds, round_verdict
from ...evaluation.results import ResultTable, machine
from ...export.knob_policy import ExportedKnobRule
from ...policy import KnobPolicy
from ...training.run_folder import console
from ...training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from ..experiment import Experiment, Learner, PolicyChoice
from ..tune_knobs import describe_rounds, knob_policy, knob_ranges
from .round_knobs_settings import RoundKnobSettings


class RoundKnobs(Experiment[RoundKnobSettings]):
    """Learning to choose knobs round by round, one policy a seed."""

    FIGURES = "throughputs"

    @classmethod
    def check(cls, settings: RoundKnobSettings) -> None:
        """Raise an error unless all workloads and models are there and suit the decoder."""
        for name in settings.workloads:
            build_decoder(settings.decoder, workload(name).load())
            workload(name).prompt_ids("train"), workload(name).prompt_ids("test")

    def prepare(self) -> None:
        """Keep a latency profile for every workload. Loads every pair."""
        refreshed: set[tuple[int, Sampling]] = set()

        def profile(name: str) -> LatencyProfile:
            chosen = workload(name)
            pair = chosen.load()
            decoder, key = build_decoder(self.settings.decoder, pair), (id(pair), chosen.sampling)
            refresh = self.settings.refresh_latency and key not in refreshed
            refreshed.add(key)
            if self.settings.reference_latency:
                kept = profile_of(chosen, None, replayed=True, decoder=self.settings.decoder)
            else:
                kept = measured(pair, decoder, refresh, sampling=chosen.sampling)
            return profile_of(chosen, kept, replayed=False, decoder=decoder)

        origin = "reference" if self.settings.reference_latency else "measured once for this hardware, then cached"
        console.print(f"Latency profiles ({origin}):")
        self.run.keep_profiles(self.settings.workloads, profile, describe_rounds, LatencyProfile.load)

    @property
    def profiles(self) -> list[LatencyProfile]:
        """The latency profile of every workload, as it is kept."""
        return [LatencyProfile.load(path) for path in self.run.profile_paths(self.settings.workloads)]

    def learners(self) -> Sequence[Learner]:
        """A policy for each seed."""
        return [Learner(seed, self.run.learned(f"seed-{seed}")) for seed in self.settings.seeds]

    def environments(self, learner: Learner) -> VecEnv:
        """Texts of training prompts, decoded live in one batch."""
        monitored = VecMonitor(FiniteGuard(VectorEnvAdaptor(self._env(self.settings.environments))))
        return VecNormalize(monitored, norm_obs=False, gamma=self.settings.learning.gamma)

    def _env(self, num_envs: int) -> RoundKnobsVectorEnv:
        settings = self.settings
        return RoundKnobsVectorEnv(
            num_envs,
            settings.decoder,
            settings.workloads,
            settings.max_new_tokens,
            split="train",
            profile=self.profiles,
            decision_seconds=settings.decision_seconds,
            action=settings.action,
        )

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A Gaussian over moves or places of the knobs."""
        return knob_policy(self.settings.learning, environments)

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The price of time, which follows the throughput."""
        return [RateCallback(self.settings.learning.rate_smoothing)]

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy as a rule to decode with."""
        assert isinstance(model.policy, KnobPolicy)
        knobs = knob_ranges(self._env(len(self.settings.workloads)))
        ExportedKnobRule.of(model.policy, knobs, self.settings.action).save(folder)

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Decode held-out prompts live by every policy, beside simpler ways that are chosen on training prompts."""
        settings, comparison = self.settings, self.settings.comparison
        rules = [ExportedKnobRule.load(learner.folder.path) for learner in self.learners()]
        rows = compare_rounds(settings, rules, self.profiles, report)
        return ResultTable(
            rows,
            *TABLE,
            verdict=round_verdict(rows),
            caption=CAPTION,
            hardware=describe_hardware(workload(settings.workloads[0]).load())
            | machine()
            | {"torch": torch.__version__, "specgym": __version__},
            protocol={
                "throughput": "all tokens over all charged seconds, relative to plain decoding, live on test prompts",
                "chosen": "the fixed setting and the adaptive rule on training prompts, by throughput",
                "prompts": comparison.prompts,
                "training prompts": comparison.training_prompts,
                "tokens": settings.max_new_tokens,
                "passes": f"1 where greedy, {comparison.passes} where sampled",
                "seeds": list(settings.seeds),
                "intervals": f"95 %, bootstrap with {comparison.resamples} resamples over prompts, and for learned "
                "policies over seeds",
            },
        )

    def hints(self) -> Sequence[str]:
        """Sentence on how to decode with a policy."""
        folder = self.learners()[0].folder.path
        return (f"To decode with it: generate(..., knobs=specgym.agents.ExportedKnobRule.load({str(folder)!r})).",)
