"""The protocol of everything that can be learned: settings, environments, policy, export, judgement."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from specgym.decoding import SpecgymError, write_json

from ..training.earlier_formats import SETTINGS_FORMAT, current_settings
from ..training.run_folder import LearnedFolder, RunFileError, RunFolder, read_json
from ..training.settings_io import from_json, to_json
from .settings import RunSettings

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.vec_env import VecEnv

    from ..evaluation.results import ResultTable

_S = TypeVar("_S", bound=RunSettings)

EXPERIMENTS: Final[Mapping[str, tuple[str, str]]] = {
    "tune-knobs": ("tune_knobs_settings:default_settings", "tune_knobs:TuneKnobs"),
    "stop-drafts": ("stop_drafts_settings:StopSettings", "stop_drafts:StopDrafts"),
    "tune-unseen": ("tune_unseen_settings:tuner_settings", "tune_unseen:TuneUnseen"),
}
"""By `RunSettings.EXPERIMENT`: what makes default settings, given the decoder's name if there is one, and the class of
the experiment. Named by strings, so that settings can be read without importing what learns."""


@dataclass(frozen=True)
class Learner:
    """One policy to learn.

    Attributes:
        seed: fixes every random choice.
        folder: where its files go.
    """

    seed: int
    folder: LearnedFolder


@dataclass(frozen=True)
class PolicyChoice:
    """Policy that PPO learns: arguments of `stable_baselines3.PPO`."""

    policy: type[ActorCriticPolicy]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Experiment(ABC, Generic[_S]):
    """Something that can be learned, in the folder of a run.

    `specgym.agents.training.run` drives it: `check` before there is a folder, then `prepare`; for each learner
    `environments`, `policy` and `callbacks`, and `export` of what was learned; then `conclude`, and `judge` for the
    table. Checkpoints, resuming, guards against NaN, schedules, prioritised replay and TensorBoard come with it.

    Args:
        settings: of the run.
        run: its folder.

    Attributes:
        RESULTS: names of files beside the table that are out of date once a run goes on.
        FIGURES: what `ResultTable.compared` are, for messages.
    """

    RESULTS: ClassVar[tuple[str, ...]] = ()
    FIGURES: ClassVar[str] = "charged numbers"

    def __init__(self, settings: _S, run: RunFolder) -> None:
        self.settings, self.run = settings, run

    @classmethod
    @abstractmethod
    def check(cls, settings: _S) -> None:
        """Raise what would end the run later, so that a misspelt name leaves no folder behind.

        Raises:
            SpecgymError: something asked for is not there, or does not fit.
        """

    def prepare(self) -> None:
        """Make what learning and judging need and the run's folder lacks, such as latency profiles."""

    @abstractmethod
    def learners(self) -> Sequence[Learner]:
        """The policies to learn, one after another."""

    @abstractmethod
    def environments(self, learner: Learner) -> VecEnv:
        """Start the environments to learn in: guarded against NaN, and monitored and normalised where that is due."""

    @abstractmethod
    def policy(self, environments: VecEnv) -> PolicyChoice:
        """The policy for these environments."""

    def callbacks(self, learner: Learner) -> Sequence[BaseCallback]:
        """Callbacks beside those that the learning settings ask for; with a `Resumable`, its state is kept."""
        return ()

    @abstractmethod
    def export(self, model: PPO, folder: Path) -> None:
        """Write the policy of a model without any framework (``policy.safetensors``, ``policy.json``)."""

    def conclude(self) -> None:
        """Make files that follow from the learned policies and are missing, such as recommended knobs."""

    @abstractmethod
    def judge(self, report: Callable[[str], None]) -> ResultTable:
        """Judge what was learned, on prompts that training never saw.

        Args:
            report: called with what is being done.

        Raises:
            RunFileError: the run is not finished, or a file of it is damaged.
        """

    def hints(self) -> Sequence[str]:
        """Sentences on what a user may do next, for the end of training."""
        return ()


def experiment_of(settings: RunSettings) -> type[Experiment[Any]]:
    """The class of the experiment that settings are for."""
    kind: type[Experiment[Any]] = _resolved(EXPERIMENTS[settings.EXPERIMENT][1])
    return kind


def save_settings(settings: RunSettings, path: Path, command: str) -> None:
    """Write settings with the command that made them, atomically."""
    stored = {"experiment": settings.EXPERIMENT, "command": command, "settings": to_json(settings)}
    write_json(path, {"format": SETTINGS_FORMAT, **stored})


def load_settings(path: Path) -> Any:
    """Read the settings of a run, of this version or an earlier one.

    Raises:
        RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
    """
    way_out = f"is {path.parent} the folder of a run that train.py wrote?"
    content = read_json(path, way_out)
    try:
        content = current_settings(content)
    except ValueError as error:
        raise RunFileError(f"{path} does not hold the settings of a run ({error}); {way_out}") from error
    try:
        stored = content["settings"]
        make = _resolved(EXPERIMENTS[content["experiment"]][0])
        decoder = stored.get("decoder") if isinstance(stored, dict) else None
        default = make() if decoder is None else make(decoder)
        return from_json(default, stored, "settings")
    except KeyError as error:
        raise RunFileError(f"{path} is of no known experiment ({error}); {way_out}") from error
    except (SpecgymError, ValueError) as error:
        raise RunFileError(f"{path}: {error}") from error


def _resolved(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
