"""The comparison of stop rules: chosen on training prompts, judged on test prompts, by replay and live.

Throughput is relative to plain decoding: all tokens over all seconds, in units of plain decoding's seconds per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from specgym.decoding import (
    AutoregressiveDecoder,
    Generation,
    LatencyProfile,
    Side,
    SpeculativeDecoder,
    StopRule,
)
from specgym.envs import Trace, workload

from ..live import clock_seconds, decode_repeatedly
from ..results import ALL, LEARNED, PLAIN, Column, ResultTable, Row
from .method_rows import Derived, MethodRows, Samples, gap_closed
from .stop_baselines import ReplayedPrompts, UpperConfidenceBound, choose, oracle

if TYPE_CHECKING:
    from ...experiments.control.stop_drafts_settings import StopSettings

METHODS = (PLAIN, "fixed", "confidence", "entropy", "product", "gain", "bandit", LEARNED, "oracle")
SIMPLE = ("fixed", "confidence", "entropy", "product", "gain")
RATIO, GAP = "learned / fixed", "gap closed"
LEAST_RATIO, LEAST_RATIO_EACH, LEAST_GAP = 1.03, 0.99, 0.30
"""Goals of learning: over the best fixed length on average and on every workload, and of the gap."""
REPEATS = 3
"""Times that every prompt is timed by the clock with a method; the median counts."""

_HEADINGS = ("plain", "fixed", "confi-\ndence", "en-\ntropy", "pro-\nduct", "gain", "bandit", "learned", "oracle")
TABLE = (
    (
        *(
            Column("throughput", heading, ".3f", method == LEARNED, (method,))
            for method, heading in zip(METHODS, _HEADINGS, strict=True)
        ),
        Column(RATIO, "learned\n/ fixed", ".3f", True, (LEARNED,)),
        Column(GAP, "gap\nclosed", ".0%", False, (LEARNED,)),
    ),
    ("throughput",),
)
"""Columns of the replayed comparison, and those that are compared with a stored one."""
AGREEMENT = (
    (
        Column("replayed", "replayed,\ncharged", ".3f"),
        Column("charged", "live,\ncharged", ".3f"),
        Column("clock", "live,\nclock", ".3f"),
        Column("clock_ms_per_token", "clock ms\n/token"),
    ),
    ("replayed", "charged"),
)
"""Goal of the live comparison."""
CAPTION = (
    "Tokens over seconds, relative to plain decoding, by replay of the test prompts. Fixed lengths and thresholds are "
    "the best ones on the training prompts; gain weighs what a token is expected to bring, as counted there, against "
    "what it costs; the bandit has decoded those once. Learned is the mean over the seeds. ± "
    "is half a 95 % interval over prompts and seeds."
)
LIVE_CAPTION = (
    "Throughput relative to plain decoding on the test prompts. Charged by the run's latency profile, or by the clock: "
    f"medians of {REPEATS}, all methods in turn."
)


def compare(
    settings: StopSettings,
    learned: Sequence[StopRule],
    profiles: Sequence[LatencyProfile],
    train: Sequence[Trace],
    test: Sequence[Trace],
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Judge every method on the test prompts of every workload.

    Args:
        settings: of the run.
        learned: one rule a seed.
        profiles: of each workload.
        train: traces of the training prompts of each workload, on which rules are chosen.
        test: traces of the test prompts of each workload.
        report: called with what is being done.

    Returns:
        A row for each workload, at each batch size, and method; then one for each method with the means over them.
        Values are `throughput` relative to plain decoding, `draft_acceptance_rate` (0 to 1) and `draft_length` in
        drafted tokens a round; of the learned policies also `RATIO`, the throughput over that of the best fixed length,
        and `GAP`, what share of the way from the best fixed length to the oracle it goes.
    """
    table = MethodRows(_ratios, (GAP,), len(learned), settings.comparison.resamples)
    for name, profile, train_trace, test_trace in zip(settings.workloads, profiles, train, test, strict=True):
        prompts = table.resampled(test_trace.prompts)
        for batch_size in settings.batch_sizes:
            place = f"{name} x {batch_size}" if len(settings.batch_sizes) > 1 else name
            report(f"Comparing on test prompts: {place}")
            training, testing = (replayed(settings, trace, profile, batch_size) for trace in (train_trace, test_trace))
            chosen = choose(training)
            rules: dict[str, StopRule] = {**chosen.simple}
            # One at a time, so that the draws of one rule do not depend on which others there are.
            methods = {method: testing.decode([rule]) for method, rule in rules.items()}
            methods["bandit"] = testing.decode([chosen.bandit], afresh=False)
            methods[LEARNED] = [testing.decode([rule])[0] for rule in learned]
            knowing, decoded = oracle(testing)
            methods["oracle"] = [decoded]
            rules |= {"bandit": chosen.bandit, LEARNED: learned[0], "oracle": knowing}
            table.add(place, {method: rule.name for method, rule in rules.items()}, methods, prompts)
    return table.rows()


