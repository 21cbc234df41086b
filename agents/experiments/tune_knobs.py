"""Experiment: learn the knobs of a registered decoder, one network for all workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from specgym.callbacks import DivergenceBoundCallback
from specgym.decoding import LatencyProfile, Pair, Sampling, SpecgymError, describe_hardware, measured
from specgym.envs import workload

from ..evaluation.live import CHARGED, CLOCK, judge_live, live_columns, strays
from ..evaluation.results import ALL, LEARNED, RESAMPLES, ResultTable, Row, kept_bound, machine, mean_rows
from ..export.knob_policy import ExportedPolicy, KnobRange
from ..export.recommend import best_nearby, load_knobs, recommend, save_knobs
from ..policy import KnobPolicy
from ..training.environments import (
    held_out_environments,
    make_env,
    require_recordings,
    state_names,
    training_environments,
)
from ..training.run_folder import console
from ..training.settings_io import SettingsError
from .experiment import Experiment, KnobLearning, Learner, PolicyChoice
from .tune_knobs_settings import KnobSettings, check_workloads

_NOTABLE_DIVERGENCE = 0.05


class TuneKnobs(Experiment[KnobSettings]):
    """Learning the knobs of a decoder on some workloads."""

    RESULTS = ("knobs.json", "heat_maps.json")

    @classmethod
    def check(cls, settings: KnobSettings) -> None:
        """Raise an error unless all workloads, recordings and models are there and suit the decoder."""
        check_workloads(settings)
        require_recordings(settings)
        for name in settings.workloads:  # loaded once a process, so this takes no time that would not be taken later
            try:
                settings.build(workload(name).load())
            except SpecgymError:
                raise
            except ValueError as error:
                raise SettingsError(f"{name} cannot be decoded so: {error}") from error

    def prepare(self) -> None:
        """Keep a latency profile for every workload, measured once for this hardware. Loads every pair."""
        refreshed: set[tuple[int, Sampling]] = set()

        def profile(name: str) -> LatencyProfile:
            chosen = workload(name)
            pair = chosen.load()
            chosen.prompt_ids("train"), chosen.prompt_ids("test")  # what is wrong with them shows here, in one process
            key = id(pair), chosen.sampling
            refresh = self.settings.refresh_latency and key not in refreshed
            refreshed.add(key)
            return self._measured(pair, chosen.sampling, refresh)

        console.print("Latency profiles (measured once for this hardware, then read from the cache):")
        self.profiles = self.run.keep_profiles(self.settings.workloads, profile, _rounds)

    def _measured(self, pair: Pair, sampling: Sampling, refresh: bool) -> LatencyProfile:
        return measured(pair, self.settings.build(pair), refresh, sampling=sampling)

    def learners(self) -> Sequence[Learner]:
        """One policy."""
        return [Learner(self.settings.seed, self.run.learned())]

    def environments(self, learner: Learner) -> VecEnv:
        """One environment a workload or more, on training prompts."""
        console.print("Starting the environments ...")
        return training_environments(self.settings, self.profiles)

    def policy(self, environments: VecEnv) -> PolicyChoice:
        """A Gaussian over moves of the knobs."""
        return knob_policy(self.settings.learning, environments)

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """The bound on the divergence, and short evaluations on held-out prompts, where they are asked for."""
        settings, callbacks = self.settings, list[BaseCallback]()
        if settings.bound is not None:
            callbacks.append(DivergenceBoundCallback(settings.bound))
        if settings.evaluation.during_training:
            every = settings.total_timesteps // settings.practising // settings.evaluation.during_training
            held_out = held_out_environments(settings, self.profiles)
            callbacks.append(
                EvalCallback(held_out, n_eval_episodes=len(settings.workloads), eval_freq=max(every, 1), verbose=0)
            )
        return callbacks

    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy with the ranges and steps of its knobs."""
        assert isinstance(model.policy, KnobPolicy)
        knobs = _knob_ranges(make_env(self.settings, 0, self.profiles[0]))
        names = state_names(self.settings, [knob.name for knob in knobs])
        ExportedPolicy.of(model.policy, knobs, names).save(folder)

    def conclude(self) -> None:
        """Recommend knobs: where the policy settles, or the best recorded setting around there."""
        if self.run.knobs.is_file():
            return
        policy = ExportedPolicy.load(self.run.path)
        charged = dict(zip(self.settings.workloads, self.profiles, strict=True))

        def improve(name: str, rest: Mapping[str, float]) -> dict[str, float]:
            return best_nearby(self.settings, name, rest, policy.knobs, LatencyProfile.load(charged[name]).at())

        save_knobs(self.run.knobs, recommend(policy, self.settings.workloads, improve))

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Decode held-out prompts plainly, with the decoder's defaults and with the recommended knobs."""
        settings, evaluation = self.settings, self.settings.evaluation
        recommended = load_knobs(self.run.knobs)["workloads"]
        rows: list[Row] = []
        for name, path in zip(settings.workloads, self.profiles, strict=True):
            chosen = workload(name)
            rows += judge_live(
                chosen,
                settings.build(chosen.load()),
                recommended[name],
                LatencyProfile.load(path),
                settings.reward,
                prompts=evaluation.prompts,
                max_new_tokens=evaluation.max_new_tokens,
                seeds=evaluation.seeds,
                report=report,
            )
        rows += mean_rows(rows)
        columns, caption = live_columns(rows)
        return ResultTable(
            rows,
            columns,
            CHARGED,
            knob_verdict(rows, settings.knobs_together, settings.bound),
            caption,
            describe_hardware(workload(settings.workloads[0]).load()) | machine(),
            {
                "prompts": evaluation.prompts,
                "tokens": evaluation.max_new_tokens,
                "seeds": list(evaluation.seeds),
                "intervals": f"95 %, bootstrap over prompts, {RESAMPLES} resamples",
                "clock": list(CLOCK),
            },
        )

    def hints(self) -> Sequence[str]:
        """Hints: where the recommended knobs are."""
        return (f"Recommended {self.settings.knobs_together}: {self.run.knobs}.",)


