"""The file of a cross-validation, ``transfer.json``: every recommendation, what they come to, and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specgym.decoding import write_json

from ..training.run_folder import RunFileError, read_json
from .comparison import LEARNED, Kind, Result, paired_tests, summary
from .search_baselines import Knobs

FORMAT = "specgym-transfer-1"
_DIGITS = 6


@dataclass(frozen=True)
class JudgedFold:
    """What one fold came to.

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
        """Of the folds, in order, each once."""
        return list(dict.fromkeys(fold.kind for fold in self.folds))


def to_json(transfer: Transfer) -> dict[str, Any]:
    """What the file holds: the folds and results, their summary, and tests of the learned method if there is one.

    Numbers are rounded to six digits.

    Args:
        transfer: the cross-validation.
    """
    summaries: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    for kind in transfer.kinds():
        results = transfer.results(kind)
        summaries += [{"kind": kind, **asdict(row)} for row in summary(results)]
        counts = dict.fromkeys(result.measurements for result in results if result.method == LEARNED)
        tests += [{"kind": kind, **asdict(row)} for count in counts for row in paired_tests(results, LEARNED, count)]
    return _rounded(
        {
            "format": FORMAT,
            "command": transfer.command,
            "protocol": transfer.protocol,
            "folds": [
                {
                    "kind": fold.kind,
                    "left_out": fold.left_out,
                    "workloads": list(fold.workloads),
                    "universal": fold.universal,
                }
                for fold in transfer.folds
            ],
            "results": [
                {"kind": fold.kind, "left_out": fold.left_out, **asdict(result)}
                for fold in transfer.folds
                for result in fold.results
            ],
            "summary": summaries,
            "tests": tests,
        }
    )


def save(path: Path, transfer: Transfer) -> None:
    """Write the file, whole or not at all."""
    write_json(path, to_json(transfer))


def read(path: Path) -> Transfer:
    """Read what `save` wrote; summary and tests follow from the results.

    Args:
        path: the file.

    Raises:
        RunFileError: it is missing, damaged, or of another format.
    """
    way_out = "make it again with the command that compares tuners"
    content = read_json(path, way_out)
    if content.get("format") != FORMAT:
        raise RunFileError(f"{path} has the format {content.get('format')!r}, not {FORMAT!r}; {way_out}")
    try:
        results: dict[tuple[str, str], list[Result]] = {}
        for each in content["results"]:
            row = dict(each)
            results.setdefault((row.pop("kind"), row.pop("left_out")), []).append(Result(**row))
        found = tuple(
            JudgedFold(
                fold["kind"],
                fold["left_out"],
                tuple(fold["workloads"]),
                dict(fold["universal"]),
                tuple(results.get((fold["kind"], fold["left_out"]), ())),
            )
            for fold in content["folds"]
        )
        return Transfer(str(content["command"]), dict(content["protocol"]), found)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path} is damaged ({type(error).__name__}: {error}); {way_out}") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(each) for each in value]
    return value
