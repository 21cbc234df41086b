"""Settings for learning which knobs every round of a decoder gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import tyro

from specgym.decoding import seed_number, traits_of

from ...training.settings_io import (
    SettingsError,
    require_above_zero,
    require_at_least,
    require_one_of,
    require_several,
    require_within,
)
from ..experiment import KnobLearning, RunSettings

ENV: Final = "specgym/RoundKnobs-v0"
DEFAULT_DECODER: Final = "speculative"
MOST_TEXTS: Final = 512
"""Texts decoded live side by side, at most."""


@dataclass(frozen=True)
class RoundLearning(KnobLearning):
    """Proximal policy optimisation of a policy that chooses knobs round by round."""

    rollout_steps: int = 32
    """Rounds of every text between two updates."""
    batch_size: int = 192
    """Rounds in a minibatch."""
    epochs: int = 10
    """Passes over a rollout in one update."""
    learning_rate: float = 3e-3
    """Adam learning rate."""
    learning_rate_end: float | None = 3e-4
    """Adam learning rate at the end of training, approached linearly; None for a constant rate."""
    gamma: float = 0.5
    """Discount: 0.5 looks 2 rounds ahead. What knobs do later is little beside what they do at once."""
    rate_smoothing: float = 0.5
    """Share of the way that a workload's rate moves to the throughput of a rollout, above 0; 1 for all the way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_zero(self, "rate_smoothing", most=1)


@dataclass(frozen=True)
class RoundComparison:
    """Judgement of the learned policies beside simpler ways to set the knobs."""

    training_prompts: int = 8
    """Training prompts of every workload by which the adaptive rule is chosen, at most, and the fixed setting where no
    recording of the decoder says what settings bring."""
    prompts: int = 16
    """Held-out prompts of every workload, at most; they are the same for all methods."""
    levels: int = 5
    """Values of every knob that are tried for a fixed setting, at most, where none is recorded; knob by knob, twice."""
    passes: int = 4
    """Passes over every prompt where tokens are sampled, each with other random choices."""
    resamples: int = 1000
    """Bootstrap samples for the intervals."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "training_prompts", "prompts", "passes", most=10**5)
        require_at_least(self, 2, "levels", most=100)
        require_at_least(self, 10, "resamples", most=10**6)


@dataclass(frozen=True)
class RoundKnobSettings(RunSettings):
    """Learn which knobs every round of a decoder gets, from live texts; --decoder says whose."""

    EXPERIMENT = "round-knobs"

    decoder: str = DEFAULT_DECODER
    """Registered name of the decoder, which must be lossless."""
    workloads: tuple[str, ...] = ()
    """Workloads to learn on, all together: pair/prompts, or pair/prompts@temperature. Defaults to the decoder's own."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0, 1, 2)
    """Random seeds; one policy is learned with each, one after another."""
    total_timesteps: int = 32_000
    """Rounds learned from, for each seed, over all environments; rounded up to whole rollouts."""
    checkpoint_every: int = 4_000
    """Rounds between two checkpoints, which --resume continues from."""
    environments: int = 24
    """Texts decoded side by side, spread evenly over the workloads."""
    max_new_tokens: int = 64
    """Tokens of each text, at most."""
    action: Literal["move", "place"] = "place"
    """Effect of an action: move the knobs from where the last round had them, or place them anywhere in their search
    ranges."""
    decision_seconds: float = 0.0
    """Seconds charged for every decision of the policy in training, and of every rule in the table."""
    reference_latency: bool = False
    """Charge time by the reference profiles that ship with the package, where there are some, instead of measuring:
    the same on every machine, and not for yours."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    learning: RoundLearning = field(default_factory=RoundLearning)
    """Learning algorithm."""
    comparison: RoundComparison = field(default_factory=RoundComparison)
    """Judgement of the result."""

    def __post_init__(self) -> None:
        try:
            traits = traits_of(self.decoder)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if not traits.knobs_without_pair():
            raise SettingsError(f"{self.decoder} decoding has no knobs, so there is nothing to choose")
        if not traits.lossless:
            raise SettingsError(
                f"{self.decoder} decoding is lossy, and only speed is learned here; its knobs are tuned for whole "
                "texts, with a bound on the divergence, by the environment of its own"
            )
        if not self.workloads:
            object.__setattr__(self, "workloads", traits.workloads)
        super().__post_init__()
        require_several(self, seed_number, "seeds")
        require_at_least(self, 1, "max_new_tokens")
        require_at_least(self, 1, "environments", most=MOST_TEXTS)
        require_one_of(self, "action", ("move", "place"))
        require_within(self, 0, float("inf"), "decision_seconds")
        if self.reference_latency and self.refresh_latency:
            raise SettingsError("reference_latency measures nothing that refresh_latency could measure anew; give one")
        if self.learning.workload_priorities:
            raise SettingsError("workload_priorities is for train.py --tuner")
        if self.environments < len(self.workloads):
            raise SettingsError(
                f"environments must be at least {len(self.workloads)}, one for each workload, got {self.environments}"
            )

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--env {ENV}"

    @property
    def stem(self) -> str:
        """Start of a run's default name."""
        return f"roundknobs-{self.decoder}"


def round_settings(decoder: str = DEFAULT_DECODER, workloads: Sequence[str] = ()) -> RoundKnobSettings:
    """Settings for a decoder; by default on its own workloads."""
    return RoundKnobSettings(decoder=decoder, workloads=tuple(workloads))