def compare_live(
    settings: StopSettings,
    name: str,
    learned: StopRule,
    profile: LatencyProfile,
    train: Trace,
    test: Trace,
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Decode a workload's test prompts live with every method but the oracle, at batch size 1, beside their replay.

    The bandit begins anew, live and in its replay here, and learns from text to text, in replay from all side by side.
    Loads the pair; loading errors as for `load_pair`.

    Args:
        settings: of the run.
        name: of the workload.
        learned: the policy to decode with.
        profile: what the charged columns are charged by.
        train: trace of the training prompts, on which rules are chosen.
        test: trace of the test prompts, which are decoded.
        report: called with what is being done.

    Returns:
        A row a method, whose values are throughputs relative to plain decoding: `replayed` and `charged` (live), both
        charged by the profile, and `clock`, by the clock; and `clock_ms_per_token`.
    """
    chosen = workload(name)
    pair, prompts, point = chosen.load(), chosen.prompt_ids("test")[: test.prompts], profile.at(batch_size=1)
    rules: dict[str, StopRule] = {
        **choose(replayed(settings, train, profile, 1)).simple,
        "bandit": UpperConfidenceBound(settings.max_draft_length),
        LEARNED: learned,
    }
    replays = replayed(settings, test, profile, 1).decode(list(rules.values()))
    sides = {PLAIN: Side(AutoregressiveDecoder(pair))} | {
        method: Side(SpeculativeDecoder(pair, settings.max_draft_length, stop=rule, cost_ratio=point.marginal_cost()))
        for method, rule in rules.items()
    }
    generations = decode_repeatedly(
        sides,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        sampling=chosen.sampling,
        seeds=[test.info.seed + 10_000 * repeat for repeat in range(REPEATS)],
        report=lambda message: report(f"{name}: {message}"),
    )
    charged = {method: _charged(generations[method], point) for method in rules}
    replayed_at = {method: replay.throughput for method, replay in zip(rules, replays, strict=True)}
    return live_rows(name, generations, {method: rule.name for method, rule in rules.items()}, replayed_at, charged)


def live_rows(
    name: str,
    generations: Mapping[str, Sequence[Sequence[Generation]]],
    rules: Mapping[str, str],
    replayed: Mapping[str, float],
    charged: Mapping[str, float],
) -> list[Row]:
    """Rows of a workload that several methods decoded live, plain decoding first.

    Args:
        name: of the workload.
        generations: of plain decoding and of every method, as `decode_repeatedly` returns them.
        rules: in words, by method, in order.
        replayed: throughput by replay, relative to plain decoding.
        charged: throughput of the live texts by the profile, likewise.
    """
    plain = clock_seconds(generations[PLAIN])
    values = {"replayed": 1.0, "charged": 1.0, "clock": 1.0, "clock_ms_per_token": 1000 * plain}
    rows = [Row(name, PLAIN, values=values, rule="no draft")]
    for method, rule in rules.items():
        seconds = clock_seconds(generations[method])
        values = {
            "replayed": replayed[method],
            "charged": charged[method],
            "clock": plain / seconds,
            "clock_ms_per_token": 1000 * seconds,
        }
        rows.append(Row(name, method, values=values, rule=rule))
    return rows


def replayed(settings: StopSettings, trace: Trace, profile: LatencyProfile, batch_size: int) -> ReplayedPrompts:
    """The prompts of a trace, decoded as a run's settings say."""
    return ReplayedPrompts(
        trace,
        profile,
        batch_size,
        settings.max_draft_length,
        settings.max_new_tokens,
        settings.decision_seconds,
        settings.comparison.passes,
        settings.overlap,
        settings.begins_by,
    )


def stop_verdict(rows: Sequence[Row]) -> str:
    """Verdict: goals reached, where and by how much learning falls short, and what does better."""
    groups = ResultTable(rows).by_workload()
    mean = groups.pop(ALL)
    learned = mean[LEARNED].values
    worst = min((point[LEARNED] for point in groups.values()), key=lambda row: row.values[RATIO])
    short = []
    if learned[RATIO] < LEAST_RATIO:
        short.append(f"the mean is {LEAST_RATIO - learned[RATIO]:.3f} below {LEAST_RATIO:.2f}")
    low = sorted(
        (point[LEARNED].values[RATIO], name)
        for name, point in groups.items()
        if point[LEARNED].values[RATIO] < LEAST_RATIO_EACH
    )
    if low:
        short.append(f"below {LEAST_RATIO_EACH:.2f}: " + ", ".join(f"{name} ({ratio:.3f})" for ratio, name in low))
    if learned[GAP] < LEAST_GAP:
        short.append(f"of the gap to the oracle {LEAST_GAP:.0%} was wanted")
    sentence = (
        f"Learned stopping has {learned[RATIO]:.3f} times the throughput of the best fixed length on average, at least "
        f"{worst.values[RATIO]:.3f} times ({worst.workload}), and closes {learned[GAP]:.0%} of the gap to the oracle. "
    )
    sentence += f"It falls short: {'; '.join(short)}." if short else "All targets are met."
    best = max(SIMPLE[1:], key=lambda method: mean[method].values["throughput"])
    if round(mean[best].values["throughput"] - learned["throughput"], 3) > 0:
        sentence += (
            f" A simple rule is better on average: {best}, {mean[best].values['throughput']:.3f} against "
            f"{learned['throughput']:.3f}."
        )
    beaten = []
    for name, point in groups.items():
        ahead, method = max((point[simple].values["throughput"], simple) for simple in SIMPLE)
        if round(ahead - point[LEARNED].values["throughput"], 3) > 0:
            beaten.append(f"{name} ({point[method].rule}, {ahead:.3f})")
    if beaten:
        sentence += f" A rule chosen for the workload beats the learned policy on {', '.join(beaten)}."
    return sentence


def live_agreement(rows: Sequence[Row]) -> str:
    """Agreement of replay with live decoding, in a sentence; without the bandit, which has learned from other texts."""
    drafted = [row for row in rows if row.method not in (PLAIN, "bandit")]
    distance, off = max(
        ((abs(row.values["charged"] / row.values["replayed"] - 1), row) for row in drafted), key=lambda pair: pair[0]
    )
    return (
        f"Charged the same way, live decoding differs from its replay by at most {distance:.1%} ({off.method} on "
        f"{off.workload})."
    )


def _ratios(throughput: Mapping[str, Samples]) -> Derived:
    fixed, learned, best = (throughput[method] for method in ("fixed", LEARNED, "oracle"))
    return {(LEARNED, RATIO): learned / fixed, (LEARNED, GAP): gap_closed(fixed, learned, best)}


def _charged(generations: Sequence[Sequence[Generation]], point: LatencyProfile) -> float:
    texts = [text for repeats in generations for text in repeats]
    tokens = sum(len(text.tokens) for text in texts)
    return tokens * point.autoregressive_seconds / sum(point.charge(text.rounds) for text in texts)
