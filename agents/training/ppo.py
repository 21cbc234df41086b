"""What every training by PPO here shares: the model, its callbacks, its checkpoints, its log."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter

from specgym.callbacks import (
    Checkpoint,
    DecodingMetricsCallback,
    DivergenceBoundCallback,
    EarlyStopCallback,
    EntropyScheduleCallback,
    FolderCheckpointCallback,
    NumericsCallback,
    PlateauCallback,
    PrioritisedReplayCallback,
    Resumable,
    WorkloadPriorities,
)
from specgym.decoding import SpecgymError

from ..experiments.settings import LearningSettings
from ..policy import KnobPolicy
from .console import console
from .nan_guards import FiniteRolloutBuffer
from .run_folder import RunFolder


class TrainingInterruptedError(SpecgymError, RuntimeError):
    """The run stopped before its end; the message says why and how to go on."""


class Learnable(Protocol):
    """What the settings of every such training have."""

    @property
    def learning(self) -> LearningSettings:
        """How to learn."""
        ...

    @property
    def seed(self) -> int:
        """Fixes every random choice."""
        ...

    @property
    def total_timesteps(self) -> int:
        """Environment steps over all environments."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Environment steps between two checkpoints."""
        ...

    @property
    def max_divergence(self) -> float | None:
        """The bound to keep, if there is one."""
        ...


def learn(
    settings: Learnable,
    run: RunFolder,
    make_environments: Callable[[], VecNormalize],
    checkpoint: Checkpoint | None,
    further: Sequence[BaseCallback] = (),
    progress_bar: bool = True,
) -> PPO:
    """Learn until the steps are done, or nothing improves any more where the settings say to stop then.

    Args:
        settings: of the run.
        run: where checkpoints and event files go.
        make_environments: starts them; they are closed at the end.
        checkpoint: where to go on from; None for the beginning.
        further: callbacks of this training alone.
        progress_bar: show one.

    Raises:
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
    """
    asked = _asked_for(settings)
    resumables = [each for each in asked if isinstance(each, Resumable)]
    saver = FolderCheckpointCallback(settings.checkpoint_every, run.checkpoints, resumables=resumables)
    go_on = f"Go on with: python train.py --resume {shlex.quote(str(run.path))}"
    with contextlib.ExitStack() as closing:
        try:
            environments = make_environments()
            closing.callback(_close, environments)
            model = _model(settings, environments, checkpoint, resumables)
            closing.enter_context(_logging_to(model, run.tensorboard))
            model.learn(
                max(settings.total_timesteps - model.num_timesteps, 0),
                callback=CallbackList([NumericsCallback(), DecodingMetricsCallback(), *asked, saver, *further]),
                reset_num_timesteps=checkpoint is None,
                progress_bar=progress_bar,
            )
            model.logger.dump(model.num_timesteps)  # what the last update recorded
        except KeyboardInterrupt:
            if saver.model is not None:
                saver.save()
            raise TrainingInterruptedError(f"interrupted after {saver.steps_learned} steps. {go_on}") from None
        except (EOFError, ConnectionError) as error:
            if saver.model is not None:
                saver.save()
            raise TrainingInterruptedError(
                f"the process of an environment ended ({type(error).__name__}): see what it said above, or it was "
                f"killed, for instance for lack of memory. {go_on}, or start anew with --no-subprocesses."
            ) from error
    for each in asked:
        if isinstance(each, EarlyStopCallback) and each.reason:
            console.print(f"Stopped early: {each.reason}", highlight=False)
    return model


def _model(
    settings: Learnable, environments: VecNormalize, checkpoint: Checkpoint | None, resumables: Sequence[Resumable]
) -> PPO:
    """A new learner, or the one of a checkpoint with everything that belongs to it."""
    learning = settings.learning
    if checkpoint is not None:
        if checkpoint.vecnormalize.is_file():
            environments.ret_rms = VecNormalize.load(str(checkpoint.vecnormalize), environments.venv).ret_rms
        model: PPO = PPO.load(checkpoint.policy, env=environments, device="cpu")
        model.num_timesteps = checkpoint.steps
        checkpoint.restore_random_states()
        checkpoint.restore(resumables)
        environments.seed(settings.seed + checkpoint.steps)  # the same prompts in the same order would teach less
        return model
    return PPO(
        KnobPolicy,
        environments,
        n_steps=learning.rollout_steps,
        batch_size=learning.batch_size,
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
        seed=settings.seed,
        device="cpu",  # networks this small are slower anywhere else
    )


def _asked_for(settings: Learnable) -> list[BaseCallback]:
    """The callbacks that the settings ask for. Those with a state of their own must stand before the checkpoints."""
    learning = settings.learning
    found: list[BaseCallback] = []
    if learning.entropy_end is not None:
        found.append(EntropyScheduleCallback(learning.entropy_coefficient, learning.entropy_end))
    if settings.max_divergence is not None:
        found.append(DivergenceBoundCallback(settings.max_divergence))
    if learning.workload_priorities:
        found.append(WorkloadPriorities())
    if learning.plateau_patience:
        found.append(PlateauCallback(patience=learning.plateau_patience, factor=learning.plateau_factor))
    if learning.stop_patience:
        found.append(EarlyStopCallback(patience=learning.stop_patience))
    if learning.replay.updates:
        found.append(PrioritisedReplayCallback(learning.replay, seed=settings.seed))
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
