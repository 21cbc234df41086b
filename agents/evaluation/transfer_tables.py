"""The cross-validation's figures as tables for people, and in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from .comparison import LEARNED, WITHIN, PairedTest, Result, Summary, paired_tests, summary
from .transfer_file import Transfer

_TEST_LEVEL = 0.05


def rendered_summary(rows: Sequence[Summary], kind: str) -> Table:
    """Share of the best by method and number of measurements; half the width of the 95 % interval follows after ±."""
    counts = sorted({row.measurements for row in rows})
    table = Table(
        title=f"Share of the best, one {kind} left out", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method")
    for count in counts:
        table.add_column(f"{count} measurements" if count == counts[0] else str(count), justify="right", no_wrap=True)
    for method in dict.fromkeys(row.method for row in rows):
        of = {row.measurements: row for row in rows if row.method == method}
        table.add_row(
            method,
            *(f"{of[count].fraction:.3f}±{(of[count].high - of[count].low) / 2:.3f}" for count in counts),
            style="bold" if method == LEARNED else None,
        )
    return table


def rendered_tests(results: Sequence[Result], kind: str) -> Table:
    """The learned method against every other, after all measurements."""
    tests = last_tests(results)
    table = Table(
        title=f"Learned against the others after {tests[0].measurements} measurements, one {kind} left out",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("against", "difference", "95 % interval", "p, corrected", "better on pairs"):
        table.add_column(heading, justify="left" if heading == "against" else "right", no_wrap=True)
    for test in tests:
        table.add_row(
            test.against,
            f"{test.difference:+.3f}",
            f"{test.low:+.3f} to {test.high:+.3f}",
            f"{test.p_adjusted:.3f}",
            f"{round(test.wins * test.units)} of {test.units}",
        )
    return table


def last_tests(results: Sequence[Result]) -> list[PairedTest]:
    """The tests after as many measurements as were made."""
    return paired_tests(results, LEARNED, max(result.measurements for result in results))


def transfer_verdict(transfer: Transfer) -> str:
    """What the cross-validation shows, also where a simpler method is as good or better."""
    sentences = []
    for kind in transfer.kinds():
        results = transfer.results(kind)
        most = max(result.measurements for result in results)
        rows = {row.method: row for row in summary(results) if row.measurements == most}
        own, best = rows[LEARNED], max(rows.values(), key=lambda row: row.fraction)
        sentence = (
            f"One {kind} left out: after {most} measurements the learned tuner reaches {own.fraction:.3f} of the best "
            f"({own.low:.3f} to {own.high:.3f}), and at least {WITHIN:g} on {own.within:.0%} of the pairs"
        )
        if best.method == LEARNED:
            sentence += "; no other method reaches as much."
        else:
            sentence += f"; {best.method} reaches {best.fraction:.3f}."
        tests = last_tests(results)
        beaten = [test.against for test in tests if test.difference > 0 and test.p_adjusted < _TEST_LEVEL]
        losing = [test.against for test in tests if test.difference < 0 and test.p_adjusted < _TEST_LEVEL]
        sentence += f" Significantly better than: {', '.join(beaten) or 'none'}."
        if losing:
            sentence += f" Significantly worse than: {', '.join(losing)}."
        sentences.append(sentence)
    return " ".join(sentences)
