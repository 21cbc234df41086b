"""The comparison of choices among drafts: chosen on training prompts, judged on test prompts, by replay and live.

Throughput is relative to plain decoding: all tokens over all seconds, in units of plain decoding's seconds per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from specgym.decoding import AutoregressiveDecoder, ChoiceRule, MixedProfile, Side, SpeculativeDecoder
from specgym.envs import DraftChoiceEnv, MixedTrace, workload

from ..live import decode_repeatedly
from ..results import ALL, LEARNED, PLAIN, Column, ResultTable, Row
from .choice_plan import Fitted, calibration_error, chances_of, decide, fit_plan
from .choice_tuning import MixedPrompts, choose_rules, oracle
from .method_rows import Derived, MethodRows, Samples, gap_closed
from .stop_comparison import REPEATS, live_rows

if TYPE_CHECKING:
    from ...experiments.control.choose_drafts_settings import ChoiceSettings

SINGLE, HYBRID, CEILING, HINDSIGHT, CLAIRVOYANT = "single", "hybrid", "ceiling", "hindsight", "clairvoyant"
METHODS = (PLAIN, SINGLE, HYBRID, "bandit", "closed form", LEARNED, CEILING, HINDSIGHT, CLAIRVOYANT)
SIMPLE = (SINGLE, HYBRID, "closed form")
OVER_SINGLE, OVER_HYBRID, GAP = "learned / single", "learned / hybrid", "gap closed"
LEAST_OVER_SINGLE, LEAST_OVER_HYBRID, LEAST_EACH = 1.15, 1.05, 0.99
"""Goals of learning: over the best draft alone and over the fixed rule of engines, on average and on every workload."""
TUNING_PASSES = 2
"""Passes over the training prompts, where tokens are sampled, by which rules are chosen."""

_HEADINGS = (
    "plain",
    "single",
    "hybrid",
    "bandit",
    "closed\nform",
    "learned",
    "ceil-\ning",
    "hind-\nsight",
    "clair-\nvoyant",
)
TABLE = (
    (
        *(
            Column("throughput", heading, ".2f", False, (method,))
            for method, heading in zip(METHODS, _HEADINGS, strict=True)
        ),
        Column(OVER_SINGLE, "learned\n/ single", ".3f", True, (LEARNED,)),
        Column(OVER_HYBRID, "learned\n/ hybrid", ".3f", True, (LEARNED,)),
        Column(GAP, "gap\nclosed", ".0%", False, (LEARNED,)),
    ),
    ("throughput",),
)
"""Columns of the replayed comparison, and those that are compared with a stored one."""
CAPTION = (
    "Tokens over seconds, relative to plain decoding, by replay of the test prompts. Single is the best draft alone, "
    "hybrid the best rule of engines (a look-up if it matches, else a model), with lengths and matches that are best "
    "on the training prompts; the bandit has decoded those once. Learned is the mean over the seeds. Ceiling plans "
    "with calibrated chances that are fitted to the training prompts from what the policy sees, hindsight with chances "
    "fitted to the test prompts themselves; the clairvoyant knows what will be accepted. The gap is that from single "
    "to it. ± is half a 95 % interval over prompts and seeds."
)


def compare_choices(
    settings: ChoiceSettings,
    learned: Sequence[ChoiceRule],
    train: Sequence[MixedPrompts],
    test: Sequence[MixedPrompts],
    report: Callable[[str], None] = lambda message: None,
) -> tuple[list[Row], list[str]]:
    """Judge every method on the test prompts of every workload.

    Args:
        settings: of the run.
        learned: one rule a seed.
        train: training prompts of each workload, on which rules are chosen.
        test: test prompts of each workload.
        report: called with what is being done.

    Returns:
        A row for each workload and method; then one for each method with the means over them. Values are `throughput`
        relative to plain decoding, `draft_acceptance_rate` (0 to 1) and `draft_length` in drafted tokens a round; of
        the learned policies also `OVER_SINGLE` and `OVER_HYBRID`, and of them and the plans `GAP`, what share of the
        way from the best single draft to the clairvoyant they go. And sentences on the plans.
    """
    table = MethodRows(_ratios, (GAP,), len(learned), settings.comparison.resamples)
    plans, notes = _plans(settings, train, test, report)
    for place, (name, training, testing) in enumerate(zip(settings.workloads, train, test, strict=True)):
        report(f"Comparing on test prompts: {name}")
        prompts = table.resampled(testing.prompts)
        chosen = choose_rules(training)
        rules: dict[str, ChoiceRule] = {**chosen.simple}
        methods = {method: testing.decode([rule]) for method, rule in rules.items()}
        methods["bandit"] = testing.decode([chosen.bandit], afresh=False)
        # One at a time, so that the draws of one rule do not depend on which others there are.
        methods[LEARNED] = [testing.decode([rule])[0] for rule in learned]
        rules |= {"bandit": chosen.bandit, LEARNED: learned[0]}
        for method, plan in plans.items():
            rules[method] = plan.rule(place, testing)
            methods[method] = testing.decode([rules[method]])
        rules[CLAIRVOYANT], knowing = oracle(testing)
        methods[CLAIRVOYANT] = [knowing]
        ordered = {method: methods[method] for method in METHODS if method in methods}
        table.add(name, {method: rule.name for method, rule in rules.items()}, ordered, prompts)
    return table.rows(), notes


def compare_live(
    settings: ChoiceSettings,
    name: str,
    learned: ChoiceRule,
    profile: MixedProfile,
    train: MixedTrace,
    test: MixedTrace,
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Decode a workload's test prompts live with the learned policy and simple rules, beside their replay.

    Loads the pair; loading errors as for `load_pair`.

    Args:
        settings: of the run.
        name: of the workload.
        learned: the policy to decode with.
        profile: what the charged columns are charged by.
        train: recording of the training prompts, on which rules are chosen.
        test: recording of the test prompts, which are decoded.
        report: called with what is being done.

    Returns:
        A row a method, whose values are throughputs relative to plain decoding: `replayed` and `charged` (live), both
        charged by the profile, and `clock`, by the clock; and `clock_ms_per_token`.
    """
    chosen = workload(name)
    pair, prompts = chosen.load(), chosen.prompt_ids("test")[: test.prompts]
    rules = {**choose_rules(mixed_prompts(settings, train, profile, TUNING_PASSES)).simple, LEARNED: learned}
    replayed = mixed_prompts(settings, test, profile, settings.comparison.passes)
    sides = {PLAIN: Side(AutoregressiveDecoder(pair))} | {
        method: Side(SpeculativeDecoder(pair, replayed.max_draft_length, choice=rule, costs=replayed.profile))
        for method, rule in rules.items()
    }
    generations = decode_repeatedly(
        sides,
        prompts,
        max_new_tokens=replayed.tokens,
        sampling=chosen.sampling,
        seeds=[test.info.seed + 10_000 * repeat for repeat in range(REPEATS)],
        report=lambda message: report(f"{name}: {message}"),
    )
    live = DraftChoiceEnv(
        name,
        backend="live",
        split="test",
        profile=replayed.profile,
        max_draft_length=replayed.max_draft_length,
        max_new_tokens=replayed.tokens,
    )
    charged = {}
    for method, rule in rules.items():
        report(f"{name}: {method}, charged")
        charged[method] = _charged(live, rule, test.prompts)
    throughput = {method: replayed.decode([rule])[0].throughput for method, rule in rules.items()}
    return live_rows(name, generations, {method: rule.name for method, rule in rules.items()}, throughput, charged)


