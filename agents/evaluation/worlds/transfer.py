"""Results of judging policies in worlds that are kept apart: the file, its tables, and what they show in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich import box
from rich.table import Table

from specgym.decoding import write_sealed

from ...training.run_folder import RunFileError, read_json
from ..results import LEARNED, Column, ResultTable, Row
from ..unseen.comparison import WITHIN, PairedTest

FORMAT: Final = "specgym-worlds-1"
EVERY_KIND: Final = "every kind"
"""`Row.workload` of the means over the kinds of worlds."""
REFERENCE: Final = "best on training texts"
"""Method that knows all costs and has measured everything, which no other can."""
AIMED: Final = 4
"""Measurements after which the aims are to be reached."""
AIM_WITHIN: Final = 0.9
AIM_WRONG: Final = 0.02
LEVEL: Final = 0.01
"""Significance level of corrected p values."""
RIVALS: Final = (
    *("closed form", "closed form by place", "closed form with thresholds"),
    *("gp from universal", "universal", "single setting"),
)
"""Methods that are to be beaten: closed forms, the Gaussian process that starts warm, and single settings."""
COLUMNS: Final = (
    Column("share", "share of\nthe best", ".3f", interval=True),
    Column("within", f"at least\n{WITHIN:g}", ".3f", interval=True),
    Column("session_share", "share of the best\nin a session", ".3f", interval=True),
    Column("regret", "lost while\nmeasuring", ".0f"),
    Column("wrong_speculation", "speculates\nwrongly", ".3f", interval=True),
    Column("harmful_speculation", "by over\n3 %", ".3f"),
    Column("missed_speculation", "misses\nspeculating", ".3f"),
    Column("measurements", "measure-\nments", ".1f"),
)
CAPTION: Final = (
    "Held-out texts of held-out worlds. A session is the measured texts and 10,000 tokens; what is lost while "
    "measuring is in plain tokens."
)
_WAY_OUT = "make it again with: python evaluate.py <run> --transfer"


class View(NamedTuple):
    """A table of texts.

    Attributes:
        title: above it.
        head: of the columns, which may break; the first names what the lines are.
        lines: of the table.
    """

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def render(self) -> Table:
        """Return the table for the terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, heading in enumerate(self.head):
            table.add_column(heading, justify="right" if place else "left", no_wrap=True)
        for line in self.lines:
            table.add_row(*line, style="bold" if line[0] == LEARNED else None)
        return table

    def markdown(self) -> str:
        """Return the table for documentation."""
        rule = "|---|" + "---:|" * (len(self.head) - 1)
        return "\n".join([_piped(self.head), rule, *map(_piped, self.lines)])


