"""The protocol of everything that can be learned: settings, environments, policy, export, judgement.

Settings that experiments share: the run, what is practised on, PPO, and the judgement.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from specgym.callbacks import ReplaySettings
from specgym.decoding import (
    MOST_THREADS,
    ModelType,
    SpecgymError,
    check_fields,
    check_placement,
    number,
    text,
    write_sealed,
)

from ..training.run_folder import LearnedFolder, RunFileError, RunFolder, read_json
from ..training.settings_io import (
    SETTINGS_FORMAT,
    SettingsError,
    current_settings,
    from_json,
    require_above_zero,
    require_at_least,
    require_folder_name,
    require_several,
    require_within,
    to_json,
)

if TYPE_CHECKING:
    from rich.table import Table
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.vec_env import VecEnv

    from ..evaluation.results import ResultTable

MOST_STEPS: Final = 10**10
"""Environment steps of a run at most: weeks even where a million steps take a minute."""
MOST_ENVIRONMENTS: Final = 2**16
MOST_TRANSITIONS: Final = 2**24
"""Transitions of a rollout at most, which are all held in memory: some gigabytes."""
MOST_EPOCHS: Final = 1000
FASTEST_LEARNING: Final = 10.0
"""Largest learning rate of Adam, whose steps are about as long as that, whatever the gradients."""


@dataclass(frozen=True)
class LearningSettings:
    """Proximal policy optimisation, as in Stable-Baselines3."""

    rollout_steps: int = 20
    """Steps of every environment between two updates; 20 is one episode of tuning."""
    batch_size: int = 80
    """Transitions in a minibatch."""
    epochs: int = 10
    """Passes over a rollout in one update."""
    learning_rate: float = 1e-3
    """Adam learning rate."""
    learning_rate_end: float | None = None
    """Adam learning rate at the end of training, approached linearly. Defaults to a constant rate."""
    gamma: float = 0.95
    """Discount: 0.95 looks about 20 steps ahead, as long as an episode, and 0.9 about 10."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation: 0 trusts the value network, 1 the rewards."""
    clip_range: float = 0.2
    """Largest change of an action's probability ratio, from 1, in one update."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, which keeps actions spread out."""
    entropy_end: float | None = None
    """Entropy coefficient at the end of training, approached linearly. Defaults to a constant coefficient."""
    plateau_patience: int = 0
    """Rollouts without improvement of the reward after which the learning rate is lowered; 0 for never."""
    plateau_factor: float = 0.5
    """Factor by which the learning rate is lowered on a plateau."""
    stop_patience: int = 0
    """Rollouts without improvement of the reward after which training stops; 0 for never."""
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(updates=0))
    """Prioritised replay of earlier rollouts; off while it makes no updates."""
    max_grad_norm: float = 0.5
    """Largest norm of a gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rollout_steps", most=MOST_TRANSITIONS)
        require_at_least(self, 1, "epochs", most=MOST_EPOCHS)
        require_at_least(self, 2, "batch_size")
        require_at_least(self, 0, "plateau_patience", "stop_patience")
        require_within(self, 0, 1, "gamma", "gae_lambda")
        require_within(self, 0, 1e6, "entropy_coefficient")
        if self.entropy_end is not None:
            require_within(self, 0, 1e6, "entropy_end")
        if self.learning_rate_end is not None:
            require_within(self, 0, FASTEST_LEARNING, "learning_rate_end")
            if self.plateau_patience:
                raise SettingsError(
                    "the learning rate follows learning_rate_end or plateau_patience; give one of them, not both"
                )
        check_fields(self, partial(number, above=0, below=1, error=SettingsError), "plateau_factor")
        require_above_zero(self, "learning_rate", most=FASTEST_LEARNING)
        require_above_zero(self, "clip_range", "max_grad_norm")


@dataclass(frozen=True)
class KnobLearning(LearningSettings):
    """Proximal policy optimisation of a policy that moves knobs."""

    workload_priorities: bool = False
    """Practise more on workloads where there is more to learn (Prioritized Level Replay, arXiv 2010.03934). Needs
    environments that can change their workload: those of train.py --tuner."""
    std_low: float = 0.05
    """Smallest standard deviation of the policy, in units of the action (1 is a knob's whole step)."""
    std_high: float = 1.0
    """Largest standard deviation of the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_zero(self, "std_low", "std_high", most=10)
        if not self.std_low < self.std_high:
            raise SettingsError(f"std_low must be below std_high, got {self.std_low} and {self.std_high}")


@dataclass(frozen=True)
class RunSettings:
    """Settings of every run.

    Attributes:
        EXPERIMENT: what is learned, a key of `experiment.EXPERIMENTS`; stored in ``settings.json``.
    """

    EXPERIMENT: ClassVar[str]

    workloads: tuple[str, ...] = ()
    """Workloads to learn on: pair/prompts, or pair/prompts@temperature, for instance tiny/prose or
    gpt2-xl+gpt2/code@1.0. A decoder without a draft takes target/prompts."""
    total_timesteps: int = 2000
    """Environment steps over all environments; rounded up to whole rollouts."""
    checkpoint_every: int = 320
    """Environment steps between two checkpoints, which --resume continues from."""
    environments: int = 0
    """Environments that practise side by side, shared out among the workloads."""
    name: str = ""
    """Run name. Defaults to a timestamp."""
    runs: Path = Path("runs")
    """Folder of all runs. This one goes to <runs>/<name>."""
    threads: int = 1
    """Threads of torch, for learning and where time is measured; 0 for torch's own choice. Models as small as those
    that ship gain little from more, and with more a busy machine slows them tenfold."""
    dtype: ModelType | None = None
    """Type of the models' weights. Defaults to float32 on a CPU and bfloat16 elsewhere."""
    device: str | None = None
    """Device of the models: cpu, cuda, cuda:1, or auto to spread a large model over all cards. Defaults to CUDA if
    there is any."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most; longer ones are cut, with a warning. Defaults to whole prompts, which leave 256
    tokens of the target's context, or half of a short one, for the text. Recordings must have been made with the
    same."""
    learning: LearningSettings = field(default_factory=LearningSettings)
    """Learning algorithm."""

    def __post_init__(self) -> None:
        check_placement(self.dtype, self.device)
        require_several(self, text, "workloads")
        require_at_least(self, 1, "total_timesteps", most=MOST_STEPS)
        require_at_least(self, 1, "checkpoint_every")
        require_at_least(self, 0, "threads", most=MOST_THREADS)
        require_at_least(self, 0, "environments", most=MOST_ENVIRONMENTS)
        if self.max_prompt_tokens is not None:
            require_at_least(self, 2, "max_prompt_tokens")
        require_folder_name(self.name)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.runs / self.name

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        raise NotImplementedError

    @property
    def stem(self) -> str:
        """Start of a run's default name."""
        raise NotImplementedError


_S = TypeVar("_S", bound=RunSettings)
_EARLIER_PROMPT_TOKENS = 128
"""Tokens that prompts were cut to while a run did not say so."""

EXPERIMENTS: Final[Mapping[str, tuple[str, str]]] = {
    "tune-knobs": ("tune_knobs_settings:default_settings", "tune_knobs:TuneKnobs"),
    "stop-drafts": ("control.stop_drafts_settings:StopSettings", "control.stop_drafts:StopDrafts"),
    "choose-drafts": ("control.choose_drafts_settings:ChoiceSettings", "control.choose_drafts:ChooseDrafts"),
    "round-knobs": ("control.round_knobs_settings:round_settings", "control.round_knobs:RoundKnobs"),
    "tune-worlds": ("tune_worlds_settings:WorldsSettings", "tune_worlds:TuneWorlds"),
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

    def tables(self) -> Sequence[Table]:
        """Tables that are shown below that of the judgement, such as what is recommended."""
        return ()

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
    write_sealed(path, {"format": SETTINGS_FORMAT, **stored})


def load_settings(path: Path) -> Any:
    """Read the settings of a run, of this version or an earlier one.

    Raises:
        RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
    """
    way_out = f"is {path.parent} the folder of a run that train.py wrote?"
    content = read_json(path, way_out, SETTINGS_FORMAT)
    try:
        content = current_settings(content)
    except ValueError as error:
        raise RunFileError(f"{path} does not hold the settings of a run ({error}); {way_out}") from error
    try:
        stored = content["settings"]
        if isinstance(stored, dict):
            stored.setdefault("max_prompt_tokens", _EARLIER_PROMPT_TOKENS)
        make = _resolved(EXPERIMENTS[content["experiment"]][0])
        decoder = stored.get("decoder") if isinstance(stored, dict) else None
        default = make() if decoder is None else make(decoder)
        return from_json(default, stored, "settings")
    except KeyError as error:
        raise RunFileError(f"{path} is of no known experiment ({error}); {way_out}") from error
    except (SpecgymError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunFileError(f"{path}: {error}") from error


def _resolved(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
