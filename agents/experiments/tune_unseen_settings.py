"""Settings for learning to tune workloads never seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from specgym.envs import RewardSettings

from ..training.settings_io import require_at_least, require_one_bound, require_weights
from .settings import KnobLearning, RunSettings

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


def _tuner_learning() -> KnobLearning:
    return KnobLearning(
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
class TunerSettings(RunSettings):
    """Learn to tune thresholds on recorded workloads, so that a few measurements suffice on one never seen.

    Then tune pairs never seen: python evaluate.py <run> --pair <target>+<draft>.
    """

    EXPERIMENT = "tune-unseen"

    workloads: tuple[str, ...] = RECORDED_WORKLOADS
    """Workloads to practise on: pair/prompts, or pair/prompts@temperature. Each needs a trace of its training prompts
    and of its test prompts."""
    weights: tuple[float, ...] = ()
    """Practice of each workload, in proportion, one number each in their order; by default all alike."""
    recordings: Path | None = None
    """Folder of traces that `python -m specgym.envs.record` wrote. Defaults to those that ship with the package."""
    total_timesteps: int = 300_000
    """Measurements over all environments; rounded up to whole rollouts."""
    environments: int = 360
    """Environments that practise side by side, shared out among the workloads."""
    measurements: int = 8
    """Settings tried on a workload before one is recommended; the policy sees what they gave."""
    prompts_per_measurement: int = 4
    """Training prompts that a measurement decodes."""
    max_new_tokens: int = 32
    """Tokens generated for each prompt."""
    max_draft_length: int = 16
    """Tokens drafted every round, and the upper end of the rollback threshold."""
    seed: int = 0
    """Random seed of everything that is drawn."""
    checkpoint_every: int = 50_000
    """Measurements between two checkpoints, which --resume continues from."""
    max_divergence: float | None = None
    """Bound on the mean divergence from the target, above 0: ask for the fastest setting under it, instead of the
    reward's weights and ranges. A Lagrange multiplier per workload is learned during training."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Weights and ranges of the reward's terms."""
    learning: KnobLearning = field(default_factory=_tuner_learning)
    """Learning algorithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "measurements", "prompts_per_measurement", "max_new_tokens", "max_draft_length")
        require_at_least(self, 0, "seed")
        require_at_least(self, len(self.workloads), "environments")
        require_weights(self.weights, self.workloads)
        require_one_bound(self.max_divergence, self.reward.max_divergence)
        object.__setattr__(self, "reward", replace(self.reward, max_divergence=self.max_divergence))

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return "--tuner"

    @property
    def stem(self) -> str:
        """What the default name of a run begins with."""
        return "tuner"
