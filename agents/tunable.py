"""What can be tuned: for every decoder the settings of its training, which differ from another's in little.

A further decoder is one more subclass of `TrainSettings` here, and its place in `TUNABLE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..envs.rewards import RewardSettings
from ..envs.workloads import SHIPPED_WORKLOADS
from .files import RunFileError, read_json
from .requirements import SettingsError, require_at_least, require_one_bound
from .settings import EnvironmentSettings, LearningSettings, TrainSettings


@dataclass(frozen=True)
class ThresholdEnvironment(EnvironmentSettings):
    """What the agent practises on."""

    draft_length: int = 16
    """Tokens drafted every round (K), and the upper end of the rollback threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "draft_length")


@dataclass(frozen=True)
class ThresholdSettings(TrainSettings):
    """Learn decoding thresholds by reinforcement learning. With no option at all: on the pairs that ship."""

    FORMAT = "specgym-settings-1"
    ABOUT = "a run of thresholds"
    ENV = "specgym/Thresholds-v0"
    DECODER = "threshold"
    KNOBS = "thresholds"

    workloads: tuple[str, ...] = SHIPPED_WORKLOADS
    """What to tune for: pair/prompts, or pair/prompts@temperature, for instance tiny/prose or gpt2-xl+gpt2/code@1.0."""
    environment: ThresholdEnvironment = field(default_factory=ThresholdEnvironment)
    """What the agent practises on."""
    max_divergence: float | None = None
    """Ask for the fastest thresholds whose mean divergence from the target stays under this bound, above 0, instead of
    the reward's weights and ranges. The price of going beyond is learned along, one for each workload."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_bound(self.max_divergence, self.environment.reward.max_divergence)

    @property
    def reward(self) -> RewardSettings:
        """Of the environments, with the bound."""
        return replace(self.environment.reward, max_divergence=self.max_divergence)

    @property
    def decoder_options(self) -> Mapping[str, Any]:
        """The draft length."""
        return {"draft_length": self.environment.draft_length}


def _speed_alone() -> RewardSettings:
    return RewardSettings(acceptance_weight=0.0, range_weight=0.0, ranges={})


@dataclass(frozen=True)
class LosslessEnvironment(EnvironmentSettings):
    """What the agent practises on, with a decoder whose text is the target's own: speed is all there is to gain."""

    tokens_per_step: int = 64
    """Tokens generated for one prompt in one environment step: as many as the table's. What pays depends on it where a
    decoder learns from the text as it grows, as Lookahead's pool does."""
    backend: Literal["live", "replay"] = "replay"
    """Replay the recordings that ship, or run the models: some thousand times slower, so that --total-timesteps,
    --checkpoint-every and --learning.batch-size should be small, and free of the recordings' small errors. The table is
    live in any case."""
    reward: RewardSettings = field(default_factory=_speed_alone)
    """Weights and ranges of the reward's terms; by default the speedup is the reward. What is not accepted costs what
    the latency profile charges for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward.max_divergence is not None or self.reward.divergence_weight:
            raise SettingsError(
                "the text of a lossless decoder is the target's own, so there is no divergence to weigh or to bound; "
                "leave out --environment.reward.max-divergence and --environment.reward.divergence-weight"
            )


def _replay_learning() -> LearningSettings:
    return LearningSettings(batch_size=1024, epochs=5, learning_rate=1e-3, plateau_patience=8, gamma=0.9)


@dataclass(frozen=True)
class LookaheadSettings(TrainSettings):
    """Learn window, n-gram size and guesses of Lookahead decoding. With no option at all: from recordings that ship."""

    FORMAT = "specgym-lookahead-settings-1"
    ABOUT = "a run of Lookahead decoding"
    ENV = "specgym/Lookahead-v0"
    DECODER = "lookahead"
    KNOBS = "Lookahead knobs"
    REPLAYED = 32

    workloads: tuple[str, ...] = (
        "tiny-10m/prose",
        "tiny-10m/code",
        "tiny-10m/definitions",
        "tiny-3m/prose",
        "tiny-3m/code",
        "tiny-3m/chat",
        "tiny-3m/prose@1.0",
    )
    """What to tune for: target/prompts, or target/prompts@temperature; no draft is needed. Each needs a recording
    unless --environment.backend is live."""
    total_timesteps: int = 300_000
    """Environment steps over all workloads; rounded up to whole rollouts."""
    checkpoint_every: int = 20_000
    """Environment steps between two checkpoints, which --resume continues from."""
    environment: LosslessEnvironment = field(default_factory=LosslessEnvironment)
    """What the agent practises on."""
    learning: LearningSettings = field(default_factory=_replay_learning)
    """How it learns."""


TUNABLE: dict[str, type[TrainSettings]] = {kind.ENV: kind for kind in (ThresholdSettings, LookaheadSettings)}
"""The settings of every decoder that can be tuned, by the id of its environment."""


def load_settings(path: Path) -> TrainSettings:
    """The settings of a run that tunes a decoder, whichever it is.

    Raises:
        RunFileError: the file is missing, damaged, of another kind, or has settings that are unknown or impossible.
    """
    found = read_json(path, f"is {path.parent} the folder of a run that train.py wrote?").get("format")
    for kind in TUNABLE.values():
        if found == kind.FORMAT:
            return kind.load(path)
    known = ", ".join(kind.FORMAT for kind in TUNABLE.values())
    raise RunFileError(f"{path} does not hold the settings of a run that tunes a decoder ({known}), but of {found!r}")
