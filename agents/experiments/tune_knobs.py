"""Experiment: learn the knobs of a registered decoder, one network for all workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from specgym.callbacks import DivergenceBoundCallback
from specgym.decoding import (
    ArgumentError,
    LatencyProfile,
    Pair,
    Sampling,
    SpecgymError,
    describe_hardware,
    measured,
    memory_of,
)
from specgym.envs import Metrics, Trace, Workload, decode_prompts, find_recording, metrics_of, profile_of, workload

from ..evaluation.contenders import (
    LIVE_PROMPTS,
    TrainingReplay,
    contenders,
    fixed_length,
    live_verdict,
    replays,
    settings_of_others,
)
from ..evaluation.live import CHARGED, CLOCK, judge_live, live_columns
from ..evaluation.results import RESAMPLES, ResultTable, Row, machine, mean_rows
from ..evaluation.text_quality import TextQualityError, require_text_quality, scored_texts
from ..export.knob_policy import ExportedPolicy, KnobRange
from ..export.recommend import (
    LIVE_SHARES,
    Recommendation,
    best_nearby,
    fastest_within,
    load_knobs,
    mean_rest,
    paying,
    recommend,
    save_knobs,
    spread_over_seeds,
)
from ..policy import KnobPolicy
from ..training.environments import (
    held_out_environments,
    make_env,
    recording_path,
    require_recordings,
    state_names,
    training_environments,
)
from ..training.run_folder import console
from ..training.settings_io import SettingsError
from .experiment import Experiment, KnobLearning, Learner, PolicyChoice
from .tune_knobs_settings import KnobSettings, check_workloads


class TuneKnobs(Experiment[KnobSettings]):
    """Learning the knobs of a decoder on some workloads."""

    RESULTS = ("knobs.json", "heat_maps.json")

    @classmethod
    def check(cls, settings: KnobSettings) -> None:
        """Raise an error unless all workloads, recordings and models are there and suit the decoder."""
        check_workloads(settings)
        require_recordings(settings)
        _require_scorers(settings)
        for name in settings.workloads:  # loaded once a process, so this takes no time that would not be taken later
            try:
                settings.build(workload(name).load())
            except ValueError as error:
                if isinstance(error, SpecgymError) and not isinstance(error, ArgumentError):
                    raise  # it says all by itself
                raise SettingsError(f"{name} cannot be decoded so: {error}") from error

    def prepare(self) -> None:
        """Keep a latency profile for every workload, measured once for this hardware. Loads every pair."""
        _require_scorers(self.settings)
        refreshed: set[tuple[int, Sampling]] = set()

        def profile(name: str) -> LatencyProfile:
            chosen = workload(name)
            pair = chosen.load()
            chosen.prompt_ids("train"), chosen.prompt_ids("test")  # what is wrong with them shows here, in one process
            key = id(pair), chosen.sampling
            refresh = self.settings.refresh_latency and key not in refreshed
            refreshed.add(key)
            return self._measured(chosen, pair, refresh)

        console.print("Latency profiles (measured once for this hardware, then read from the cache):")
        self.profiles = self.run.keep_profiles(self.settings.workloads, profile, describe_rounds, LatencyProfile.load)

    def _measured(self, chosen: Workload, pair: Pair, refresh: bool) -> LatencyProfile:
        """The profile of this hardware; with the chances of the trace that is replayed, so that drafts end alike."""
        decoder = self.settings.build(pair)
        profile = measured(pair, decoder, refresh, sampling=chosen.sampling)
        if decoder.stops_by_gain and self.settings.replayed:
            trace, _ = find_recording(
                self.settings.decoder, recording_path(self.settings, chosen.name, "train"), chosen, "train"
            )
            assert isinstance(trace, Trace)
            return replace(profile, chances=trace.chances)
        return profile_of(chosen, profile, replayed=False, decoder=decoder)

    def learners(self) -> Sequence[Learner]:
        """A policy for each seed; a single one lies in the run's own folder."""
        seeds = self.settings.seeds
        return [Learner(seed, self.run.learned(f"seed-{seed}" if len(seeds) > 1 else "")) for seed in seeds]

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
        knobs = knob_ranges(make_env(self.settings, 0, self.profiles[0]).unwrapped)
        names = state_names(self.settings, [knob.name for knob in knobs])
        ExportedPolicy.of(model.policy, knobs, names).save(folder)

    def conclude(self) -> None:
        """Recommend knobs: where the policy settles, or the best recorded setting around there."""
        if self.run.knobs.is_file():
            return
        policies = [ExportedPolicy.load(learner.folder.path) for learner in self.learners()]
        charged = dict(zip(self.settings.workloads, self.profiles, strict=True))

        def improve(name: str, rests: Sequence[Mapping[str, float]]) -> Recommendation:
            return self._improved(name, rests, policies[0].knobs, LatencyProfile.load(charged[name]))

        save_knobs(self.run.knobs, recommend(policies, self.settings.workloads, improve))

    def _improved(
        self, name: str, rests: Sequence[Mapping[str, float]], knobs: Sequence[KnobRange], profile: LatencyProfile
    ) -> Recommendation:
        """The best setting around the places where policies stay, by training prompts; none if it does not pay."""
        settings, lossless_at = self.settings, self.settings.traits.lossless_at
        decode, mean = self._on_training_prompts(name, profile), mean_rest(rests, knobs)
        if settings.bound is None or lossless_at is None:
            return paying(best_nearby(settings, name, mean, knobs, profile.at()), decode)
        prompts = settings.evaluation.prompts
        if settings.replayed:
            return fastest_within(settings.bound, lossless_at, rests, knobs, decode, prompts)
        return fastest_within(settings.bound, lossless_at, [mean], knobs[:1], decode, prompts, LIVE_SHARES)

    def _on_training_prompts(
        self, name: str, profile: LatencyProfile
    ) -> Callable[[Sequence[Mapping[str, float]]], Metrics[NDArray[np.float64]]]:
        """A function that decodes a workload's training prompts with some settings: all by replay, or a few live."""
        settings, chosen = self.settings, workload(name)
        tokens = settings.environment.max_new_tokens
        if settings.replayed:
            recording = recording_path(settings, name, "train")
            return TrainingReplay(settings.decoder, chosen, recording, profile, settings.decoder_options, tokens).sums
        decoder = settings.build(chosen.load())
        decoder.charge_by(profile.at())

        def decoded(tried: Sequence[Mapping[str, float]]) -> Metrics[NDArray[np.float64]]:
            prompts = chosen.prompt_ids("train")[:LIVE_PROMPTS]
            texts = [decode_prompts(decoder, setting, prompts, tokens, chosen.sampling, 0) for setting in tried]
            sums = np.array([[metrics_of([text], profile.at()) for text in of_setting] for of_setting in texts])
            return Metrics(*np.moveaxis(sums, -1, 0))

        return decoded

    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Decode held-out prompts plainly, with the recommended knobs, and in the simpler ways that they compete with.

        Those are chosen on training prompts (`evaluation.contenders`).
        """
        settings, evaluation, traits = self.settings, self.settings.evaluation, self.settings.traits
        knobs = load_knobs(self.run.knobs, self.settings.workloads)
        recommended = knobs["workloads"]
        workloads = [workload(name) for name in settings.workloads]
        profiles = [LatencyProfile.load(path) for path in self.profiles]
        recordings = [recording_path(settings, name, "train") for name in settings.workloads]
        options, tokens = settings.decoder_options, settings.environment.max_new_tokens
        report("one setting for all workloads, by the training prompts of the others")
        measured = replays(settings.decoder, workloads, recordings, profiles, options, tokens)
        others = settings_of_others(measured, settings.reward, settings.bound, traits.lossless_at)
        rows: list[Row] = []
        for name, chosen, profile, recording in zip(settings.workloads, workloads, profiles, recordings, strict=True):
            length = None
            if traits.lossless_at is not None:
                report(f"{chosen}: the best fixed length of exact drafts, by training prompts")
                length = fixed_length(chosen, recording, profile, options["max_draft_length"], tokens)
            company = contenders(
                settings.build(chosen.load()),
                recommended[name],
                exact_length=length,
                exact_knobs=traits.lossless_at,
                one_for_all=others.get(chosen.name),
            )
            rows += judge_live(
                chosen,
                company,
                profile,
                settings.reward,
                prompts=evaluation.prompts,
                max_new_tokens=evaluation.max_new_tokens,
                seeds=evaluation.seeds,
                score_texts=evaluation.score_texts,
                report=report,
            )
        rows += mean_rows(rows)
        columns, caption = live_columns(rows)
        return ResultTable(
            rows,
            columns,
            CHARGED,
            live_verdict(rows, settings.knobs_together, settings.bound),
            caption,
            describe_hardware(workload(settings.workloads[0]).load()) | machine(),
            {
                "prompts": evaluation.prompts,
                "tokens": evaluation.max_new_tokens,
                "seeds": list(evaluation.seeds),
                "intervals": f"95 %, bootstrap over prompts, {RESAMPLES} resamples",
                "clock": list(CLOCK),
            },
            notes=[note for note in (*scored_texts(rows), spread_over_seeds(knobs), self._memory()) if note],
        )

    def _memory(self) -> str:
        """Memory that each pair took, in a sentence."""
        pairs = {str(workload(name).pair): workload(name).load() for name in self.settings.workloads}
        uses = [memory_of(pair) for pair in pairs.values()]
        # The peak is that of the whole process or device, so it is said once.
        words = [str(replace(use, peak=None)) for use in uses[:-1]] + [str(uses[-1])]
        return f"Memory: {'; '.join(words)}."

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


def _require_scorers(settings: KnobSettings) -> None:
    """Raise an error unless the texts that are to be scored can be: before anything is learned or decoded."""
    if settings.evaluation.score_texts:
        try:
            require_text_quality(settings.workloads)
        except TextQualityError as error:
            raise TextQualityError(f"{error}, or leave that out with --evaluation.no-score-texts") from error


def describe_rounds(profile: LatencyProfile) -> str:
    """Costs of two rounds, in words."""
    if profile.kind == "chain":
        return f"a round of 4 drafted {1000 * profile.round(4):.2f} ms, of 16 {1000 * profile.round(16):.2f} ms"
    return (
        f"a {profile.kind} round that reads 16 tokens {1000 * profile.target(16):.2f} ms, 64 "
        f"{1000 * profile.target(64):.2f} ms"
    )


def knob_ranges(env: Any) -> list[KnobRange]:
    """Ranges of the knobs of an environment, as exported policies keep them; it has `knobs`, `ranges` and `scales`."""
    ranges: dict[str, tuple[float, float]] = env.ranges
    return [
        KnobRange(knob.name, *ranges[knob.name], knob.default, env.scales[knob.name], knob.integer, knob.logarithmic)
        for knob in env.knobs
    ]
