"""The evaluation's rows as a table for people, and the comparison with one that was stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..training.files import RunFileError, read_json
from .live import ALL, CHARGED, FORMAT, Row, strays

_NOTABLE_DIVERGENCE = 0.05


def rendered(rows: Sequence[Row], title: str) -> Table:
    """A rich table; half the width of the 95 % interval follows a number after ±."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workload\n  method", min_width=16, max_width=24, overflow="fold")
    names = next((",\n".join(row.knobs) for row in rows if row.knobs), "knobs")
    strayed = strays(row.values for row in rows)
    price = "diver-\ngence" if strayed else "tokens read\n/token"
    for heading in (names, "ms/\ntoken", "speedup", "accept.\nrate", "tokens\n/round", price, "reward",
                    "clock ms\n/token"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if row.workload != previous:
            if previous is not None:
                table.add_section()
            table.add_row(row.workload)
        values = row.values
        table.add_row(
            f"  {row.method}",
            ", ".join(str(value) if isinstance(value, int) else f"{value:.2f}" for value in row.knobs.values()) or "-",
            f"{values['ms_per_token']:.2f}",
            _with_interval(row, "speedup"),
            f"{values['draft_acceptance_rate']:.3f}",
            f"{values['mean_acceptance_length']:.2f}",
            f"{values['divergence']:.3f}" if strayed else f"{values['target_tokens_per_token']:.2f}",
            _with_interval(row, "reward"),
            f"{values['wall_ms_per_token']:.2f}",
            style="bold" if row.method == "learned" else None,
        )
        previous = row.workload
    table.caption = (
        "ms/token and speedup are charged by the run's latency profiles; the clock's column is measured anew every "
        "time. ± is half a 95 % interval over prompts."
    )
    if not strayed:
        table.caption += " Tokens read are the target's, for every one emitted: plain decoding reads one."
    return table


def differences(rows: Sequence[Row], path: Path) -> list[str]:
    """Where the charged columns differ from a stored table's, one line each; none if it is reproduced.

    Raises:
        RunFileError: the stored table is missing or damaged.
    """
    way_out = "write it again with: python train.py --resume <run>"
    content = read_json(path, way_out)
    stored = content.get("rows")
    if content.get("format") != FORMAT or not isinstance(stored, list):
        raise RunFileError(f"{path} does not hold a table ({FORMAT}); {way_out}")
    by_name: dict[tuple[Any, Any], Mapping[str, Any]] = {
        (row.get("workload"), row.get("method")): row for row in stored
    }
    found = []
    for row in rows:
        before = by_name.get((row.workload, row.method))
        if before is None:
            found.append(f"{row.workload}, {row.method}: not in {path}")
            continue
        for column in (name for name in CHARGED if name in row.values):
            old, new = before.get(column), row.values[column]
            if old is None or abs(old - new) > 1e-9 * max(1.0, abs(new)):
                found.append(f"{row.workload}, {row.method}: {column} was {old}, is {new}")
    return found


def verdict(rows: Sequence[Row], learned_what: str = "thresholds", max_divergence: float | None = None) -> str:
    """What was learned, over all workloads, in a sentence; where it strays from the target, a second one on how far.

    Args:
        rows: of the table.
        learned_what: how the knobs are called together.
        max_divergence: the bound that was asked for, if there was one.
    """
    chosen = [row for row in rows if row.workload == ALL] or list(rows)
    by_method = {row.method: row.values for row in chosen}
    default, learned = by_method["default"], by_method["learned"]
    sentence = (
        f"Learned {learned_what} against the defaults: reward {learned['reward']:.3f} against {default['reward']:.3f}, "
        f"speedup {learned['speedup']:.2f} against {default['speedup']:.2f} over plain decoding, "
    )
    if not strays(row.values for row in rows):
        return sentence + (
            f"with {learned['mean_acceptance_length']:.2f} against {default['mean_acceptance_length']:.2f} tokens a "
            f"round, for {learned['target_tokens_per_token']:.1f} against {default['target_tokens_per_token']:.1f} "
            "tokens that the target reads for every one emitted. The text is the target's own."
        )
    sentence += f"divergence {learned['divergence']:.3f} against {default['divergence']:.3f}."
    if max_divergence is not None:
        of_learned = [row for row in rows if row.method == "learned" and row.workload != ALL]
        broken = [row.workload for row in of_learned if row.values["divergence"] > max_divergence]
        kept = f"{len(of_learned) - len(broken)} of {len(of_learned)} workloads"
        sentence += f" The bound of {max_divergence:g} on the divergence is kept on the held-out prompts of {kept}"
        sentence += f", not on {', '.join(broken)}." if broken else "."
    elif learned["divergence"] > max(default["divergence"], _NOTABLE_DIVERGENCE):
        sentence += (
            " The learned text follows the draft more than the target would; where that matters, train with "
            "--max-divergence, or --environment.reward.divergence-weight above 0."
        )
    return sentence


def _with_interval(row: Row, column: str) -> str:
    text = f"{row.values[column]:.2f}"
    if column not in row.intervals:
        return text
    low, high = row.intervals[column]
    return f"{text}±{(high - low) / 2:.2f}"
