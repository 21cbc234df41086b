"""The comparison: every rule chosen on training prompts and judged on test prompts, all by replay.

Throughput is relative to plain decoding: all tokens over all seconds, in units of plain decoding's seconds per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import LatencyProfile, StopRule
from specgym.envs import Trace

from ..experiments.stop_drafts import StoppingSettings
from .stop_baselines import Clairvoyant, UpperConfidenceBound, simple_rules
from .stop_replay import Decoded, ReplayedPrompts

METHODS = ("autoregressive", "fixed", "confidence", "entropy", "product", "bandit", "learned", "oracle")
SIMPLE = ("fixed", "confidence", "entropy", "product")
ALL = "all"
RATIO, GAP = "learned / fixed", "gap closed"
_ORACLE_ROUNDS = 4

Samples = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One method on one workload at one batch size, or on all of them.

    Attributes:
        workload: its name, or `ALL` for the mean over the workloads and batch sizes.
        batch_size: sequences decoded together; 0 for the mean.
        method: one of `METHODS`.
        rule: the rule as it was chosen, with its number; empty for the mean.
        values: `throughput` relative to plain decoding, `draft_acceptance_rate` (0 to 1) and `draft_length` in drafted
            tokens a round; of the learned policies also `RATIO`, the throughput over that of the best fixed length, and
            `GAP`, what share of the way from the best fixed length to the oracle it goes.
        intervals: 95 %, of `throughput`, `RATIO` and `GAP`: bootstrap over prompts, and for the learned policies over
            seeds as well.
        by_seed: throughput of each learned policy, in the order of the seeds; empty for other methods.
    """

    workload: str
    batch_size: int
    method: str
    rule: str
    values: dict[str, float]
    intervals: dict[str, Interval]
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """What was chosen on the training prompts of a workload at a batch size.

    Attributes:
        simple: by method, the best of the simple rules.
        bandit: having decoded the training prompts once.
    """

    simple: dict[str, StopRule]
    bandit: UpperConfidenceBound


def choose(prompts: ReplayedPrompts) -> Chosen:
    """Choose every rule's number by its throughput, and let the bandit learn.

    Args:
        prompts: for training.
    """
    families = simple_rules(prompts.max_draft_length)
    found = prompts.decode([rule for rules in families.values() for rule in rules])
    best, place = {}, 0
    for method, rules in families.items():
        throughputs = [decoded.throughput for decoded in found[place : place + len(rules)]]
        best[method] = rules[int(np.argmax(throughputs))]
        place += len(rules)
    bandit = UpperConfidenceBound(prompts.max_draft_length)
    prompts.decode([bandit])
    return Chosen(best, bandit)


def oracle(prompts: ReplayedPrompts) -> tuple[Clairvoyant, Decoded]:
    """The oracle at the rate of its own throughput, and what it reaches, by Dinkelbach's algorithm."""
    rate = 1.0
    for _ in range(_ORACLE_ROUNDS):
        rule = Clairvoyant(prompts.round_seconds, rate)
        decoded = prompts.decode([rule])[0]
        rate = decoded.throughput
    return rule, decoded