def mixed_prompts(settings: ChoiceSettings, trace: MixedTrace, profile: MixedProfile, passes: int) -> MixedPrompts:
    """The prompts of a recording, decoded as a run's settings say, so many times where tokens are sampled.

    Drafts and texts are as long as the recording holds, if that is less.
    """
    return MixedPrompts(
        trace,
        profile.with_chances(trace.chances),
        min(settings.max_draft_length, trace.draft_length),
        min(settings.max_new_tokens, trace.info.tokens),
        settings.decision_seconds,
        passes,
    )


def choice_verdict(rows: Sequence[Row]) -> str:
    """Verdict: goals reached, where and by how much learning falls short, and what does better."""
    groups = ResultTable(rows).by_workload()
    mean = groups.pop(ALL)
    learned = mean[LEARNED].values
    short = [
        f"{learned[ratio]:.3f} times {what} is below {least:.2f}"
        for ratio, least, what in (
            (OVER_SINGLE, LEAST_OVER_SINGLE, "the best single draft"),
            (OVER_HYBRID, LEAST_OVER_HYBRID, "the hybrid rule"),
        )
        if learned[ratio] < least
    ]
    for ratio, what in ((OVER_SINGLE, "the best single draft"), (OVER_HYBRID, "the hybrid rule")):
        low = sorted(
            (point[LEARNED].values[ratio], name)
            for name, point in groups.items()
            if point[LEARNED].values[ratio] < LEAST_EACH
        )
        if low:
            listed = ", ".join(f"{name} ({value:.3f})" for value, name in low)
            short.append(f"below {LEAST_EACH:.2f} of {what}: {listed}")
    worst = {
        ratio: min((point[LEARNED].values[ratio], name) for name, point in groups.items())
        for ratio in (OVER_SINGLE, OVER_HYBRID)
    }
    sentence = (
        f"Learned choice has {learned[OVER_SINGLE]:.3f} times the throughput of the best single draft and "
        f"{learned[OVER_HYBRID]:.3f} times that of the hybrid rule on average, at least {worst[OVER_SINGLE][0]:.3f} "
        f"({worst[OVER_SINGLE][1]}) and {worst[OVER_HYBRID][0]:.3f} ({worst[OVER_HYBRID][1]}) times. "
    )
    sentence += f"It falls short: {'; '.join(short)}." if short else "All targets are met."
    if sampled := [point for name, point in groups.items() if "@" in name]:
        ratios = [point[LEARNED].values[OVER_SINGLE] for point in sampled]
        sentence += (
            f" Where tokens are sampled it has {np.mean(ratios):.3f} times the throughput of the best single draft, at "
            f"least {min(ratios):.3f}."
        )
    sentence += f" It closes {learned[GAP]:.0%} of the gap from the best single draft to the clairvoyant"
    if CEILING in mean:
        ceiling, hindsight = (mean[method].values[GAP] for method in (CEILING, HINDSIGHT))
        sentence += (
            f"; planning with calibrated chances, from all that can be seen, closes {ceiling:.0%} (fitted to the test "
            f"prompts themselves {hindsight:.0%})"
        )
    sentence += "."
    rivals = {method: mean[method].values["throughput"] for method in (*SIMPLE, "bandit", CEILING) if method in mean}
    best = max(rivals, key=lambda method: rivals[method])
    if round(rivals[best] - learned["throughput"], 3) > 0:
        sentence += f" Better on average: {best}, {rivals[best]:.3f} against {learned['throughput']:.3f}."
    beaten = []
    for name, point in groups.items():
        ahead, method = max((point[simple].values["throughput"], simple) for simple in SIMPLE)
        if round(ahead - point[LEARNED].values["throughput"], 3) > 0:
            beaten.append(f"{name} ({point[method].rule}, {ahead:.3f})")
    if beaten:
        sentence += f" A rule chosen for the workload beats the learned policy on {', '.join(beaten)}."
    return sentence


