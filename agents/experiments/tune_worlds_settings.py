"""Settings for learning to tune exact decoding in simulated worlds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import tyro

from specgym.decoding import seed_number
from specgym.envs import ENGINE_NAMES, held_out_workloads, training_workloads

from ..training.settings_io import SettingsError, require_at_least, require_several
from .experiment import MOST_ENVIRONMENTS, KnobLearning, RunSettings

ENV: Final = "specgym/SpeculativeWorlds-v0"
MOST_WORLDS: Final = 20_000
"""Acceptance worlds, which take a quarter of a megabyte each."""


def _worlds_learning() -> KnobLearning:
    return KnobLearning(
        rollout_steps=16,
        batch_size=4096,
        epochs=8,
        learning_rate=2e-3,
        learning_rate_end=1e-4,
        gamma=1.0,
        gae_lambda=0.95,
        std_low=0.03,
    )


@dataclass(frozen=True)
class WorldsSettings(RunSettings):
    """Learn to tune exact decoding in thousands of simulated worlds, for pairs, engines and hardware never seen.

    A world is the acceptance of a recorded pair, warped, on hardware drawn at random. Then tune a pair of your own:
    python evaluate.py <run> --pair <target>+<draft>.
    """

    EXPERIMENT = "tune-worlds"

    workloads: tuple[str, ...] = field(default_factory=training_workloads)
    """Recorded workloads that acceptance is warped from: pair/prompts, or pair/prompts@temperature."""
    total_timesteps: int = 5_000_000
    """Measurements and recommendations over all environments; rounded up to whole rollouts."""
    checkpoint_every: int = 1_000_000
    """Steps between two checkpoints, which --resume continues from."""
    environments: int = 1024
    """Sessions that practise side by side."""
    acceptance_worlds: int = 600
    """Acceptance worlds to practise in; hardware is drawn anew for every session. They are decoded when training
    begins, some twenty a second."""
    engines: tuple[str, ...] = ENGINE_NAMES
    """Engines whose settings are tuned: transformers, llama.cpp, openvino, vllm."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--seed",))] = (0,)
    """Random seeds; one policy is learned with each, one after another."""
    judged_worlds: int = 150
    """Worlds of each kind and seed that policies are judged on."""
    learning: KnobLearning = field(default_factory=_worlds_learning)
    """Learning algorithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "environments", most=MOST_ENVIRONMENTS)
        require_at_least(self, 1, "acceptance_worlds", "judged_worlds", most=MOST_WORLDS)
        require_several(self, seed_number, "seeds")
        for name in self.engines:
            if name not in ENGINE_NAMES:
                raise SettingsError(f"no engine {name!r}; there are: {', '.join(ENGINE_NAMES)}")
        if not self.engines:
            raise SettingsError(f"engines must be at least one of {', '.join(ENGINE_NAMES)}")
        if kept := set(self.workloads) & set(held_out_workloads()):
            raise SettingsError(f"{', '.join(sorted(kept))}: kept apart for judging what is learned; leave them out")

    @property
    def option(self) -> str:
        """The option of train.py that learns this."""
        return f"--env {ENV}"

    @property
    def stem(self) -> str:
        """Beginning of a run's default name."""
        return "worlds"