def knob_policy(learning: KnobLearning, environments: VecEnv) -> PolicyChoice:
    """The policy that moves the knobs of some tuning environments."""
    kwargs = {
        "knob_names": tuple(knob.name for knob in environments.get_attr("knobs", 0)[0]),
        "std_low": learning.std_low,
        "std_high": learning.std_high,
        "std_start": (learning.std_low * learning.std_high**2) ** (1 / 3),
    }
    return PolicyChoice(KnobPolicy, kwargs)


def knob_verdict(rows: Sequence[Row], knobs_together: str = "knobs", max_divergence: float | None = None) -> str:
    """Verdict over all workloads in a sentence; where texts stray from the target, a second one on how far.

    Args:
        rows: of `judge_live`, with their means.
        knobs_together: what the knobs are called together.
        max_divergence: the bound that was asked for, if there was one.
    """
    overall = {row.method: row.values for row in [row for row in rows if row.workload == ALL] or rows}
    default, learned = overall["default"], overall[LEARNED]
    sentence = (
        f"Learned {knobs_together} against the defaults: reward {learned['reward']:.3f} against "
        f"{default['reward']:.3f}, speedup {learned['speedup']:.2f} against {default['speedup']:.2f} over plain "
        "decoding, "
    )
    if not strays(row.values for row in rows):
        return sentence + (
            f"with {learned['mean_acceptance_length']:.2f} against {default['mean_acceptance_length']:.2f} tokens a "
            f"round, for {learned['target_tokens_per_token']:.1f} against {default['target_tokens_per_token']:.1f} "
            "tokens that the target reads for every one emitted. The text is the target's own."
        )
    sentence += f"divergence {learned['divergence']:.3f} against {default['divergence']:.3f}."
    if max_divergence is not None:
        sentence += kept_bound(rows, max_divergence)
    elif learned["divergence"] > max(default["divergence"], _NOTABLE_DIVERGENCE):
        sentence += (
            " The learned text follows the draft more than the target would; where that matters, train with "
            "--max-divergence, or --environment.reward.divergence-weight above 0."
        )
    return sentence


def _rounds(profile: LatencyProfile) -> str:
    """Costs of two rounds, in words."""
    if profile.kind == "chain":
        return f"a round of 4 drafted {1000 * profile.round(4):.2f} ms, of 16 {1000 * profile.round(16):.2f} ms"
    return (
        f"a {profile.kind} round that reads 16 tokens {1000 * profile.target(16):.2f} ms, 64 "
        f"{1000 * profile.target(64):.2f} ms"
    )


def _knob_ranges(env: Any) -> list[KnobRange]:
    knobs, scales = env.get_wrapper_attr("knobs"), env.get_wrapper_attr("scales")
    ranges: dict[str, tuple[float, float]] = env.get_wrapper_attr("ranges")
    return [
        KnobRange(knob.name, *ranges[knob.name], knob.default, scales[knob.name], knob.integer, knob.logarithmic)
        for knob in knobs
    ]
