"""One training run from its settings to its folder, and its continuation after any kind of end."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils.tensorboard import SummaryWriter

from ..callbacks import DecodingMetricsCallback, FolderCheckpointCallback, intact_checkpoints
from ..callbacks.checkpoints import Checkpoint
from ..decoding.errors import SpecgymError
from ..decoding.files import replacing
from ..envs.workloads import workload
from .environments import held_out_environments, make_env, state_names, training_environments
from .evaluation import evaluate, save_rows
from .export import DESCRIPTION_FILE, WEIGHTS_FILE, ExportedPolicy, KnobRange
from .numerics import FiniteRolloutBuffer, NumericsCallback
from .policy import KnobPolicy
from .recommend import load_thresholds, recommend, save_thresholds
from .run import RunFolder, torch_threads
from .settings import SettingsError, TrainSettings, merged
from .tables import rendered, verdict
from .telling import console, quieten


class TrainingInterruptedError(SpecgymError, RuntimeError):
    """The run stopped before its end; the message says why and how to go on."""


def train(settings: TrainSettings | None = None, resume: Path | None = None) -> Path:
    """Learn thresholds, judge them on held-out prompts, and write ``runs/<name>/`` (see `RunFolder`).

    Args:
        settings: what to do; by default the defaults, or the run's own when resuming.
        resume: folder of a run to go on with, from its newest intact checkpoint. Of a finished run only what is missing
            is made, unless `settings` asks for more steps.

    Returns:
        The folder of the run.

    Raises:
        WorkloadError: a workload is not known.
        SettingsError: the folder is taken, or `settings` contradict those of the run to resume.
        RunFileError: `resume` is not the folder of a run, or a file in it is damaged.
        TrainingInterruptedError: interrupted by the user, or by the end of an environment's process.
    """
    quieten()
    if resume is not None:
        run = RunFolder.existing(resume)
        saved = TrainSettings.load(run.settings)
        settings = merged(saved, settings or saved)
        if settings != saved:
            settings.save(run.settings, _command())
    else:
        run, settings = _new_run(settings or TrainSettings())
    with torch_threads(settings.threads):
        _train(settings, run, going_on=resume is not None)
    return run.path


def _train(settings: TrainSettings, run: RunFolder, going_on: bool) -> None:
    console.print(f"[bold]{run.path}[/]: {len(settings.workloads)} workloads, {settings.total_timesteps} steps")
    console.print("Latency profiles (measured once for this hardware, then read from the cache):")
    profiles = run.measure_profiles(settings)
    checkpoint = next(intact_checkpoints(run.checkpoints), None)
    if checkpoint is None or checkpoint.steps < settings.total_timesteps:
        if going_on:
            began = f"step {checkpoint.steps}" if checkpoint else "the beginning, having no checkpoint"
            console.print(f"Going on from {began}.")
        for stale in (run.table, run.thresholds, run.policy):
            stale.unlink(missing_ok=True)
        _learn(settings, run, profiles, checkpoint)
        checkpoint = next(intact_checkpoints(run.checkpoints))
    else:
        console.print(f"All {checkpoint.steps} steps are done.")
    _finish(settings, run, profiles, checkpoint)


def _new_run(settings: TrainSettings) -> tuple[RunFolder, TrainSettings]:
    if not settings.name:
        settings = replace(settings, name=time.strftime("thresholds-%Y%m%d-%H%M%S"))
    run = RunFolder(settings.folder)
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        way_out = f"go on with --resume {run.path}" if run.settings.is_file() else "remove it"
        raise SettingsError(f"{run.path} exists already; {way_out}, or choose another --name")
    for name in settings.workloads:  # a misspelt name should leave no folder behind
        workload(name)
    run.path.mkdir(parents=True, exist_ok=True)
    settings.save(run.settings, _command())
    return run, settings


def _learn(settings: TrainSettings, run: RunFolder, profiles: Sequence[Path], checkpoint: Checkpoint | None) -> None:
    console.print("Starting the environments ...")
    saver = FolderCheckpointCallback(settings.checkpoint_every, run.checkpoints)
    go_on = f"Go on with: python train.py --resume {shlex.quote(str(run.path))}"
    with contextlib.ExitStack() as closing:
        try:
            environments = training_environments(settings, profiles)
            closing.callback(_close, environments)
            model = _model(settings, environments, checkpoint)
            closing.enter_context(_logging_to(model, run.tensorboard))
            model.learn(
                settings.total_timesteps - model.num_timesteps,
                callback=CallbackList(_callbacks(settings, profiles, saver)),
                reset_num_timesteps=checkpoint is None,
                progress_bar=True,
            )
            model.logger.dump(model.num_timesteps)  # what the last update recorded
        except KeyboardInterrupt:
            if saver.model is not None:
                saver.save()
            raise TrainingInterruptedError(f"interrupted after {saver.steps_learned} steps. {go_on}") from None
        except (EOFError, ConnectionError) as error:
            raise TrainingInterruptedError(
                f"the process of an environment ended ({type(error).__name__}): see what it said above, or it was "
                f"killed, for instance for lack of memory. {go_on}, or start anew with --no-subprocesses."
            ) from error


def _model(settings: TrainSettings, environments: VecNormalize, checkpoint: Checkpoint | None) -> PPO:
    """A new learner, or the one of a checkpoint with everything that belongs to it."""
    learning = settings.learning
    if checkpoint is not None:
        if checkpoint.vecnormalize.is_file():
            environments.ret_rms = VecNormalize.load(str(checkpoint.vecnormalize), environments.venv).ret_rms
        model: PPO = PPO.load(checkpoint.policy, env=environments, device="cpu")
        model.num_timesteps = checkpoint.steps
        checkpoint.restore_random_states()
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
            "knob_names": _knob_names(environments),
            "std_low": learning.std_low,
            "std_high": learning.std_high,
            "std_start": (learning.std_low * learning.std_high**2) ** (1 / 3),
        },
        seed=settings.seed,
        device="cpu",  # networks this small are slower anywhere else
    )


def _callbacks(
    settings: TrainSettings, profiles: Sequence[Path], saver: FolderCheckpointCallback
) -> list[BaseCallback]:
    callbacks: list[BaseCallback] = [NumericsCallback(), DecodingMetricsCallback(), saver]
    if settings.evaluation.during_training:
        count = len(settings.workloads)
        every = max(settings.total_timesteps // count // settings.evaluation.during_training, 1)
        held_out = held_out_environments(settings, profiles)
        callbacks.append(EvalCallback(held_out, n_eval_episodes=count, eval_freq=every, verbose=0))
    return callbacks


def _finish(settings: TrainSettings, run: RunFolder, profiles: Sequence[Path], checkpoint: Checkpoint) -> None:
    """Make whatever of the results is missing."""
    if not (run.policy.is_file() and (run.path / WEIGHTS_FILE).is_file() and (run.path / DESCRIPTION_FILE).is_file()):
        model: PPO = PPO.load(checkpoint.policy, device="cpu")
        assert isinstance(model.policy, KnobPolicy)
        knobs = _knob_ranges(make_env(settings, 0, profiles[0]))
        names = state_names(settings, [knob.name for knob in knobs])
        ExportedPolicy.of(model.policy, knobs, names).save(run.path)
        for source, target in ((checkpoint.vecnormalize, run.vecnormalize), (checkpoint.policy, run.policy)):
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    if not run.thresholds.is_file():
        save_thresholds(run.thresholds, recommend(ExportedPolicy.load(run.path), settings.workloads))
    if run.table.is_file():
        console.print(f"The table is in {run.table}; python evaluate.py {run.path} makes it again.")
        return
    thresholds = load_thresholds(run.thresholds)["workloads"]
    with console.status("Evaluating on held-out prompts") as status:
        rows = evaluate(settings, thresholds, profiles, lambda name: status.update(f"Evaluating {name}"))
    save_rows(run.table, rows, settings, _command())
    console.print(rendered(rows, f"Held-out prompts, {run.path}"))
    console.print(verdict(rows), highlight=False)
    console.print(f"Recommended thresholds: {run.thresholds}. TensorBoard: tensorboard --logdir {run.path.parent}")


def _knob_names(environments: VecNormalize) -> tuple[str, ...]:
    return tuple(knob.name for knob in environments.get_attr("knobs", 0)[0])


def _knob_ranges(env: Any) -> list[KnobRange]:
    ranges, scales = env.get_wrapper_attr("ranges"), env.get_wrapper_attr("scales")
    knobs = env.get_wrapper_attr("knobs")
    return [
        KnobRange(knob.name, ranges[knob.name][0], ranges[knob.name][1], knob.default, scales[knob.name])
        for knob in knobs
    ]


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


def _command() -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
