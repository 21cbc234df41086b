"""The exported policy that tunes exact decoding, and the one that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from specgym.envs import observation_names

from ..policy import KnobPolicy
from ..training.run_folder import RunFileError
from .knob_policy import ExportedPolicy, KnobRange

SHIPPED_TUNER: Final = Path(__file__).parent.parent / "data" / "tuner"
"""Folder of the policy that ships."""


class WorldsTuner:
    """A policy from what was measured of a world to the setting to try next, or to use.

    Args:
        policy: whose state is `observation_names()`.

    Attributes:
        ACTIONS: names of the entries of an action, as `WorldsVectorEnv` takes it.
        policy: as given.

    Raises:
        RunFileError: the policy sees or does something else.
    """

    ACTIONS: ClassVar = ("length", "threshold", "stop")

    def __init__(self, policy: ExportedPolicy) -> None:
        if list(policy.state) != observation_names() or tuple(knob.name for knob in policy.knobs) != self.ACTIONS:
            raise RunFileError(
                "the policy does not see or do what sessions in worlds of this version are about; learn one with "
                "train.py --env specgym/SpeculativeWorlds-v0"
            )
        self.policy = policy

    @classmethod
    def of(cls, policy: KnobPolicy) -> WorldsTuner:
        """Take the networks out of a trained policy. Errors as for `ExportedPolicy.of`."""
        actions = [KnobRange(name, -1.0, 1.0, 0.0, 1.0) for name in cls.ACTIONS]
        return cls(ExportedPolicy.of(policy, actions, observation_names()))

    @classmethod
    def load(cls, folder: str | Path) -> WorldsTuner:
        """Read what `save` wrote. Raises RunFileError where a file is missing, damaged or of another kind."""
        return cls(ExportedPolicy.load(folder))

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``."""
        self.policy.save(folder)

    def actions(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the actions for observations of sessions, shapes (n, entries) and (n, 3)."""
        return self.policy(observations)


def shipped_tuner() -> WorldsTuner:
    """Load the policy that ships with the package."""
    return WorldsTuner.load(SHIPPED_TUNER)
