"""Settings that everything which learns to control drafts has in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from specgym.decoding import check_fields, seed_number, sequence_of, whole_number
from specgym.envs import LONGEST

from ...training.settings_io import (
    SettingsError,
    require_above_zero,
    require_at_least,
    require_several,
    require_within,
)
from ..experiment import LearningSettings, RunSettings

WIDEST: Final = 2**16


@dataclass(frozen=True)
class ControlLearning(LearningSettings):
    """Proximal policy optimisation, as in Stable-Baselines3. Every round of drafting is an episode."""

    rollout_steps: int = 64
    """Decisions of every environment between two updates."""
    batch_size: int = 4096
    """Decisions in a minibatch."""
    epochs: int = 4
    """Passes over a rollout in one update."""
    learning_rate: float = 4e-3
    """Adam learning rate."""
    learning_rate_end: float | None = 0.0
    """Adam learning rate at the end of training, approached linearly; None for a constant rate."""
    gamma: float = 1.0
    """Discount. A round is short, and its last token counts as much as its first."""
    entropy_coefficient: float = 0.02
    """Weight of the entropy bonus, which keeps the policy undecided."""
    rate_smoothing: float = 0.5
    """Share of the way that a workload's rate moves to the throughput of a rollout, above 0; 1 for all the way."""
    policy_layers: tuple[int, ...] = (32, 32)
    """Widths of the policy's tanh layers; live decoding runs them after every drafted token."""
    value_layers: tuple[int, ...] = (64, 64)
    """Widths of the value network's tanh layers, which only training runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_zero(self, "rate_smoothing", most=1)
        width = partial(whole_number, at_most=WIDEST, error=SettingsError)
        check_fields(self, partial(sequence_of, check=width, error=SettingsError), "policy_layers", "value_layers")


@dataclass(frozen=True)
class ComparisonSettings:
    """Judgement of the learned policies beside other rules."""

    passes: int = 32
    """Passes over every prompt where tokens are sampled, each with other random choices; greedy decoding is always the
    same, so once is enough there."""
    resamples: int = 1000
    """Bootstrap samples for the intervals."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "passes", most=10**5)
        require_at_least(self, 10, "resamples", most=10**6)


@dataclass(frozen=True)
class ControlSettings(RunSettings):
    """Settings of a run that learns to control drafts, from recorded texts."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Random seeds; one policy is learned with each, one after another."""
    total_timesteps: int = 2_500_000
    """Decisions learned from, for each seed, over all environments; rounded up to whole rollouts."""
    checkpoint_every: int = 250_000
    """Decisions between two checkpoints, which --resume continues from."""
    environments: int = 512
    """Texts decoded side by side, spread evenly over the workloads, and over batch sizes where there are several."""
    max_draft_length: int = 16
    """Tokens drafted in a round, at most."""
    max_new_tokens: int = 64
    """Tokens of each text, at most."""
    decision_seconds: float = 0.0
    """Seconds charged for every decision, whichever rule takes it, in training and in the table."""
    recordings: Path | None = None
    """Folder of traces, as `python -m specgym.envs.record` writes them. Defaults to those that ship."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    learning: ControlLearning = field(default_factory=ControlLearning)
    """Learning algorithm."""
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    """Judgement of the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_several(self, seed_number, "seeds")
        require_at_least(self, 1, "max_new_tokens")
        require_at_least(self, 2, "max_draft_length", most=LONGEST)
        require_within(self, 0, math.inf, "decision_seconds")
        if self.environments < self.points:
            raise SettingsError(
                f"environments must be at least {self.points}, one for each workload{self._divided}, got "
                f"{self.environments}"
            )

    @property
    def points(self) -> int:
        """Number of operating points that the environments are spread over."""
        return len(self.workloads)

    @property
    def _divided(self) -> str:
        return ""
