"""Judgement of an engine's settings on held-out prompts, beside plain decoding, its own setting and the closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from specgym.envs import ComparedText, EngineBackend

from ..evaluation.contenders import DEFAULT
from ..evaluation.results import ALL, PLAIN, RECOMMENDED, Column, ResultTable, Row, machine, with_intervals
from .readings import Counts
from .search import LEAST, Candidate
from .trials import Measuring, Speeds, setting_key

COLUMNS: Final = (
    Column("tokens_per_second", "tokens\n/s", ".1f"),
    Column("speedup", "speedup", interval=True),
    Column("over_default", "times\ndefault", interval=True),
    Column("draft_acceptance_rate", "accept.\nrate"),
    Column("mean_acceptance_length", "tokens\n/round"),
    Column("equal_texts", "equal\ntexts", ".0%"),
)
CAPTION: Final = (
    "By the engine's own clock, without reading the prompts; each text decoded plainly and with the setting in turns. "
    "Speedup: over plain decoding; ± half of a 95 % interval over the prompts. Tokens/s: those of plain decoding times "
    "the speedup. Equal texts: of a greedy text with the engine's own plain one. One for all: four tokens, whatever "
    "the engine and the draft. Closed form: arXiv 2211.17192, by the same measurements."
)


@dataclass(frozen=True)
class Setting:
    """A setting to judge.

    Attributes:
        draft: that drafts, by its name.
        knobs: in the engine's terms; None for plain decoding.
    """

    draft: str
    knobs: Mapping[str, float] | None


def judge(measuring: Measuring, settings: Mapping[str, Setting], prompts: int, greedy: bool) -> ResultTable:
    """Decode held-out prompts with some settings, each beside plain decoding, and return the table.

    Args:
        measuring: of the backends of the held-out prompts.
        settings: by method; methods with one setting share its texts. `DEFAULT` is what others are compared with.
        prompts: decoded of every set.
        greedy: whether equality of texts means anything.

    Raises:
        EngineError: the engine has died or failed.
    """
    backends = measuring.backends
    first = next(iter(backends.values()))
    texts = [
        (workload, prompt) for workload, of_set in enumerate(first.texts) for prompt in range(min(prompts, len(of_set)))
    ]
    by_setting: dict[object, Sequence[ComparedText]] = {}
    failed: list[str] = []
    for setting in settings.values():
        key = setting_key(setting.draft, setting.knobs)
        if setting.knobs is not None and key not in by_setting:
            trial = measuring.take(setting.draft, setting.knobs, "held out", texts)
            by_setting[key] = trial.texts
            failed += [trial.failed] if trial.failed else []
    decoded = [text for same in by_setting.values() for text in same]
    of_method = {
        method: [] if setting.knobs is None else by_setting[setting_key(setting.draft, setting.knobs)]
        for method, setting in settings.items()
    }
    names = [str(named.prompts if isinstance(named.prompts, str) else named.prompts.name) for named in first.workloads]
    groups = [(name, [place]) for place, name in enumerate(names)]
    if len(groups) > 1:
        groups.append((ALL, list(range(len(names)))))
    rows = [
        row for name, places in groups for row in _rows(name, places, backends, settings, of_method, decoded, greedy)
    ]
    columns = COLUMNS if greedy else COLUMNS[:-1]
    return ResultTable(rows, columns, caption=CAPTION, hardware=machine(), notes=failed)


def _rows(
    workload: str,
    places: Sequence[int],
    backends: Mapping[str, EngineBackend],
    settings: Mapping[str, Setting],
    of_method: Mapping[str, Sequence[ComparedText]],
    decoded: Sequence[ComparedText],
    greedy: bool,
) -> list[Row]:
    """A row for plain decoding and one for every method on some workloads."""
    texts = {method: [text for text in of_all if text.workload in places] for method, of_all in of_method.items()}
    speeds = {method: Speeds.of(same) for method, same in texts.items() if same}
    if not speeds:
        return []
    plain = [text.plain for text in decoded if text.workload in places]
    rate = sum(text.timed_tokens for text in plain) / sum(text.seconds for text in plain)
    still = np.ones_like(next(iter(speeds.values())).speedup)
    default = speeds[DEFAULT].speedup if DEFAULT in speeds else None

    def row(method: str, speedup: NDArray[np.float64], knobs: Mapping[str, float], rule: str, **more: float) -> Row:
        columns = {"speedup": speedup} | ({} if default is None else {"over_default": speedup / default})
        values, intervals = with_intervals(columns)
        return Row(
            workload, method, knobs, {"tokens_per_second": rate * values["speedup"], **values, **more}, intervals, rule
        )

    rows = [row(PLAIN, still, {}, "")]
    for method, setting in settings.items():
        if setting.knobs is None:
            rows.append(row(method, still, {}, "do not speculate"))
        elif method in speeds:
            knobs = backends[setting.draft].engine.knobs
            shown = {
                knob.name: int(setting.knobs[knob.name]) if knob.integer else setting.knobs[knob.name] for knob in knobs
            }
            more: dict[str, float] = (
                {"equal_texts": float(np.mean([text.equal for text in texts[method]]))} if greedy else {}
            )
            if (counts := Counts.of(texts[method])) is not None:
                more["draft_acceptance_rate"] = counts.accepted / max(counts.drafted, 1)
                more["mean_acceptance_length"] = counts.tokens / max(counts.rounds, 1)
            rows.append(row(method, speeds[method].speedup, shown, "", **more))
    return rows


def tried_table(candidates: Sequence[Candidate], sets: Sequence[str]) -> Table:
    """Show what was measured, the fastest first, as a rich table.

    Args:
        candidates: settings, in order.
        sets: names of the sets of prompts.
    """
    table = Table(title="Measured on training prompts", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("setting", overflow="fold")
    for heading in ("texts", "tokens/s", "speedup", *(sets if len(sets) > 1 else ())):
        table.add_column(heading, justify="right")
    for draft in dict.fromkeys(candidate.draft for candidate in candidates):
        same = [candidate for candidate in candidates if candidate.draft == draft]
        table.add_row(f"{draft}: {', '.join(same[0].knobs)}")
        for candidate in same:
            low, high = candidate.interval
            table.add_row(
                f"  {', '.join(f'{value:g}' for value in candidate.knobs.values())}",
                str(candidate.texts),
                f"{candidate.speeds.drafted[0]:.1f}",
                f"{candidate.speedup:.2f} ({low:.2f} to {high:.2f})",
                *(f"{speeds.speedup[0]:.2f}" for speeds in candidate.by_set if len(sets) > 1),
            )
    table.caption = "Speedup: over plain decoding of the same texts on the same engine, with a 95 % interval."
    return table


def _written(knobs: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in knobs.items())


def pays(table: ResultTable) -> bool:
    """Return whether the recommended setting is faster than plain decoding on held-out prompts."""
    by_workload = table.by_workload()
    every = by_workload.get(ALL) or next(iter(by_workload.values()), {})
    return RECOMMENDED in every and every[RECOMMENDED].values["speedup"] > 1


def verdict(table: ResultTable) -> str:
    """Return what to serve with, in sentences, by the held-out prompts."""
    by_workload = table.by_workload()
    every = by_workload.get(ALL) or next(iter(by_workload.values()), {})
    recommended = every.get(RECOMMENDED)
    if recommended is None:
        return "Do not speculate: nothing that was tried could be measured."
    times = (
        "" if "over_default" not in recommended.values else f", {_shown(recommended, 'over_default')} times the default"
    )
    if not recommended.knobs:
        return f"Do not speculate: nothing that was tried pays. That is 1.00 times plain decoding{times}."
    setting = _written(recommended.knobs)
    sentences = [
        f"Recommended: {setting}. On held-out prompts {_shown(recommended, 'speedup')} times plain decoding{times}."
    ]
    slower = [
        f"{name} ({row.values['speedup']:.2f})"
        for name, rows in by_workload.items()
        if name != ALL and (row := rows.get(RECOMMENDED)) is not None and row.values["speedup"] < LEAST
    ]
    if not pays(table):
        sentences.append("It did not hold on held-out prompts: do not speculate.")
    elif slower:
        sentences.append(f"Slower than plain decoding on {', '.join(slower)}: do not speculate there.")
    unequal = 1 - recommended.values.get("equal_texts", 1.0)
    if unequal > 0:
        sentences.append(
            f"{unequal:.0%} of the greedy texts differ from the engine's own plain ones: its arithmetic depends on how "
            "many tokens it verifies at a time."
        )
    rivals = {name: row.values["speedup"] for name, row in every.items() if name not in (RECOMMENDED, PLAIN)}
    better = {name: speedup for name, speedup in rivals.items() if speedup > recommended.values["speedup"] * 1.01}
    for name, speedup in better.items():
        sentences.append(f"Faster here: {name}, {speedup:.2f} times plain decoding.")
    return " ".join(sentences)


def _shown(row: Row, column: str) -> str:
    text = f"{row.values[column]:.2f}"
    if column in row.intervals:
        low, high = row.intervals[column]
        text += f" ({low:.2f} to {high:.2f})"
    return text
