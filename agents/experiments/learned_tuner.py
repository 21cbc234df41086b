"""The learned tuner: practice on recorded workloads, and the policy that then tries settings and recommends one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from specgym.callbacks import DivergenceBoundCallback, WorkloadPriorities
from specgym.decoding import replacing
from specgym.envs import ContextLayout, KnobMoves, TuningVectorEnv, VectorObserveContext

from ..evaluation.replayed import Measurement, TuningTask, split_options
from ..export.knob_policy import ExportedPolicy, KnobRange
from ..policy import KnobPolicy
from ..training.ppo import learn
from ..training.run_folder import LearnedFolder, RunFileError
from ..training.sb3_vec_env import FiniteGuard, VectorEnvAdaptor
from .tune_knobs import knob_policy
from .tune_unseen_settings import TunerSettings

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


class TuningSessions(gymnasium.vector.VectorWrapper[Array, Array, Array, Array, NDArray[Any]]):
    """Divides rewards by the best that is known of their workload, and lets episodes end by themselves.

    A session is over after a number of measurements, and the observation says how many there were. Nothing comes after
    it that a value network should guess, as it would for an episode that was merely cut off.

    Args:
        env: a `TuningVectorEnv`, wrapped or not.
        best: rewards by the names of the workloads, each above 0.

    Raises:
        TypeError: another environment.
        ValueError: a workload is missing, or its best is not above 0.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Array, Array, NDArray[Any]], best: Mapping[str, float]) -> None:
        super().__init__(env)
        inner = env.unwrapped
        if not isinstance(inner, TuningVectorEnv):
            raise TypeError(f"TuningSessions is for a TuningVectorEnv; {env} is none")
        self._inner = inner
        for name in inner.workload_names:
            if not best.get(name, 0.0) > 0:
                raise ValueError(f"the best reward of {name} must be above 0, got {best.get(name)}")
        self._best = np.array([best[name] for name in inner.workload_names])

    def step(self, actions: Array) -> tuple[Array, NDArray[Any], Flags, Flags, dict[str, Any]]:
        """Step; rewards are shares of the best, and the end of a session is a termination."""
        best = self._best[self._inner.workload_of]  # the step may begin an episode on another workload
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return observations, rewards / best, terminated | truncated, np.zeros_like(truncated), infos


class LearnedTuner:
    """An exported policy that has learned to tune; one object tunes any workload.

    It recommends what it would try next. The setting with the best measurement would often be one that was lucky.

    Args:
        policy: its state must be that of a `ContextLayout`.

    Attributes:
        policy: that it follows.
        layout: what the policy sees.
        ranges: (low, high) of every knob that it sets, by name.
        defaults: of every knob, by name.

    Raises:
        RunFileError: the policy has another state: it was not learned with `train.py --tuner`.
    """

    def __init__(self, policy: ExportedPolicy) -> None:
        self.policy = policy
        self.ranges = {knob.name: (knob.low, knob.high) for knob in policy.knobs}
        self.defaults = {knob.name: knob.default for knob in policy.knobs}
        remembered = sum(name.endswith("/divergence") for name in policy.state)
        self.layout = ContextLayout(self.ranges, max(remembered, 1))
        if list(policy.state) != self.layout.names:
            raise RunFileError("the policy sees no measurements, so it cannot tune; learn one with train.py --tuner")

    @classmethod
    def load(cls, folder: str | Path) -> LearnedTuner:
        """The tuner of a run's folder. Raises as `ExportedPolicy.load`, and RunFileError for another kind of policy."""
        return cls(ExportedPolicy.load(folder))

    def next(self, temperature: float, cost_ratio: float, history: Sequence[Measurement]) -> dict[str, float]:
        """The setting to try next, or to recommend.

        Args:
            temperature: of sampling; 0 for greedy decoding.
            cost_ratio: what one more drafted token costs, in plain tokens.
            history: what was measured so far, the newest last.

        Returns:
            The knobs by name, in their own units.
        """
        now: Mapping[str, float] = history[-1].knobs if history else self.defaults
        past = [
            (past.knobs, past.values["speedup"], past.values["draft_acceptance_rate"], past.values["divergence"])
            for past in history
        ]
        action = self.policy(self.layout.observation(now, temperature, cost_ratio, past))
        values = {knob.name: knob.placed(place) for knob, place in zip(self.policy.knobs, action.tolist(), strict=True)}
        return {
            knob.name: float(round(values[knob.name]) if knob.integer else values[knob.name])
            for knob in self.policy.knobs
        }


