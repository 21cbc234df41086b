"""The comparison of stop rules of a draft that goes on while the target verifies, beside decoding in turns.

Throughput is relative to plain decoding, by replay of test prompts; everything that is chosen is chosen on training
prompts. Decoding in turns is charged by profiles of its own, of one device where those of this run have two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specgym.decoding import LatencyProfile, StopRule
from specgym.envs import Trace

from ..results import ALL, LEARNED, PLAIN, Column, ResultTable, Row
from .method_rows import Derived, MethodRows, Samples
from .stop_baselines import ReplayedPrompts, simple_rules
from .stop_comparison import replayed

if TYPE_CHECKING:
    from ...experiments.control.stop_drafts_settings import StopSettings

TURNS = ("turns fixed", "turns rule", "turns learned")
"""Methods in turns: the best fixed length, the best simple rule of all kinds, and policies that were learned so."""
SIMPLE = ("fixed", "confidence", "entropy", "product")
OVER_FIXED, OVER_RULE = "learned / fixed", "learned / rule"
_HEADINGS = {
    PLAIN: "plain", "turns fixed": "turns,\nfixed", "turns rule": "turns,\nrule", "turns learned": "turns,\nlearned",
    "fixed": "fixed", "confidence": "confi-\ndence", "entropy": "en-\ntropy", "product": "pro-\nduct",
    "rule": "best\nrule", LEARNED: "learned",
}  # fmt: skip
CAPTION = (
    "Tokens over seconds, relative to plain decoding, by replay of the test prompts. Windows, thresholds, and whether "
    "the target waits for a draft after a rejection are the best on the training prompts; the best rule is the best "
    "of all of these there. Learned is the mean over the seeds. ± is half a 95 % interval over prompts and seeds."
)


@dataclass(frozen=True)
class InTurns:
    """Rivals of a run that learned by drafting and verifying in turns.

    Attributes:
        learned: its rules, one a seed.
        profiles: of each workload.
    """

    learned: Sequence[StopRule]
    profiles: Sequence[LatencyProfile]


@dataclass(frozen=True)
class _Chosen:
    """A rule with the way to begin after a rejection, chosen on training prompts."""

    rule: StopRule
    pre_verify: int | None
    throughput: float

    @property
    def name(self) -> str:
        return f"{self.rule.name}, waiting" if self.pre_verify == 0 else self.rule.name


def table_of(rows: Sequence[Row]) -> tuple[Sequence[Column], Sequence[str]]:
    """Columns of the methods that there are rows of, and the names of those that are compared with a stored table."""
    methods = {row.method for row in rows}
    columns = [
        Column("throughput", heading, ".3f", method == LEARNED, (method,))
        for method, heading in _HEADINGS.items()
        if method in methods
    ]
    ratios = [Column(name, name.replace(" / ", "\n/ "), ".3f", True, (LEARNED,)) for name in (OVER_FIXED, OVER_RULE)]
    return (*columns, *ratios), ("throughput",)


def compare_overlapping(
    settings: StopSettings,
    learned: Sequence[StopRule],
    profiles: Sequence[LatencyProfile],
    train: Sequence[Trace],
    test: Sequence[Trace],
    in_turns: InTurns | None,
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Judge every method on the test prompts of every workload at every batch size.

    Args:
        settings: of the run.
        learned: one rule a seed.
        profiles: of each workload, of rounds that overlap.
        train: traces of the training prompts of each workload, on which rules are chosen.
        test: traces of the test prompts of each workload.
        in_turns: rivals in turns, if there are any.
        report: called with what is being done.

    Returns:
        A row for each place and method, then one for each method with the means. Values are `throughput` relative to
        plain decoding, `draft_acceptance_rate` (0 to 1) and `draft_length` in verified tokens a round; of the learned
        policies also `OVER_FIXED` and `OVER_RULE`.
    """
    table = MethodRows(_ratios, (), len(learned), settings.comparison.resamples)
    for number, (name, train_trace, test_trace) in enumerate(zip(settings.workloads, train, test, strict=True)):
        prompts = table.resampled(test_trace.prompts)
        for batch_size in settings.batch_sizes:
            place = f"{name} x {batch_size}" if len(settings.batch_sizes) > 1 else name
            report(f"Comparing on test prompts: {place}")
            training, testing = (
                replayed(settings, trace, profiles[number], batch_size) for trace in (train_trace, test_trace)
            )
            methods, names = {}, {}
            if in_turns is not None:
                turns_training, turns_testing = (
                    replace(beside, profile=in_turns.profiles[number], decoder=None, pre_verify=None)
                    for beside in (training, testing)
                )
                best = _best(turns_training, (None,))
                for method, chosen in (("turns fixed", best["fixed"]), ("turns rule", _winner(best))):
                    methods[method], names[method] = turns_testing.decode([chosen.rule]), chosen.name
                methods["turns learned"] = [turns_testing.decode([rule])[0] for rule in in_turns.learned]
                names["turns learned"] = in_turns.learned[0].name
            best = _best(training, (1, 0))
            for method, chosen in {**best, "rule": _winner(best)}.items():
                methods[method] = replace(testing, pre_verify=chosen.pre_verify).decode([chosen.rule])
                names[method] = chosen.name
            methods[LEARNED] = [testing.decode([rule])[0] for rule in learned]
            names[LEARNED] = _Chosen(learned[0], settings.pre_verify, 0.0).name
            table.add(place, names, methods, prompts)
    return table.rows()


