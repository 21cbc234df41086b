"""A decoder's outcomes on toy models, and the environments that replay them beside the live one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from specgym.decoding.decoder import Decoder
from specgym.decoding.decoders.traits import SpeculativeTraits
from specgym.decoding.latency.profile import LatencyProfile
from specgym.decoding.loading.pair import Pair
from specgym.envs import Outcomes, Workload
from specgym.envs.tuning.vector_env import TuningVectorEnv

TOKENS = 16
"""Tokens recorded of a prompt, and decoded in a step."""


@contextmanager
def lengths_alone() -> Iterator[None]:
    """Let exact decoding have a single knob, of which every value can be recorded."""
    knobs = SpeculativeTraits.knobs_without_pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativeTraits, "knobs_without_pair", lambda *decoder, **options: knobs(**options)[:1])
        yield


@dataclass(frozen=True)
class Recorded:
    """Outcomes recorded of a decoder, and arguments of its environments."""

    env: str
    """Id of the environments."""
    outcomes: Outcomes
    workload: Workload
    profile: LatencyProfile
    build: Callable[[Pair], Decoder]
    """Build the decoder itself."""
    middle: Mapping[str, float]
    """A setting that was not recorded, or any."""
    lossless: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of its environments."""

    @property
    def decoder(self) -> str:
        """Name of the decoder."""
        return self.outcomes.info.decoder

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the knobs, in order."""
        return tuple(knob.name for knob in self.outcomes.info.knobs)

    def still(self, *environments: int) -> NDArray[np.float32]:
        """The action that moves nothing, shape (*environments, knobs)."""
        return np.zeros((*environments, len(self.names)), np.float32)

    def live(self, **changes: Any) -> gymnasium.Env:
        """The environment that runs the models."""
        usual = {"workload": self.workload, "profile": self.profile, "max_new_tokens": TOKENS, **self.more}
        return gymnasium.make(self.env, **{**usual, **changes})

    def single(self, **changes: Any) -> gymnasium.Env:
        """A single environment that replays the outcomes."""
        return gymnasium.make(self.env, backend="replay", **{**self._replayed, **changes})

    def many(self, num_envs: int, **changes: Any) -> TuningVectorEnv:
        """Environments that replay the outcomes and step together."""
        env = gymnasium.make_vec(self.env, num_envs=num_envs, **{**self._replayed, **changes})
        assert isinstance(env, TuningVectorEnv)
        return env

    @property
    def _replayed(self) -> dict[str, Any]:
        return {"recording": self.outcomes, "profile": self.profile, "max_new_tokens": TOKENS, **self.more}