def compare(
    settings: StoppingSettings,
    learned: Sequence[StopRule],
    profiles: Sequence[LatencyProfile],
    train: Sequence[Trace],
    test: Sequence[Trace],
    tell: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Judge every method on the test prompts of every workload.

    Args:
        settings: of the run.
        learned: one rule a seed.
        profiles: of each workload.
        train: traces of the training prompts of each workload, on which rules are chosen.
        test: traces of the test prompts of each workload.
        tell: called with the name of each workload before it is judged.

    Returns:
        A row for each method, workload and batch size; then one for each method with the means over them.
    """
    draws = np.random.default_rng(0)
    resamples = settings.comparison.resamples
    # The same policies decode every workload, so which of them a resample has is drawn once for all.
    seeds = draws.integers(len(learned), size=(resamples, len(learned)))
    rows: list[Row] = []
    samples: list[dict[str, Samples]] = []
    for name, profile, train_trace, test_trace in zip(settings.workloads, profiles, train, test, strict=True):
        tell(name)
        prompts = draws.integers(test_trace.prompts, size=(resamples, test_trace.prompts))
        for batch_size in settings.batch_sizes:
            training, testing = (replayed(settings, trace, profile, batch_size) for trace in (train_trace, test_trace))
            chosen = choose(training)
            rules: dict[str, StopRule] = {**chosen.simple}
            # One at a time, so that the dice of one rule do not depend on which others there are.
            methods = {method: testing.decode([rule]) for method, rule in rules.items()}
            methods["bandit"] = testing.decode([chosen.bandit], afresh=False)
            methods["learned"] = [testing.decode([rule])[0] for rule in learned]
            knowing, decoded = oracle(testing)
            methods["oracle"] = [decoded]
            rules |= {"bandit": chosen.bandit, "learned": learned[0], "oracle": knowing}
            drawn = {
                method: _resampled(many, prompts, seeds if method == "learned" else None)
                for method, many in methods.items()
            }
            samples.append(_with_ratios(drawn))
            rows += _rows(name, batch_size, rules, methods, samples[-1])
    return [*rows, *_means(rows, samples)]


def replayed(settings: StoppingSettings, trace: Trace, profile: LatencyProfile, batch_size: int) -> ReplayedPrompts:
    """The prompts of a trace, decoded as a run's settings say."""
    return ReplayedPrompts(
        trace,
        profile,
        batch_size,
        settings.max_draft_length,
        settings.tokens,
        settings.decision_seconds,
        settings.comparison.passes,
    )


def _resampled(many: Sequence[Decoded], prompts: NDArray[np.int64], seeds: NDArray[np.int64] | None) -> Samples:
    """Throughput in every resample, shape (resamples,): of one rule, or the mean over drawn policies."""
    each = np.stack([one.tokens[prompts].sum(1) / one.seconds[prompts].sum(1) for one in many], axis=1)
    return each[:, 0] if seeds is None else np.take_along_axis(each, seeds, axis=1).mean(1)


def _with_ratios(throughput: Mapping[str, Samples]) -> dict[str, Samples]:
    fixed, learned, best = (throughput[method] for method in ("fixed", "learned", "oracle"))
    return {**throughput, RATIO: learned / fixed, GAP: gap_closed(fixed, learned, best)}


def gap_closed(fixed: Samples, learned: Samples, best: Samples) -> Samples:
    """What share of the way from the best fixed length to the oracle the learned policy goes; 0 where there is none."""
    gap = best - fixed
    return np.divide(learned - fixed, gap, out=np.zeros_like(gap), where=gap > 0)


def _rows(
    name: str,
    batch_size: int,
    rules: Mapping[str, StopRule],
    methods: Mapping[str, Sequence[Decoded]],
    samples: Mapping[str, Samples],
) -> list[Row]:
    reached = {method: [one.throughput for one in many] for method, many in methods.items()}
    rows = [Row(name, batch_size, "autoregressive", "no draft", {"throughput": 1.0}, {})]
    for method in METHODS[1:]:
        many = methods[method]
        values = {
            "throughput": float(np.mean(reached[method])),
            "draft_acceptance_rate": float(np.mean([one.draft_acceptance_rate for one in many])),
            "draft_length": float(np.mean([one.draft_length for one in many])),
        }
        intervals = {"throughput": _interval(samples[method])}
        if method == "learned":
            fixed, learned, best = (np.array([np.mean(reached[other])]) for other in ("fixed", "learned", "oracle"))
            values |= {RATIO: float((learned / fixed)[0]), GAP: float(gap_closed(fixed, learned, best)[0])}
            intervals |= {column: _interval(samples[column]) for column in (RATIO, GAP)}
        by_seed = tuple(reached[method]) if method == "learned" else ()
        rows.append(Row(name, batch_size, method, rules[method].name, values, intervals, by_seed))
    return rows


def _means(rows: Sequence[Row], samples: Sequence[Mapping[str, Samples]]) -> list[Row]:
    """The mean over the workloads of each column; the gap is the one between the means, as some have next to none."""
    drawn = {name: np.mean([sample[name] for sample in samples], axis=0) for name in samples[0]}
    drawn[GAP] = gap_closed(drawn["fixed"], drawn["learned"], drawn["oracle"])
    values = {
        method: {name: float(np.mean([row.values[name] for row in found])) for name in found[0].values}
        for method, found in ((method, [row for row in rows if row.method == method]) for method in METHODS)
    }
    ends = (np.array([values[method]["throughput"]]) for method in ("fixed", "learned", "oracle"))
    values["learned"][GAP] = float(gap_closed(*ends)[0])
    means = []
    for method in METHODS:
        found = [row for row in rows if row.method == method]
        intervals = {name: _interval(drawn[method if name == "throughput" else name]) for name in found[0].intervals}
        by_seed = tuple(np.mean([row.by_seed for row in found], axis=0).tolist()) if found[0].by_seed else ()
        means.append(Row(ALL, 0, method, "", values[method], intervals, by_seed))
    return means


def _interval(samples: Samples) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