def _ratios(throughput: Mapping[str, Samples]) -> Derived:
    single, hybrid, learned, best = (throughput[method] for method in (SINGLE, HYBRID, LEARNED, CLAIRVOYANT))
    gaps = {
        (method, GAP): gap_closed(single, throughput[method], best)
        for method in (LEARNED, CEILING, HINDSIGHT)
        if method in throughput
    }
    return {(LEARNED, OVER_SINGLE): learned / single, (LEARNED, OVER_HYBRID): learned / hybrid, **gaps}


def _plans(
    settings: ChoiceSettings,
    train: Sequence[MixedPrompts],
    test: Sequence[MixedPrompts],
    report: Callable[[str], None],
) -> tuple[dict[str, Fitted], list[str]]:
    """Plans by method, and a sentence on how well their chances are calibrated."""
    if not settings.plan.rounds:
        return {}, []
    fitted = fit_plan(train, settings.plan, report=lambda message: report(f"{message} (training prompts)"))
    hindsight = fit_plan(test, settings.plan, apart=False, report=lambda message: report(f"{message} (test prompts)"))
    decisions, _ = decide(test, fitted.plan, fitted.rates, 0.0, np.random.default_rng(0))
    chances, right = chances_of(fitted.plan, decisions)
    note = (
        f"The ceiling's chances are off by {calibration_error(chances, right):.3f} on the test prompts (expected "
        f"calibration error), of tokens of which {right.mean():.2f} are right."
    )
    return {CEILING: fitted, HINDSIGHT: hindsight}, [note]


def _charged(env: DraftChoiceEnv, rule: ChoiceRule, prompts: int) -> float:
    """Throughput of a rule live, charged by the environment's profile."""
    rule.start(1, 0)
    tokens = seconds = 0.0
    for prompt in range(prompts):
        features, _ = env.reset(seed=prompt, options={"prompt": prompt})
        ended = False
        while not ended:
            features, _, ended, _, info = env.step(int(rule(features[None])[0]))
        tokens, seconds = tokens + info["total_tokens"], seconds + info["total_seconds"]
    return tokens * env.charges.autoregressive_seconds / seconds
