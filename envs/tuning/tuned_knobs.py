"""What tuning environments, a single one or many together, tell of the knobs that they tune."""

from __future__ import annotations

from specgym.decoding import Knob

from .knob_space import KnobMoves
from .reward import RewardSettings


class TunedKnobs:
    """Facts of an environment, for whoever tunes with it."""

    _moves: KnobMoves
    _settings: RewardSettings

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What is tuned, in the order of observations and actions."""
        return self._moves.knobs

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Between what a knob moves here, by name, in its own units."""
        return dict(self._moves.ranges)

    @property
    def scales(self) -> dict[str, float]:
        """By how much an action of 1 moves a knob, by name, in its own units; a logarithmic one in doublings."""
        return dict(self._moves.scales)

    @property
    def reward_settings(self) -> RewardSettings:
        """Weights and ranges of the reward."""
        return self._settings
