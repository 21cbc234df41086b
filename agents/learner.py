"""What every training by PPO here shares: the model, its callbacks, its checkpoints, its log."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter

from ..callbacks import (
    DecodingMetricsCallback,
    DivergenceBoundCallback,
    EarlyStopCallback,
    EntropyScheduleCallback,
    FolderCheckpointCallback,
    PlateauCallback,
    PrioritisedReplayCallback,
    Resumable,
    WorkloadPriorities,
)
from ..callbacks.checkpoints import Checkpoint
from ..decoding.errors import SpecgymError
from .numerics import FiniteRolloutBuffer, NumericsCallback
from .policy import KnobPolicy
from .settings import LearningSettings
from .telling import console


class TrainingInterruptedError(SpecgymError, RuntimeError):
    """The run stopped before its end; the message says why and how to go on."""


class Learner:
    """PPO with everything that `LearningSettings` ask for, in the folder of a run.

    Args:
        learning: how to learn.
        seed: fixes every random choice.
        total_timesteps: environment steps over all environments.
        checkpoints: folder of the checkpoints.
        checkpoint_every: environment steps between two of them.
        tensorboard: folder of the event files.
        max_divergence: the bound to keep, if there is one.
    """

    def __init__(
        self,
        learning: LearningSettings,
        seed: int,
        total_timesteps: int,
        checkpoints: Path,
        checkpoint_every: int,
        tensorboard: Path,
        max_divergence: float | None = None,
    ) -> None:
        self._learning, self._seed, self._steps = learning, seed, total_timesteps
        self._tensorboard = tensorboard
        self._callbacks = _asked_for(learning, seed, max_divergence)
        self._early_stop = next((each for each in self._callbacks if isinstance(each, EarlyStopCallback)), None)
        self._resumables = [each for each in self._callbacks if isinstance(each, Resumable)]
        self._saver = FolderCheckpointCallback(checkpoint_every, checkpoints, resumables=self._resumables)

    def learn(
        self,
        make_environments: Callable[[], VecNormalize],
        checkpoint: Checkpoint | None,
        go_on: str,
        further: Sequence[BaseCallback] = (),
        progress_bar: bool = True,
    ) -> PPO:
        """Learn until the steps are done, or nothing improves any more where the settings say to stop then.

        Args:
            make_environments: starts them; they are closed at the end.
            checkpoint: where to go on from; None for the beginning.
            go_on: the command that goes on after an interruption, for the message.
            further: callbacks of this training alone.
            progress_bar: show one.

        Raises:
            TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
        """
        with contextlib.ExitStack() as closing:
            try:
                environments = make_environments()
                closing.callback(_close, environments)
                model = self._model(environments, checkpoint)
                closing.enter_context(_logging_to(model, self._tensorboard))
                callbacks = [NumericsCallback(), DecodingMetricsCallback(), *self._callbacks, self._saver, *further]
                model.learn(
                    max(self._steps - model.num_timesteps, 0),
                    callback=CallbackList(callbacks),
                    reset_num_timesteps=checkpoint is None,
                    progress_bar=progress_bar,
                )
                model.logger.dump(model.num_timesteps)  # what the last update recorded
            except KeyboardInterrupt:
                if self._saver.model is not None:
                    self._saver.save()
                raise TrainingInterruptedError(
                    f"interrupted after {self._saver.steps_learned} steps. Go on with: {go_on}"
                ) from None
            except (EOFError, ConnectionError) as error:
                raise TrainingInterruptedError(
                    f"the process of an environment ended ({type(error).__name__}): see what it said above, or it was "
                    f"killed, for instance for lack of memory. Go on with: {go_on}, or start anew with "
                    "--no-subprocesses."
                ) from error
        if self._early_stop is not None and self._early_stop.reason:
            console.print(f"Stopped early: {self._early_stop.reason}", highlight=False)
        return model

    def _model(self, environments: VecNormalize, checkpoint: Checkpoint | None) -> PPO:
        """A new learner, or the one of a checkpoint with everything that belongs to it."""
        learning = self._learning
        if checkpoint is not None:
            if checkpoint.vecnormalize.is_file():
                environments.ret_rms = VecNormalize.load(str(checkpoint.vecnormalize), environments.venv).ret_rms
            model: PPO = PPO.load(checkpoint.policy, env=environments, device="cpu")
            model.num_timesteps = checkpoint.steps
            checkpoint.restore_random_states()
            checkpoint.restore(self._resumables)
            environments.seed(self._seed + checkpoint.steps)  # the same prompts in the same order would teach less
            return model
        return PPO(
            KnobPolicy,
            environments,
            n_steps=learning.rollout_steps,
            batch_size=min(learning.batch_size, learning.rollout_steps * environments.num_envs),
            n_epochs=learning.epochs,
            learning_rate=learning.learning_rate,
            gamma=learning.gamma,
            gae_lambda=learning.gae_lambda,
            clip_range=learning.clip_range,
            ent_coef=learning.entropy_coefficient,
            max_grad_norm=learning.max_grad_norm,
            rollout_buffer_class=FiniteRolloutBuffer,
            policy_kwargs={
                "knob_names": tuple(knob.name for knob in environments.get_attr("knobs", 0)[0]),
                "std_low": learning.std_low,
                "std_high": learning.std_high,
                "std_start": (learning.std_low * learning.std_high**2) ** (1 / 3),
            },
            seed=self._seed,
            device="cpu",  # networks this small are slower anywhere else
        )


def go_on_command(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"python train.py --resume {shlex.quote(str(folder))}"


def _asked_for(learning: LearningSettings, seed: int, max_divergence: float | None) -> list[BaseCallback]:
    """The callbacks that the settings ask for. Those with a state of their own must stand before the checkpoints."""
    found: list[BaseCallback] = []
    if learning.entropy_end is not None:
        found.append(EntropyScheduleCallback(learning.entropy_coefficient, learning.entropy_end))
    if max_divergence is not None:
        found.append(DivergenceBoundCallback(max_divergence))
    if learning.workload_priorities:
        found.append(WorkloadPriorities())
    if learning.plateau_patience:
        found.append(PlateauCallback(patience=learning.plateau_patience, factor=learning.plateau_factor))
    if learning.stop_patience:
        found.append(EarlyStopCallback(patience=learning.stop_patience))
    if learning.replay.updates:
        found.append(PrioritisedReplayCallback(learning.replay, seed=seed))
    return found


@contextlib.contextmanager
def _logging_to(model: PPO, folder: Path) -> Iterator[None]:
    """TensorBoard events in one folder for the whole run; those of steps that were lost are hidden."""
    output = TensorBoardOutputFormat.__new__(TensorBoardOutputFormat)
    output.writer = SummaryWriter(str(folder), purge_step=model.num_timesteps + 1 if model.num_timesteps else None)
    output._is_closed = False
    logger = Logger(str(folder), [output])
    model.set_logger(logger)
    try:
        yield
    finally:
        logger.close()


def _close(environments: VecNormalize) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # its processes may have ended before
        environments.close()
