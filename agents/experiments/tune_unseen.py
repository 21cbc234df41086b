"""Everything that a run of learning to tune is made of: the command line's options, and its ``settings.json``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from specgym.envs import RewardSettings

from ..training.settings_checks import (
    SettingsError,
    require_at_least,
    require_folder_name,
    require_one_bound,
    require_weights,
)
from ..training.settings_io import StoredSettings
from .settings import LearningSettings

FORMAT = "specgym-tuner-settings-1"
_PAIRS = (
    "tiny",
    "tiny-10m-2l",
    "tiny-10m-xs",
    "tiny-10m-3m",
    "tiny-10m-ngram",
    "tiny-10m-lookup",
    "tiny-3m-1l",
    "tiny-3m-ngram",
    "tiny-3m-lookup",
    "smollm2-ngram",
    "smollm2-lookup",
)
_SETS = ("prose", "code", "definitions", "chat")
RECORDED_WORKLOADS = (*(f"{pair}/{prompts}" for pair in _PAIRS for prompts in _SETS), "tiny/prose@1.0")
"""Every workload whose traces ship with the package."""


def _tuner_learning() -> LearningSettings:
    return LearningSettings(
        rollout_steps=18,
        batch_size=1024,
        epochs=3,
        learning_rate=1e-3,
        plateau_patience=5,
        gamma=0.5,
        gae_lambda=0.9,
        std_low=0.03,
    )


@dataclass(frozen=True)
class TunerSettings(StoredSettings):
    """Learn to tune thresholds on recorded workloads, so that a few measurements suffice on one never seen."""

    FORMAT = FORMAT
    ABOUT = "a run of learning to tune"
    MADE_BY = "train.py --tuner"

    workloads: tuple[str, ...] = RECORDED_WORKLOADS
    """What to practise on: pair/prompts, or pair/prompts@temperature. Each needs a trace of its training prompts and of
    its test prompts."""
    weights: tuple[float, ...] = ()
    """How often each workload is practised, in proportion, one number each in their order; by default all alike."""
    traces: Path | None = None
    """Folder of traces that `python -m specgym.envs.record` wrote; by default those that ship with the package."""
    total_timesteps: int = 300_000
    """Measurements over all environments; rounded up to whole rollouts."""
    environments: int = 360
    """Environments that practise side by side, shared out among the workloads."""
    measurements: int = 8
    """Settings tried on a workload before one is recommended; the policy sees what they gave."""
    prompts_per_measurement: int = 4
    """Training prompts that a measurement decodes."""
    tokens_per_prompt: int = 32
    """Tokens generated for each."""
    draft_length: int = 16
    """Tokens drafted every round (K), and the upper end of the rollback threshold."""
    seed: int = 0
    """Fixes every random choice."""
    name: str = ""
    """Of the run; by default the date and time."""
    runs: Path = Path("runs")
    """Folder of all runs. This one goes to <runs>/<name>."""
    checkpoint_every: int = 50_000
    """Measurements between two checkpoints, which --resume continues from."""
    threads: int = 1
    """Torch's threads; 0 for torch's own choice. Networks this small gain nothing from more."""
    max_divergence: float | None = None
    """Ask for the fastest thresholds whose mean divergence from the target stays under this bound, above 0, instead of
    the reward's weights and ranges. The price of going beyond is learned along, one for each workload."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""
    learning: LearningSettings = field(default_factory=_tuner_learning)
    """How it learns."""

    def __post_init__(self) -> None:
        if not self.workloads:
            raise SettingsError("workloads is empty; name at least one, for instance tiny/prose")
        repeated = sorted({name for name in self.workloads if self.workloads.count(name) > 1})
        if repeated:
            raise SettingsError(f"workload {repeated[0]!r} is given twice; name each once")
        require_at_least(
            self, 1, "total_timesteps", "checkpoint_every", "measurements", "prompts_per_measurement",
            "tokens_per_prompt", "draft_length",
        )  # fmt: skip
        require_at_least(self, 0, "seed", "threads")
        require_at_least(self, len(self.workloads), "environments")
        require_folder_name(self.name)
        require_weights(self.weights, self.workloads)
        require_one_bound(self.max_divergence, self.reward.max_divergence)
        object.__setattr__(self, "reward", replace(self.reward, max_divergence=self.max_divergence))
