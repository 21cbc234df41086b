"""The table of a tuner: what it recommends on every workload, beside the settings that need no measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..experiments.learned_tuner import LearnedSearcher, LearnedTuner
from .measurements import Floats, Measurement
from .replayed import Problem
from .results import ALL, Column, Row

METHODS = ("default", "universal", "learned", "best")
"""`universal` is the best single setting over the training prompts of all workloads; `best` is the best of a dense grid
on the very prompts that the others are judged on, which none of them could know."""
COLUMNS = (
    "ms_per_token",
    "speedup",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "divergence",
    "reward",
    "share_of_best",
)
TABLE = (
    Column("speedup", "speedup: default,\nlearned, best", methods=("default", "learned", "best")),
    Column("divergence", "divergence: de-\nfault, learned", ".3f", methods=("default", "learned")),
    Column("share_of_best", "share of the best:\ndefault, universal, learned", ".3f", methods=METHODS[:3]),
)
CAPTION = (
    "Held-out prompts, replayed; time is charged by the reference latency profiles. The share is of the reward of the "
    "best setting of a dense grid on the same prompts."
)
_RESAMPLES = 1000


def session(tuner: LearnedTuner, problem: Problem, measurements: int, seed: int) -> list[dict[str, float]]:
    """Tune a workload: the settings measured, in order, and at the end the one recommended."""
    searcher = LearnedSearcher(tuner, problem)
    history: list[Measurement] = []
    for number in range(measurements):
        history.append(problem.measure(searcher.propose(history), number, seed))
    return [*(each.knobs for each in history), searcher.recommend(history)]


def table_rows(
    problems: Sequence[Problem], recommended: Mapping[str, Mapping[str, float]], universal: Mapping[str, float]
) -> list[Row]:
    """Every method on the held-out prompts of every workload, by replay, and their means.

    Args:
        problems: the workloads.
        recommended: what the tuner recommends, by workload.
        universal: the best single setting.

    Returns:
        Four rows a workload, with 95 % bootstrap intervals over its held-out prompts, and four with the means over the
        workloads where there are several.
    """
    rows = []
    for problem in problems:
        settings = [problem.default, dict(universal), dict(recommended[problem.name]), problem.grid().best]
        columns = _columns(problem, settings)
        for place, (method, knobs) in enumerate(zip(METHODS, settings, strict=True)):
            # The first way takes every prompt once, the others are resamples.
            values = {name: float(column[place, 0]) for name, column in columns.items()}
            ends = {name: np.percentile(column[place, 1:], [2.5, 97.5]) for name, column in columns.items()}
            intervals = {name: (float(low), float(high)) for name, (low, high) in ends.items()}
            rows.append(Row(problem.name, method, dict(knobs), values, intervals))
    if len(problems) > 1:
        for method in METHODS:
            of_method = [row.values for row in rows if row.method == method]
            means = {name: float(np.mean([values[name] for values in of_method])) for name in COLUMNS}
            rows.append(Row(ALL, method, {}, means, {}))
    return rows


def verdict(rows: Sequence[Row], max_divergence: float | None) -> str:
    """What was learned, in a sentence or two."""
    chosen = [row for row in rows if row.workload == ALL] or list(rows)
    share = {row.method: row.values["share_of_best"] for row in chosen}
    sentence = (
        f"Share of the best that the grid has: learned {share['learned']:.3f}, one setting for all "
        f"{share['universal']:.3f}, default {share['default']:.3f}. These workloads were practised on; for others see "
        "--transfer."
    )
    if max_divergence is not None:
        learned = [row for row in rows if row.method == "learned" and row.workload != ALL]
        kept = sum(row.values["divergence"] <= max_divergence for row in learned)
        sentence += (
            f" The bound of {max_divergence:g} on the divergence is kept on the held-out prompts of {kept} of "
            f"{len(learned)} workloads."
        )
    return sentence


def _columns(problem: Problem, settings: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Every column on all held-out prompts and on resamples of them, shape (settings, 1 + resamples)."""
    sums = problem.sums(settings)
    prompts = sums["tokens"].shape[1]
    drawn = np.random.default_rng(0).integers(prompts, size=(_RESAMPLES, prompts))
    ways = np.concatenate([np.arange(prompts)[None], drawn])
    values, reward = problem.valued(settings, {name: value[:, ways].sum(2) for name, value in sums.items()})
    found = {**values, "reward": reward, "share_of_best": problem.share_of_best(values, reward)}
    return {name: found[name] for name in COLUMNS}
