"""The prompts of many environments at once, each in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .tuning.knob_space import prompt_orders

Integers = NDArray[np.int64]


class PromptQueues:
    """For each environment all prompts of its workload before any comes again, then all of them in another order.

    Args:
        prompts: of each workload, as numbers; at least one each.
        environments: how many.
    """

    def __init__(self, prompts: Sequence[Integers], environments: int) -> None:
        self._prompts = prompts
        # Back to front, so that the number of those left is all there is to know of where an order stands.
        self._orders = np.zeros((environments, max(len(each) for each in prompts)), np.int64)
        self._left = np.zeros(environments, np.int64)
        self._each = np.arange(environments)

    def forget(self, environments: NDArray[np.bool_] | slice = slice(None)) -> None:
        """Let some environments, by default all, begin a new order with their next prompt."""
        self._left[environments] = 0

    def take(self, workload_of: Integers, count: int, random: np.random.Generator) -> Integers:
        """The next prompts of every environment.

        Args:
            workload_of: the workload of each environment, shape (environments,); `forget` those that changed.
            count: prompts for each.
            random: draws the orders.

        Returns:
            The prompts' numbers, shape (environments, count).
        """
        chosen = np.empty((len(self._each), count), np.int64)
        for column in range(count):
            if not self._left.all():
                self._draw(workload_of, random)
            self._left -= 1
            chosen[:, column] = self._orders[self._each, self._left]
        return chosen

    def _draw(self, workload_of: Integers, random: np.random.Generator) -> None:
        """New orders for the environments that have none left."""
        used_up = np.flatnonzero(self._left == 0)
        for workload in np.unique(workload_of[used_up]):
            members, prompts = used_up[workload_of[used_up] == workload], self._prompts[workload]
            orders = prompts[prompt_orders(random, len(members), len(prompts))]
            self._orders[members, : len(prompts)] = orders[:, ::-1]
            self._left[members] = len(prompts)
