"""The table of a tuner: what it recommends on every workload, beside the settings that need no measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table

from ..experiments.learned_tuner import LearnedSearcher, LearnedTuner
from .live import ALL, Row
from .measurements import Floats, Measurement
from .replayed import Problem

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


def rendered(rows: Sequence[Row], title: str) -> Table:
    """A rich table with a line a workload, and one for all."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workload", min_width=16, max_width=28, overflow="fold")
    for heading in (
        "learned fall-\nback, rollback",
        "speedup: default,\nlearned, best",
        "divergence: de-\nfault, learned",
        "share of the best:\ndefault, universal, learned",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(row.workload for row in rows):
        of = {row.method: row for row in rows if row.workload == name}
        default, learned = of["default"].values, of["learned"].values
        shares = [of[method].values["share_of_best"] for method in METHODS[:3]]
        if name == ALL:
            table.add_section()
        table.add_row(
            name,
            ", ".join(f"{value:.3g}" for value in of["learned"].knobs.values()) or "-",
            f"{default['speedup']:.2f}  {learned['speedup']:.2f}  {of['best'].values['speedup']:.2f}",
            f"{default['divergence']:.3f}  {learned['divergence']:.3f}",
            "  ".join(f"{share:.3f}" for share in shares),
        )
    table.caption = (
        "Held-out prompts, replayed; time is charged by the reference latency profiles. The share is of the reward of "
        "the best setting of a dense grid on the same prompts."
    )
    return table


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