class LearnedSearcher:
    """A learned tuner at work on one workload, in the form of the other methods (`search_baselines.Searcher`).

    Args:
        tuner: the tuner.
        task: what it tunes.
    """

    name = "learned"

    def __init__(self, tuner: LearnedTuner, task: TuningTask) -> None:
        self._tuner, self._task = tuner, task

    def propose(self, history: Sequence[Measurement]) -> dict[str, float]:
        """The setting to measure next."""
        return self._tuner.next(self._task.temperature, self._task.cost_ratio, history)

    recommend = propose

    def session(self, measurements: int, seed: int) -> list[dict[str, float]]:
        """Tune: the settings measured, in order, and at the end the one recommended."""
        history: list[Measurement] = []
        for number in range(measurements):
            history.append(self._task.measure(self.propose(history), number, seed))
        return [*(measurement.knobs for measurement in history), self.recommend(history)]


def tasks_of(settings: TunerSettings, names: Sequence[str] | None = None) -> list[TuningTask]:
    """The workloads of a run as tasks to tune, or some of them. Raises as `TuningTask`."""
    return [
        TuningTask(
            name,
            settings.bounded_reward,
            settings.decoder,
            options=settings.options,
            prompts_per_measurement=settings.prompts_per_measurement,
            max_new_tokens=settings.max_new_tokens,
            train=settings.recording(name, "train"),
            test=settings.recording(name, "test"),
        )
        for name in (settings.workloads if names is None else names)
    ]


def practice(settings: TunerSettings, best: Mapping[str, float]) -> VecNormalize:
    """The environments to practise in: training prompts, the decoder's defaults at first, places of the knobs.

    Args:
        settings: of the run.
        best: the best reward of every workload on its training prompts, by name.
    """
    recordings = {name: settings.recording(name, "train") for name in settings.workloads}
    env = TuningVectorEnv(
        settings.environments,
        decoder=settings.decoder,
        workload=settings.workloads,
        weights=settings.weights or None,
        max_new_tokens=settings.max_new_tokens,
        prompts_per_step=settings.prompts_per_measurement,
        reward=settings.bounded_reward,
        start="default",
        action="place",
        split="train",
        recording={name: path for name, path in recordings.items() if path is not None} or None,
        max_episode_steps=settings.measurements + 1,  # the last is what the measurements were for
        **split_options(settings.options, "decoder_options"),
    )
    observed = VectorObserveContext(env, settings.measurements)
    adapted = VectorEnvAdaptor(TuningSessions(observed, best))
    return VecNormalize(VecMonitor(FiniteGuard(adapted)), norm_obs=False, gamma=settings.learning.gamma)


def tuner_callbacks(settings: TunerSettings) -> list[BaseCallback]:
    """Callbacks that the settings ask for beside the schedules."""
    callbacks: list[BaseCallback] = []
    if settings.max_divergence is not None:
        callbacks.append(DivergenceBoundCallback(settings.max_divergence))
    if settings.learning.workload_priorities:
        callbacks.append(WorkloadPriorities())
    return callbacks


def learn_tuner(settings: TunerSettings, folder: LearnedFolder, best: Mapping[str, float]) -> None:
    """Learn a tuner without a run around it, going on from the newest intact checkpoint, and export it.

    Args:
        settings: of the training.
        folder: where to.
        best: the best reward of every workload on its training prompts, by name.

    Raises:
        TrainingInterruptedError: interrupted by the user.
    """

    def policy(environments: VecEnv) -> Any:
        return knob_policy(settings.learning, environments)

    callbacks = tuner_callbacks(settings)
    model = learn(
        settings, folder, settings.seed, lambda: practice(settings, best), policy, callbacks, progress_bar=False
    )
    exported(model, settings).save(folder.path)
    with replacing(folder.policy) as temporary, temporary.open("wb") as file:
        model.save(file)


def exported(model: PPO, settings: TunerSettings) -> ExportedPolicy:
    """The policy of a trained model, for the knobs that it was trained on."""
    assert isinstance(model.policy, KnobPolicy)
    (task,) = tasks_of(settings, settings.workloads[:1])
    moves = KnobMoves(task.knobs, None, None)
    knobs = []
    for knob in moves.knobs:
        low, high = moves.ranges[knob.name]
        knobs.append(KnobRange(knob.name, low, high, knob.default, high - low, knob.integer, knob.logarithmic))
    return ExportedPolicy.of(model.policy, knobs, ContextLayout(moves.ranges, settings.measurements).names)