@dataclass(frozen=True)
class WorldsTransfer:
    """Policies, and what needs no learning, judged in worlds that are kept apart.

    Attributes:
        command: that made it.
        protocol: how worlds were drawn, measured and judged.
        tables: by number of measurements; `Row.workload` is the kind of worlds.
        tests: of what was learned against every other method, by number of measurements and kind.
    """

    command: str
    protocol: Mapping[str, Any]
    tables: Mapping[int, ResultTable]
    tests: Mapping[int, Mapping[str, tuple[PairedTest, ...]]]

    @property
    def judged(self) -> int:
        """Number of measurements that the verdict is on: `AIMED`, or else the most."""
        return AIMED if AIMED in self.tables else max(self.tables)

    @property
    def table(self) -> ResultTable:
        """The table after as many measurements as the verdict is on, with it."""
        table = self.tables[self.judged]
        return ResultTable(
            table.rows, COLUMNS, tuple(column.name for column in COLUMNS), self.verdict(), CAPTION, table.hardware,
            self.protocol, self.command,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """Kind of worlds that stands for all: `EVERY_KIND`, or the only one."""
        return next(reversed(self.table_rows(self.judged)))

    def table_rows(self, count: int) -> dict[str, dict[str, Row]]:
        """Rows after so many measurements, by kind of worlds and method."""
        return self.tables[count].by_workload()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": FORMAT,
            "command": self.command,
            "protocol": dict(self.protocol),
            "tables": {str(count): table.to_json() for count, table in self.tables.items()},
            "tests": {
                str(count): {kind: [asdict(test) for test in tests] for kind, tests in by_kind.items()}
                for count, by_kind in self.tests.items()
            },
            "verdict": self.verdict(),
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_sealed(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> WorldsTransfer:
        """Read what `save` wrote.

        Raises:
            RunFileError: the file is missing, damaged, or of another format.
        """
        content = read_json(path, _WAY_OUT, FORMAT)
        if content.get("format") != FORMAT:
            raise RunFileError(f"{path} has the format {content.get('format')!r}, not {FORMAT!r}; {_WAY_OUT}")
        try:
            tables = {int(count): ResultTable.from_json(table) for count, table in content["tables"].items()}
            tests = {
                int(count): {kind: tuple(PairedTest(**test) for test in group) for kind, group in by_kind.items()}
                for count, by_kind in content["tests"].items()
            }
            return cls(str(content["command"]), dict(content["protocol"]), tables, tests)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunFileError(f"{path} is damaged ({type(error).__name__}: {error}); {_WAY_OUT}") from error

    def views(self) -> list[View]:
        """Shares by number of measurements and by kind of worlds, decisions in a user's terms, and the tests."""
        count = self.judged
        rows = self.table_rows(count)
        methods, kinds = list(rows[self.kind]), list(rows)
        by_count = {number: self.table_rows(number)[self.kind] for number in self.tables}
        shares = [(name, *(_share(by_count[number][name]) for number in by_count)) for name in methods]
        by_kind = [(name, *(_share(rows[kind][name]) for kind in kinds)) for name in methods]
        decisions = [
            (name, *(format(rows[self.kind][name].values[column.name], column.form) for column in COLUMNS))
            for name in methods
        ]
        heads = (column.heading for column in COLUMNS)
        tests = self.tests[count]
        differences = [
            (same[0].against, *(f"{test.difference:+.3f}\n({test.p_adjusted:.3f})" for test in same))
            for same in zip(*(tests[kind] for kind in kinds), strict=True)
        ]
        after = f"after {count} measurements"
        title = f"Mean share of the best in hindsight, and worlds with at least {WITHIN:g} of it"
        return [
            View(f"{title}, by measurements", ("method", *map(str, by_count)), shares),
            View(f"{title}, {after}, by kind of worlds", ("method", *kinds), by_kind),
            View(f"Decisions {after}, {self.kind}", ("method", *heads), decisions),
            View(f"Learned less the others {after}: mean share (corrected p)", ("against", *kinds), differences),
        ]

    def verdict(self) -> str:
        """Every aim, and whether it is met, in sentences."""
        rows, count = self.table_rows(self.judged), self.judged
        learned = {kind: methods[LEARNED].values for kind, methods in rows.items()}
        mean = learned[self.kind]
        sentences = [
            f"After {count} measurements the learned tuner reaches {mean['share']:.3f} of the best in hindsight.",
            f"Within {1 - WITHIN:.0%} of it on {mean['within']:.1%} of the worlds (aim: at least {AIM_WITHIN:.0%}): "
            + _met(learned, lambda values: values["within"] >= AIM_WITHIN, self.kind),
        ]
        if REFERENCE in rows[self.kind]:
            limit = rows[self.kind][REFERENCE].values
            sentences.append(
                f"Perfect measuring of the training texts would come within it on {limit['within']:.1%}, and speculate "
                f"wrongly on {limit['wrong_speculation']:.1%}."
            )
        tests = {kind: {test.against: test for test in group} for kind, group in self.tests[count].items()}
        for rival in RIVALS:
            if rival in tests[self.kind]:
                test = tests[self.kind][rival]
                sentences.append(
                    f"Against {rival}: {test.difference:+.4f} of the best, corrected p {_p(test)} (aim: better, p < "
                    f"{LEVEL:g}): " + _met({kind: group[rival] for kind, group in tests.items()}, _better, self.kind)
                )
        sentences.append(
            f"It speculates where plain decoding is faster in {mean['wrong_speculation']:.1%} of the worlds (aim: "
            f"under {AIM_WRONG:.0%}), and more than 3 % faster in {mean['harmful_speculation']:.1%}: "
            + _met(learned, lambda values: values["wrong_speculation"] < AIM_WRONG, self.kind)
        )
        return " ".join(sentences)


def result_table(rows: Sequence[Row], count: int, hardware: Mapping[str, Any]) -> ResultTable:
    """Return the table after so many measurements."""
    compared = tuple(column.name for column in COLUMNS)
    return ResultTable(rows, COLUMNS, compared, "", CAPTION, hardware, {"measurements": count})


def _met(cases: Mapping[str, Any], good: Callable[[Any], bool], kind: str) -> str:
    """Say whether an aim is met, and on which kinds of worlds it is not."""
    missed = ", ".join(name for name, case in cases.items() if name != EVERY_KIND and not good(case))
    if good(cases[kind]):
        return f"met over all, missed on {missed}." if missed else "met."
    return f"missed ({missed})." if missed else "missed."


def _better(test: PairedTest) -> bool:
    return test.difference > 0 and test.p_adjusted < LEVEL


def _p(test: PairedTest) -> str:
    return f"{test.p_adjusted:.4f}" if test.p_adjusted >= 1e-4 else "< 0.0001"


def _share(row: Row) -> str:
    return f"{row.values['share']:.3f} {row.values['within']:.0%}"


def _piped(cells: Sequence[str]) -> str:
    unbroken = (cell.replace("-\n", "").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(unbroken)} |"
