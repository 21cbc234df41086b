"""Settings for learning which draft proposes the next token."""

from __future__ import annotations

from dataclasses import dataclass, field

from specgym.envs import mixed_workloads

from ...training.settings_io import require_at_least, require_within
from .control_settings import ControlLearning, ControlSettings

ENV = "specgym/DraftChoice-v0"


@dataclass(frozen=True)
class ChoiceLearning(ControlLearning):
    """Proximal policy optimisation, as in Stable-Baselines3. Every round of drafting is an episode."""

    policy_layers: tuple[int, ...] = (48, 48)
    """Widths of the tanh layers of the network that scores each draft; live decoding runs them before every token."""


@dataclass(frozen=True)
class PlanSettings:
    """Estimate of what any policy could reach that sees what the learned one sees."""

    rounds: int = 12
    """Times that the plan is fitted anew, to what it does itself; 0 leaves the estimate out."""
    width: int = 48
    """Units in each of the two layers of the networks that are fitted."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "rounds", most=1000)
        require_at_least(self, 1, "width", most=2**12)


@dataclass(frozen=True)
class ChoiceSettings(ControlSettings):
    """Learn which draft proposes the next token, if any does. With no option at all: on recordings that ship."""

    EXPERIMENT = "choose-drafts"

    workloads: tuple[str, ...] = field(default_factory=mixed_workloads)
    """Workloads of pairs with several drafts to learn on, all together: pair/prompts, or pair/prompts@temperature."""
    total_timesteps: int = 3_000_000
    """Decisions learned from, for each seed, over all environments; rounded up to whole rollouts."""
    max_draft_length: int = 12
    """Tokens drafted in a round, at most; as many as a workload's recording holds, if those are fewer."""
    max_new_tokens: int = 64
    """Tokens of each text, at most; likewise."""
    missing_drafts: float = 0.6
    """Share of training texts that do without some of the drafts; each is then missing with a chance of 0.3."""
    learning: ChoiceLearning = field(default_factory=ChoiceLearning)
    """Learning algorithm."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    """Estimate of what is left to be learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, 0, 1, "missing_drafts")

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--env {ENV}"

    @property
    def stem(self) -> str:
        """Start of a run's default name."""
        return "draftchoice"
