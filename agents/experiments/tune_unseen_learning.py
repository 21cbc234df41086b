"""Learning a tuner by replay: episodes in which settings are tried one after another on a workload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from specgym.callbacks import intact_checkpoints
from specgym.decoding import replacing, traits_of
from specgym.envs import ContextLayout, KnobMoves, TuningVectorEnv, VectorObserveContext, trace_in

from ..export.knob_policy import ExportedPolicy, KnobRange
from ..policy import KnobPolicy
from ..training import ppo as learner
from ..training.nan_guards import FiniteGuard
from ..training.sb3_vec_env import VectorEnvAdaptor
from ..training.tuner_run import TunerRun
from .tune_unseen import TunerSettings
from .tune_unseen_sessions import TuningSessions


def practice(settings: TunerSettings, best: Mapping[str, float]) -> VecNormalize:
    """The environments to practise in: training prompts, the decoder's defaults at first, absolute thresholds.

    Args:
        settings: of the run.
        best: the best reward of every workload on its training prompts, by name.
    """
    env = TuningVectorEnv(
        settings.environments,
        workload=settings.workloads,
        weights=settings.weights or None,
        max_new_tokens=settings.tokens_per_prompt,
        prompts_per_step=settings.prompts_per_measurement,
        reward=settings.reward,
        start="default",
        action="place",
        max_draft_length=settings.draft_length,
        recording=[trace_in(settings.traces, name, "train") for name in settings.workloads],
        max_episode_steps=settings.measurements + 1,  # the last is what the measurements were for
    )
    observed = VectorObserveContext(env, settings.measurements)
    adapted = VectorEnvAdaptor(TuningSessions(observed, best))
    return VecNormalize(VecMonitor(FiniteGuard(adapted)), norm_obs=False, gamma=settings.learning.gamma)


def learn(
    run: TunerRun, settings: TunerSettings, best: Mapping[str, float], progress_bar: bool = True
) -> ExportedPolicy:
    """Train a tuner, going on from the newest intact checkpoint, and write it to the run's folder.

    Args:
        run: where to.
        settings: how.
        best: the best reward of every workload on its training prompts, by name.
        progress_bar: show one.

    Raises:
        TrainingInterruptedError: interrupted by the user.
    """
    checkpoint = next(intact_checkpoints(run.checkpoints), None)
    model = learner.learn(settings, run, lambda: practice(settings, best), checkpoint, progress_bar=progress_bar)
    policy = exported(model, settings)
    save_policy(run.path, model, policy)
    return policy


def exported(model: PPO, settings: TunerSettings) -> ExportedPolicy:
    """The policy of a trained model, for the knobs that it was trained on."""
    assert isinstance(model.policy, KnobPolicy)
    moves = KnobMoves(traits_of("threshold").knobs_without_pair(max_draft_length=settings.draft_length), None, None)
    knobs = []
    for knob in moves.knobs:
        low, high = moves.ranges[knob.name]
        knobs.append(KnobRange(knob.name, low, high, knob.default, high - low, knob.integer))
    return ExportedPolicy.of(model.policy, knobs, ContextLayout(moves.ranges, settings.measurements).names)


def save_policy(folder: Path, model: PPO, policy: ExportedPolicy) -> None:
    """Write a policy in both forms, each file whole or not at all."""
    with replacing(folder / "policy.zip") as temporary, temporary.open("wb") as file:
        model.save(file)
    policy.save(folder)
