"""Orders of prompts: all prompts in random order before any comes again. Every environment takes its prompts here.

The seed of environments that step together, which fixes their orders.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, whole_number

Integers = NDArray[np.int64]


class PromptOrder:
    """Endless random orders for readers, which each get all prompts of their workload before any of them again.

    Args:
        prompts: prompt numbers of every workload, at least one each.
        readers: how many take prompts, each in its own order; None for one reader per workload, whose order the
            environments of the workload share.
    """

    def __init__(self, prompts: Sequence[Integers], readers: int | None = None) -> None:
        self._prompts = prompts
        self._shared = readers is None
        count = len(prompts) if readers is None else readers
        # Back to front, so that the number of those left says where an order stands.
        self._orders = np.zeros((count, max(map(len, prompts))), np.int64)
        self._left = np.zeros(count, np.int64)
        self._fewest = 0  # left of any order
        self._readers = np.arange(count)

    def restart(self, readers: NDArray[np.bool_] | slice = slice(None)) -> None:
        """Let some readers, by default all, begin a new order with their next prompt."""
        self._left[readers] = 0
        self._fewest = int(self._left.min())

    def take(self, workload_of: Integers, count: int, rng: np.random.Generator) -> Integers:
        """Return the next prompts of every reader.

        Args:
            workload_of: workload of every reader, shape (readers,); `restart` those whose workload changed.
            count: prompts for every reader.
            rng: draws the orders.

        Returns:
            Prompt numbers, shape (readers, count).
        """
        columns = []
        for _ in range(count):
            if self._fewest == 0:
                self._draw(workload_of, rng)
            self._left -= 1
            self._fewest -= 1
            columns.append(self._orders[self._readers, self._left])
        return columns[0][:, None] if count == 1 else np.stack(columns, 1)

    def take_shared(self, workload_of: Integers, rng: np.random.Generator) -> Integers:
        """Return one prompt for every environment, from the orders of their workloads.

        Args:
            workload_of: workload of every environment that wants a prompt, shape (environments,).
            rng: draws the orders.

        Returns:
            Prompt numbers, shape (environments,).
        """
        chosen = np.empty(len(workload_of), np.int64)
        for workload, prompts in enumerate(self._prompts):
            members = np.flatnonzero(workload_of == workload)
            parts = [np.empty(0, np.int64)]
            missing = len(members)
            while missing:
                if not self._left[workload]:
                    self._orders[workload, : len(prompts)] = prompts[rng.permutation(len(prompts))[::-1]]
                    self._left[workload] = len(prompts)
                left = int(self._left[workload])
                taken = min(left, missing)
                parts.append(self._orders[workload, left - taken : left][::-1])
                self._left[workload] -= taken
                missing -= taken
            chosen[members] = np.concatenate(parts)
        return chosen

    def _draw(self, workload_of: Integers, rng: np.random.Generator) -> None:
        """Draw new orders for the readers that have used theirs up."""
        used_up = np.flatnonzero(self._left == 0)
        for workload in np.unique(workload_of[used_up]):
            members, prompts = used_up[workload_of[used_up] == workload], self._prompts[workload]
            orders = prompts[rng.random((len(members), len(prompts))).argsort(1)]
            self._orders[members, : len(prompts)] = orders[:, ::-1]
            self._left[members] = len(prompts)
        self._fewest = int(self._left.min())


def shared_seed(seed: Any, environments: int) -> int | None:
    """Return the seed of the one generator that environments which step together share.

    Args:
        seed: a whole number of at least 0; one for each environment; or None, like a list of nothing else, for no seed.
            Number s is short for s, s + 1, s + 2 and so on, as in `gymnasium.vector.SyncVectorEnv`. Seeds of a list
            fix all draws together: those of an environment depend on the seeds of the others, too.
        environments: how many there are.

    Raises:
        ArgumentError: too many or too few seeds, or one that is no such number.
    """
    if seed is None:
        return None
    if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str) or np.ndim(seed) == 0:
        return whole_number("seed", seed, at_least=0, hint="or give a list with a seed for each environment")
    if len(seed) != environments:
        raise ArgumentError(
            f"seed: {len(seed)} were given for {environments} environments; give each one, or one for all"
        )
    if all(item is None for item in seed):
        return None
    numbers = [whole_number(f"seed of environment {place}", item, at_least=0) for place, item in enumerate(seed)]
    if numbers == list(range(numbers[0], numbers[0] + environments)):
        return numbers[0]
    return int.from_bytes(np.random.SeedSequence(numbers).generate_state(4).astype("<u4").tobytes(), "little")


def prompts_at(first: int, count: int, prompts: int, seed: int) -> list[int]:
    """Return some prompts of the endless order that a seed fixes, without keeping any state.

    Args:
        first: place of the first prompt in the order, from 0.
        count: how many.
        prompts: number of prompts, all of which come before any comes again.
        seed: of the order.
    """
    chosen: list[int] = []
    for place in range(first, first + count):
        turn, within = divmod(place, prompts)
        chosen.append(int(_turn(seed, turn, prompts)[within]))
    return chosen


@functools.lru_cache(maxsize=4096)
def _turn(seed: int, turn: int, prompts: int) -> Integers:
    return np.random.default_rng([seed, turn]).permutation(prompts)
