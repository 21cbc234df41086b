"""Results of a cross-validation: the file ``transfer.json``, its tables, and what they show in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from specgym.decoding import write_sealed

from ...training.run_folder import RunFileError, read_json
from .comparison import LEARNED, WITHIN, Kind, PairedTest, Result, paired_tests, summary
from .search_baselines import Knobs

FORMAT = "specgym-transfer-2"
EARLIER = "specgym-transfer-1"
"""The format from before it had a checksum."""
LEVEL = 0.05
"""Significance level of corrected p values."""
_DIGITS = 6


@dataclass(frozen=True)
class JudgedFold:
    """The results of one fold.

    Attributes:
        kind: what was left out: a pair, a dataset or a family.
        left_out: its name.
        workloads: names of those that were left out, which the methods were judged on.
        universal: the best single setting over the other workloads.
        results: of all methods on the workloads that were left out.
    """

    kind: Kind
    left_out: str
    workloads: tuple[str, ...]
    universal: Knobs
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Transfer:
    """A cross-validation.

    Attributes:
        command: that made it.
        protocol: what a measurement decodes, how settings are judged, and the reward.
        folds: of one or several kinds.
    """

    command: str
    protocol: dict[str, Any]
    folds: tuple[JudgedFold, ...]

    def results(self, kind: Kind) -> list[Result]:
        """Those of all folds of a kind."""
        return [result for fold in self.folds if fold.kind == kind for result in fold.results]

    def kinds(self) -> list[Kind]:
        """Kinds of the folds, in order."""
        return list(dict.fromkeys(fold.kind for fold in self.folds))

    def to_json(self) -> dict[str, Any]:
        """The folds and results, their summary, and tests of the learned method if there is one.

        Numbers are rounded to six digits.
        """
        summaries: list[dict[str, Any]] = []
        tests: list[dict[str, Any]] = []
        for kind in self.kinds():
            results = self.results(kind)
            summaries += [{"kind": kind, **asdict(row)} for row in summary(results)]
            counts = dict.fromkeys(result.measurements for result in results if result.method == LEARNED)
            tests += [
                {"kind": kind, **asdict(row)} for count in counts for row in paired_tests(results, LEARNED, count)
            ]
        content = {
            "format": FORMAT,
            "command": self.command,
            "protocol": self.protocol,
            "folds": [
                {name: value for name, value in asdict(fold).items() if name != "results"} for fold in self.folds
            ],
            "results": [
                {"kind": fold.kind, "left_out": fold.left_out, **asdict(result)}
                for fold in self.folds
                for result in fold.results
            ],
            "summary": summaries,
            "tests": tests,
        }
        rounded: dict[str, Any] = _rounded(content)
        return rounded

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_sealed(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Transfer:
        """Read what `save` wrote; summary and tests follow from the results.

        Raises:
            RunFileError: the file is missing, damaged, or of another format.
        """
        way_out = "make it again with: python evaluate.py <run> --transfer"
        content = read_json(path, way_out, FORMAT)
        if content.get("format") not in (FORMAT, EARLIER):
            raise RunFileError(f"{path} has the format {content.get('format')!r}, not {FORMAT!r}; {way_out}")
        try:
            results: dict[tuple[str, str], list[Result]] = {}
            for row in map(dict, content["results"]):
                results.setdefault((row.pop("kind"), row.pop("left_out")), []).append(Result(**row))
            folds = tuple(
                JudgedFold(
                    fold["kind"],
                    fold["left_out"],
                    tuple(fold["workloads"]),
                    dict(fold["universal"]),
                    tuple(results.get((fold["kind"], fold["left_out"]), ())),
                )
                for fold in content["folds"]
            )
            return cls(str(content["command"]), dict(content["protocol"]), folds)
        except (KeyError, TypeError, ValueError) as error:
            raise RunFileError(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}") from error

    def tables(self, kind: Kind) -> list[Table]:
        """The mean shares by method and number of measurements, and the learned method against every other one."""
        return [_summary_table(self.results(kind), kind), _test_table(last_tests(self.results(kind)), kind)]

    def verdict(self) -> str:
        """Findings in sentences, also where a simpler method is as good or better."""
        return " ".join(_verdict(self.results(kind), kind) for kind in self.kinds())


def last_tests(results: Sequence[Result]) -> list[PairedTest]:
    """The tests after as many measurements as were made."""
    return paired_tests(results, LEARNED, max(result.measurements for result in results))


def least_p(units: int, tests: int) -> float:
    """Least corrected p value that sign-flip tests over so many units can have: all signs alike, in the first test."""
    return min(1.0, tests * 2.0 ** (1 - units))


def _summary_table(results: Sequence[Result], kind: Kind) -> Table:
    """Half the width of the 95 % interval follows after ±."""
    rows = summary(results)
    counts = sorted({row.measurements for row in rows})
    table = Table(
        title=f"Share of the best, one {kind} left out", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method")
    for count in counts:
        table.add_column(f"{count} measurements" if count == counts[0] else str(count), justify="right", no_wrap=True)
    for method in dict.fromkeys(row.method for row in rows):
        points = {row.measurements: row for row in rows if row.method == method}
        cells = (f"{points[n].fraction:.3f}±{(points[n].high - points[n].low) / 2:.3f}" for n in counts)
        table.add_row(method, *cells, style="bold" if method == LEARNED else None)
    return table


def _test_table(tests: Sequence[PairedTest], kind: Kind) -> Table:
    title = f"Learned against the others after {tests[0].measurements} measurements, one {kind} left out"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
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


def _verdict(results: Sequence[Result], kind: Kind) -> str:
    most = max(result.measurements for result in results)
    rows = {row.method: row for row in summary(results) if row.measurements == most}
    learned, best = rows[LEARNED], max(rows.values(), key=lambda row: row.fraction)
    sentence = (
        f"One {kind} left out: after {most} measurements the learned tuner reaches {learned.fraction:.3f} of the best "
        f"({learned.low:.3f} to {learned.high:.3f}), and at least {WITHIN:g} on {learned.within:.0%} of the pairs"
    )
    if best.method == LEARNED:
        sentence += "; no other method reaches as much."
    else:
        sentence += f"; {best.method} reaches {best.fraction:.3f}."
    tests = last_tests(results)
    least = least_p(tests[0].units, len(tests)) if tests else 1.0
    if least >= LEVEL:
        return (
            f"{sentence} Of {tests[0].units if tests else 0} pairs no test can be significant: the least corrected p "
            f"value that they allow is {least:.2f}."
        )
    significant = [test for test in tests if test.p_adjusted < LEVEL]
    better = [test.against for test in significant if test.difference > 0]
    worse = [test.against for test in significant if test.difference < 0]
    sentence += f" Significantly better than: {', '.join(better) or 'none'}."
    return sentence + (f" Significantly worse than: {', '.join(worse)}." if worse else "")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(entry) for entry in value]
    return value