def overlapping_verdict(rows: Sequence[Row]) -> str:
    """Verdict: how the learned policy stands against the rules, and the best of all against decoding in turns."""
    groups = ResultTable(rows).by_workload()
    mean = groups.pop(ALL)
    reached = {method: row.values["throughput"] for method, row in mean.items()}
    values = mean[LEARNED].values
    sentence = (
        f"Learned stopping has {values[OVER_FIXED]:.3f} times the throughput of the best fixed window on average, and "
        f"{values[OVER_RULE]:.3f} times that of the best rule chosen for the workload."
    )
    ahead = [
        f"{name} ({group['rule'].rule}, {group['rule'].values['throughput']:.3f})"
        for name, group in groups.items()
        if round(group["rule"].values["throughput"] - group[LEARNED].values["throughput"], 3) > 0
    ]
    if ahead:
        sentence += f" The chosen rule beats it on {', '.join(ahead)}."
    if "turns rule" in reached:
        turns = max(reached["turns rule"], reached["turns learned"])
        beside = max(reached["rule"], reached[LEARNED])
        sentence += (
            f" Against the better of the best rule and the policies in turns ({turns:.3f}), drafting meanwhile brings "
            f"{beside / turns:.3f} times as much."
        )
    return sentence


def _best(prompts: ReplayedPrompts, ways: Sequence[int | None]) -> dict[str, _Chosen]:
    """The best rule of every kind, with the best way to begin after a rejection, by throughput."""
    best: dict[str, _Chosen] = {}
    families = simple_rules(prompts.max_draft_length)
    kinds = [(method, rule) for method in SIMPLE for rule in families[method]]
    if prompts.decoder is None:
        kinds.append(("gain", prompts.expected_gain))
    for way in ways:
        for (method, rule), decoded in zip(
            kinds, replace(prompts, pre_verify=way).decode([rule for _, rule in kinds]), strict=True
        ):
            if method not in best or decoded.throughput > best[method].throughput:
                best[method] = _Chosen(rule, way, decoded.throughput)
    return best


def _winner(best: Mapping[str, _Chosen]) -> _Chosen:
    return max(best.values(), key=lambda chosen: chosen.throughput)


def _ratios(throughput: Mapping[str, Samples]) -> Derived:
    learned = throughput[LEARNED]
    return {(LEARNED, OVER_FIXED): learned / throughput["fixed"], (LEARNED, OVER_RULE): learned / throughput["rule"]}
