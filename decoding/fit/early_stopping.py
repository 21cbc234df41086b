"""Ending a training run when a held-out loss no longer falls, and going back to the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch


def verdict(first: float, best: float) -> str:
    """A sentence on what training did to the loss on text that was kept apart, before it and at its lowest."""
    if best < first:
        return f"On text kept apart the loss was {first:.3f} nats before training and {best:.3f} at its lowest."
    return (
        f"Training improved nothing: on text kept apart the loss was {first:.3f} nats before it and never lower after, "
        "so the weights are those that it began with. Try a lower --learning-rate, or more --texts."
    )


class EarlyStopping:
    """Watches a loss, and remembers the weights that had the lowest.

    Args:
        loss: measures it; deterministic, or a resumed run would differ.
        every: steps between two measurements.
        patience: measurements without a lower loss after which training ends; 0 never ends it.

    Attributes:
        first: the loss before training; infinite before it was measured.
        best: the lowest loss, that before training included; infinite before the first measurement.
    """

    def __init__(self, loss: Callable[[], float], every: int, patience: int) -> None:
        self._loss, self.every, self._patience = loss, every, patience
        self.first = self.best = math.inf
        self._misses = 0
        self._weights: dict[str, torch.Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether training should end."""
        return 0 < self._patience <= self._misses

    @property
    def improved(self) -> bool:
        """Whether training has brought the loss below what it was before."""
        return self.best < self.first

    def begin(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Measure the loss before training, so that what only makes things worse gives back what it began with."""
        self.check(weights)
        self.first = self.best

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Measure the loss, and copy the weights if it is the lowest so far."""
        found = self._loss()
        if found < self.best:
            self.best, self._misses = found, 0
            self._weights = {name: value.detach().clone() for name, value in weights.items()}
        else:
            self._misses += 1

    def take_best(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Measure once more, then give the weights the values that had the lowest loss, in place."""
        if not self.stopped:
            self.check(weights)
        with torch.no_grad():
            for name, value in self._weights.items():
                weights[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"first": self.first, "best": self.best, "misses": self._misses, "weights": self._weights}

    def restore(self, state: Mapping[str, Any], like: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state`, its tensors on the devices of those in ``like``."""
        self.first, self.best, self._misses = float(state["first"]), float(state["best"]), int(state["misses"])
        self._weights = {name: value.to(like[name].device) for name, value in state["weights"].items()}
