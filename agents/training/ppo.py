"""Training by PPO, shared by all experiments: the model, its callbacks, its checkpoints, its log."""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch.utils.tensorboard import SummaryWriter

from specgym.callbacks import (
    Checkpoint,
    DecodingMetricsCallback,
    EarlyStopCallback,
    EntropyScheduleCallback,
    FolderCheckpointCallback,
    NumericsCallback,
    PlateauCallback,
    PrioritisedReplayCallback,
    Resumable,
    intact_checkpoints,
)
from specgym.decoding import SpecgymError, Terminated, TrainingError, interruption_code, named_errors
from specgym.envs import WorkerError

from .run_folder import LearnedFolder, RunFileError, console
from .sb3_vec_env import FiniteRolloutBuffer

if TYPE_CHECKING:
    from ..experiments.experiment import LearningSettings, PolicyChoice, RunSettings

_SIGNAL_SECONDS: Final = 0.5
"""Time in which a signal to all processes of a run has reached this one too, when it has ended others."""


class TrainingInterruptedError(SpecgymError, RuntimeError):
    """The run stopped before its end; the message says why and how to go on.

    Args:
        message: why, and how to go on.
        exit_code: of the command; 2 for what the user can mend.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def learn(
    settings: RunSettings,
    folder: LearnedFolder,
    seed: int,
    environments: Callable[[], VecEnv],
    policy: Callable[[VecEnv], PolicyChoice],
    callbacks: Sequence[BaseCallback] = (),
    progress_bar: bool = True,
) -> PPO:
    """Learn from the newest intact checkpoint until the steps are done, or until the settings say to stop.

    Args:
        settings: of the run.
        folder: where checkpoints and event files go.
        seed: fixes every random choice.
        environments: starts the environments; they are closed at the end.
        policy: says what is learned in them.
        callbacks: further callbacks; the state of a `Resumable` is kept in the checkpoints.
        progress_bar: show a progress bar.

    Raises:
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process; what was learned
            is saved.
        TrainingError: an environment's process ended before learning began.
        OSError: the disk is full, or a file cannot be written; it is named.
    """
    learning = settings.learning
    checkpoint = next(intact_checkpoints(folder.checkpoints), None)
    callbacks = [*_scheduled(learning, seed), *callbacks]
    resumables = [callback for callback in callbacks if isinstance(callback, Resumable)]
    saver = FolderCheckpointCallback(settings.checkpoint_every, folder.checkpoints, resumables=resumables)
    with contextlib.ExitStack() as closing:
        try:
            started = environments()
            closing.callback(_close, started)
            if checkpoint is None:
                model = _new_model(learning, policy(started), started, seed)
            else:
                model = _loaded_model(checkpoint, started, seed, resumables)
            closing.enter_context(_logging_to(model, folder.tensorboard))
            model.learn(
                max(settings.total_timesteps - model.num_timesteps, 0),
                # Callbacks with a state stand before the saver: what they do between two rollouts belongs to it.
                callback=CallbackList([NumericsCallback(), DecodingMetricsCallback(), *callbacks, saver]),
                reset_num_timesteps=checkpoint is None,
                progress_bar=progress_bar,
            )
            model.logger.dump(model.num_timesteps)  # what the last update recorded
        except KeyboardInterrupt as interruption:
            raise _interrupted(interruption, saver, settings.folder) from None
        except WorkerError as error:
            if saver.begun:
                saver.save()
            raise TrainingInterruptedError(f"{error}. {way_on(settings.folder)}") from error
        except (EOFError, ConnectionError) as error:
            try:
                time.sleep(_SIGNAL_SECONDS)
            except KeyboardInterrupt as interruption:
                raise _interrupted(interruption, saver, settings.folder) from None
            if not saver.begun:
                raise TrainingError(
                    f"the process of an environment ended as it started ({type(error).__name__}): see what it said "
                    "above, or it was killed, for instance for lack of memory. --no-subprocesses starts the "
                    "environments in one process, which says what is wrong."
                ) from error
            saver.save()
            raise TrainingInterruptedError(
                f"the process of an environment ended ({type(error).__name__}): see what it said above, or it was "
                f"killed, for instance for lack of memory. {way_on(settings.folder)}, or start anew with "
                "--no-subprocesses."
            ) from error
    for callback in callbacks:
        if isinstance(callback, EarlyStopCallback) and callback.reason:
            console.print(f"Stopped early: {callback.reason}", highlight=False)
    return model


def _interrupted(
    interruption: KeyboardInterrupt, saver: FolderCheckpointCallback, run: Path
) -> TrainingInterruptedError:
    """Save what was learned, and return the error that says so."""
    if saver.begun:
        saver.save()
    words = "terminated" if isinstance(interruption, Terminated) else "interrupted"
    message = f"{words} after {saver.steps_learned} steps. {way_on(run)}"
    return TrainingInterruptedError(message, interruption_code(interruption))


def way_on(run: Path) -> str:
    """A sentence on how to go on with a run."""
    return f"Go on with: python train.py --resume {shlex.quote(str(run))}"


def _new_model(learning: LearningSettings, choice: PolicyChoice, environments: VecEnv, seed: int) -> PPO:
    end = learning.learning_rate_end
    return PPO(
        choice.policy,
        environments,
        n_steps=learning.rollout_steps,
        batch_size=min(learning.batch_size, learning.rollout_steps * environments.num_envs),
        n_epochs=learning.epochs,
        learning_rate=learning.learning_rate if end is None else LinearSchedule(learning.learning_rate, end, 1.0),
        gamma=learning.gamma,
        gae_lambda=learning.gae_lambda,
        clip_range=learning.clip_range,
        ent_coef=learning.entropy_coefficient,
        max_grad_norm=learning.max_grad_norm,
        rollout_buffer_class=FiniteRolloutBuffer,
        policy_kwargs=dict(choice.kwargs),
        seed=seed,
        device="cpu",  # networks this small are slower anywhere else
    )


def _loaded_model(checkpoint: Checkpoint, environments: VecEnv, seed: int, resumables: Sequence[Resumable]) -> PPO:
    """The model of a checkpoint, with everything that belongs to it."""
    if isinstance(environments, VecNormalize) and checkpoint.vecnormalize.is_file():
        environments.ret_rms = VecNormalize.load(str(checkpoint.vecnormalize), environments.venv).ret_rms
    try:
        model: PPO = PPO.load(checkpoint.policy, env=environments, device="cpu")
    except ValueError as error:  # other spaces: knobs went from and to other ends
        raise RunFileError(
            f"{checkpoint.policy} was learned by an earlier version, whose environments were others, and cannot go on "
            f"({error}). The run can be judged as it is (python evaluate.py <run>); to learn more, start a new one "
            "with the command in its settings.json"
        ) from error
    model.num_timesteps = checkpoint.steps
    checkpoint.restore_random_states()
    checkpoint.restore(resumables)
    environments.seed(seed + checkpoint.steps)  # the same prompts in the same order would teach less
    return model


def _scheduled(learning: LearningSettings, seed: int) -> list[BaseCallback]:
    """The callbacks that the settings of learning ask for."""
    callbacks: list[BaseCallback] = []
    if learning.entropy_end is not None:
        callbacks.append(EntropyScheduleCallback(learning.entropy_coefficient, learning.entropy_end))
    if learning.plateau_patience:
        callbacks.append(PlateauCallback(patience=learning.plateau_patience, factor=learning.plateau_factor))
    if learning.stop_patience:
        callbacks.append(EarlyStopCallback(patience=learning.stop_patience))
    if learning.replay.updates:
        callbacks.append(PrioritisedReplayCallback(learning.replay, seed=seed))
    return callbacks


@contextlib.contextmanager
def _logging_to(model: PPO, folder: Path) -> Iterator[None]:
    """TensorBoard events in one folder for the whole run; those of steps that were lost are hidden."""
    with _without_tracebacks_of_writers():
        output = _Events(folder, purge_step=model.num_timesteps + 1 if model.num_timesteps else None)
        logger = Logger(str(folder), [output])
        model.set_logger(logger)
        try:
            yield
        finally:
            logger.close()


class _Events(TensorBoardOutputFormat):
    """TensorBoard events of a folder, which is named in the error of a full disk.

    Args:
        folder: where the event file goes.
        purge_step: first step that is hidden in earlier files.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._folder, self._is_closed = folder, False
        with named_errors(folder, folder):
            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, *args: Any, **kwargs: Any) -> None:
        """Write values, and flush them."""
        with named_errors(self._folder, self._folder):
            super().write(*args, **kwargs)

    def close(self) -> None:
        """Close the file. All values are in it, or their error was raised before."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _without_tracebacks_of_writers() -> Iterator[None]:
    """Let a thread that cannot write its file end without a traceback.

    TensorBoard's thread raises the error once more after it has handed it to whoever writes next (`_AsyncWriterThread`
    in tensorboard/summary/writer/event_file_writer.py of TensorBoard 2.21).
    """
    before = threading.excepthook

    def shown(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, OSError):
            before(ended)

    threading.excepthook = shown
    try:
        yield
    finally:
        threading.excepthook = before


def _close(environments: VecEnv) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # its processes may have ended before
        environments.close()
