"""Settings that experiments share: the run, what is practised on, PPO, and the judgement."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from specgym.callbacks import ReplaySettings

from ..training.settings_io import (
    SettingsError,
    require_above_zero,
    require_at_least,
    require_distinct,
    require_folder_name,
    require_within,
)


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
        require_at_least(self, 1, "rollout_steps", "epochs")
        require_at_least(self, 2, "batch_size")
        require_at_least(self, 0, "plateau_patience", "stop_patience")
        require_within(self, 0, 1, "gamma", "gae_lambda")
        require_within(self, 0, 1e6, "entropy_coefficient")
        if self.entropy_end is not None:
            require_within(self, 0, 1e6, "entropy_end")
        if self.learning_rate_end is not None:
            require_within(self, 0, math.inf, "learning_rate_end")
            if self.plateau_patience:
                raise SettingsError(
                    "the learning rate follows learning_rate_end or plateau_patience; give one of them, not both"
                )
        if not 0 < self.plateau_factor < 1:
            raise SettingsError(f"plateau_factor must be between 0 and 1, got {self.plateau_factor}")
        require_above_zero(self, "learning_rate", "clip_range", "max_grad_norm")


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
        require_above_zero(self, "std_low")
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
    learning: LearningSettings = field(default_factory=LearningSettings)
    """Learning algorithm."""

    def __post_init__(self) -> None:
        require_distinct(self, "workloads")
        require_at_least(self, 1, "total_timesteps", "checkpoint_every")
        require_at_least(self, 0, "threads", "environments")
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
