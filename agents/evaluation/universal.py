"""The best single setting for all workloads at once, which needs no measurement, and what it loses on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .replayed import Problem


def universal_setting(problems: Sequence[Problem]) -> dict[str, float]:
    """The setting of the grid with the highest mean share of each workload's best reward, on the training prompts.

    With a bound on the divergence the steep penalty makes it the one that breaks the bounds least, and among those that
    keep all of them the fastest.

    Args:
        problems: to learn from, all with the same grid.

    Raises:
        ValueError: there is no problem, or their grids differ.
        TuningProblemError: a reward is not positive.
    """
    if not problems:
        raise ValueError("a universal setting needs at least one problem to learn from")
    grids = [problem.train_grid() for problem in problems]
    if len({grid.reward.shape for grid in grids}) > 1:
        raise ValueError("a universal setting needs problems with the same grid; give all the same draft_length")
    shares = np.mean([grid.reward / grid.best_reward for grid in grids], axis=0)
    return grids[0].settings()[int(np.argmax(shares))]


def losses(problems: Sequence[Problem], knobs: Mapping[str, float]) -> dict[str, float]:
    """What a setting loses on the held-out prompts of each workload, as a share of the best reward; by workload.

    Args:
        problems: to judge on.
        knobs: the setting.
    """
    return {problem.name: 1 - float(problem.worth([knobs]).fraction[0]) for problem in problems}
