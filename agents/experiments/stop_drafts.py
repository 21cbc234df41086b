"""Everything that a run of learning to stop is made of: the command line's options, and its ``settings.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from specgym.decoding import find_hardware
from specgym.envs import LONGEST, SHIPPED_WORKLOADS

from ..training.settings_checks import (
    SettingsError,
    require_above_zero,
    require_at_least,
    require_folder_name,
    require_within,
)
from ..training.settings_io import StoredSettings, flat, to_json

FORMAT = "specgym-stopping-settings-1"


@dataclass(frozen=True)
class StoppingLearning:
    """Proximal policy optimisation, as in Stable-Baselines3. Every round of drafting is an episode."""

    rollout_steps: int = 64
    """Decisions of every environment between two updates."""
    batch_size: int = 4096
    """Decisions in a minibatch."""
    epochs: int = 4
    """Passes over a rollout in one update."""
    learning_rate: float = 4e-3
    """Of Adam, at the beginning; it falls linearly to 0."""
    gamma: float = 1.0
    """Discount. A round is short, and its last token counts as much as its first."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation: 0 trusts the value network, 1 the rewards."""
    clip_range: float = 0.2
    """How far an update may move an action's probability ratio from 1."""
    entropy_coefficient: float = 0.02
    """Of the bonus for undecided policies."""
    rate_smoothing: float = 0.5
    """How far a workload's rate moves to the throughput of a rollout; 1 for all the way."""
    policy_layers: tuple[int, ...] = (32, 32)
    """Widths of the policy's tanh layers; live decoding runs them after every drafted token."""
    value_layers: tuple[int, ...] = (64, 64)
    """Widths of the value network's, which only training runs."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rollout_steps", "epochs")
        require_at_least(self, 2, "batch_size")
        require_within(self, 0, 1, "gamma", "gae_lambda", "rate_smoothing")
        require_within(self, 0, math.inf, "entropy_coefficient")
        require_above_zero(self, "learning_rate", "clip_range", "rate_smoothing")
        for name in ("policy_layers", "value_layers"):
            widths = getattr(self, name)
            if not widths or any(width < 1 for width in widths):
                raise SettingsError(f"{name} must be one or more widths of at least 1, got {widths}")


@dataclass(frozen=True)
class ComparisonSettings:
    """How the learned policies are judged beside other rules."""

    passes: int = 32
    """How often every prompt is decoded where tokens are sampled, each time with other dice; greedy decoding is always
    the same, so once is enough there."""
    resamples: int = 1000
    """For the intervals."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "passes")
        require_at_least(self, 10, "resamples")


@dataclass(frozen=True)
class StoppingSettings(StoredSettings):
    """Learn when to stop a draft, from recorded texts. With no option at all: on the pairs that ship."""

    FORMAT = FORMAT
    ABOUT = "learning to stop"
    MADE_BY = "train.py --env specgym/DraftLength-v0"

    workloads: tuple[str, ...] = SHIPPED_WORKLOADS
    """What to learn on, all together: pair/prompts, or pair/prompts@temperature."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One policy is learned for each, one after another; each seed fixes every random choice."""
    total_timesteps: int = 2_500_000
    """Decisions learned from, for each seed, over all environments; rounded up to whole rollouts."""
    environments: int = 512
    """Texts decoded side by side, spread evenly over workloads and batch sizes."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences decoded together. With several, the policy learns what each changes, and the table has rows for each;
    measuring larger ones on this machine takes up to a minute more for each pair."""
    hardware: str | None = None
    """What time is charged by: a name such as h100-sxm (computed from the size of each pair's models, 512 tokens read
    before; a wrong name lists them all), or nothing for the latency measured on this machine."""
    max_draft_length: int = 16
    """Tokens drafted in a round, at most."""
    tokens: int = 64
    """Of each text, at most."""
    decision_seconds: float = 0.0
    """Charged for every decision, whichever rule takes it, in training and in the table."""
    traces: Path | None = None
    """Folder of traces, as `python -m specgym.envs.record` writes them; by default those that ship."""
    name: str = ""
    """Of the run; by default the date and time."""
    runs: Path = Path("runs")
    """Folder of all runs. This one goes to <runs>/<name>."""
    threads: int = 1
    """Torch's threads, for learning and where latency is measured; 0 for torch's own choice."""
    refresh_latency: bool = False
    """Measure the latency profiles now, even if the cache has them: for instance where the machine was busy before."""
    learning: StoppingLearning = field(default_factory=StoppingLearning)
    """How it learns."""
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    """How the result is judged."""

    def __post_init__(self) -> None:
        for name in ("workloads", "seeds", "batch_sizes"):
            values = getattr(self, name)
            if not values:
                raise SettingsError(f"{name} is empty; give at least one")
            repeated = [value for value in values if values.count(value) > 1]
            if repeated:
                raise SettingsError(f"{name} has {repeated[0]!r} twice; give each once")
        if min(self.seeds) < 0:
            raise SettingsError(f"seeds must be at least 0, got {self.seeds}")
        if min(self.batch_sizes) < 1:
            raise SettingsError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        require_at_least(self, 1, "total_timesteps", "tokens")
        require_at_least(self, 2, "max_draft_length")
        require_at_least(self, 0, "threads")
        if self.max_draft_length > LONGEST:
            raise SettingsError(f"max_draft_length must be at most {LONGEST}, got {self.max_draft_length}")
        require_within(self, 0, math.inf, "decision_seconds")
        if self.hardware is not None:
            find_hardware(self.hardware)
        points = len(self.workloads) * len(self.batch_sizes)
        if self.environments < points:
            raise SettingsError(
                f"environments must be at least {points}, one for each workload with each batch size, got "
                f"{self.environments}"
            )
        require_folder_name(self.name)


def continued(saved: StoppingSettings, given: StoppingSettings) -> StoppingSettings:
    """The settings with which a saved run goes on: its own, or those given if they only add seeds.

    Raises:
        SettingsError: a given setting contradicts the run's.
    """
    if not set(saved.seeds) <= set(given.seeds):
        raise SettingsError(f"the run has the seeds {saved.seeds}; seeds can only be added, got {given.seeds}")
    theirs, ours = flat(to_json(replace(given, seeds=saved.seeds))), flat(to_json(saved))
    conflicts = sorted(name for name, value in theirs.items() if value != ours[name])
    if conflicts:
        name = conflicts[0]
        raise SettingsError(
            f"the run was started with {name} = {ours[name]}, and cannot go on with {theirs[name]}. Leave the option "
            "out, or start a new run without --resume; only --seeds may be added."
        )
    return given
