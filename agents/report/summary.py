"""Summary of a run in sentences that are computed from its tables; also where something simpler is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.heat_map import HeatMap
from ..evaluation.live import strays
from ..evaluation.results import ALL, LEARNED, PLAIN, ResultTable, Row
from ..evaluation.unseen.comparison import WITHIN
from ..evaluation.unseen.transfer import LEVEL

DEFAULT, BEST = "default", "best"
"""Methods in tables; the second is the best setting of the grid, which is known only afterwards."""
SHARE = "share_of_best"
KINDS = {"pair": "pair of models", "dataset": "dataset", "family": "family of target models"}
"""Kinds of things left out of training, in words."""
_NAMED = 6


def summarise(
    table: ResultTable, maps: Sequence[HeatMap], transfer: Mapping[str, Any] | None, subject: str = "knobs"
) -> list[str]:
    """Sentences on each part that there is, the held-out prompts first.

    Args:
        table: on held-out prompts; may have no rows.
        maps: heat maps of the workloads.
        transfer: the content of ``transfer.json``, if there is one.
        subject: what was learned.
    """
    sentences = _of_table(table, subject) or ([table.verdict] if table.verdict else [])
    sentences += _of_maps(maps)
    if transfer is not None:
        for kind in dict.fromkeys(row["kind"] for row in transfer["summary"]):
            sentences += _of_transfer(transfer, kind)
    return sentences or ["The run holds no results yet."]


def _of_table(table: ResultTable, subject: str) -> list[str]:
    by_workload = table.by_workload()
    over_all = by_workload.pop(ALL, None) or next(iter(by_workload.values()), {})
    if not over_all.keys() >= {LEARNED, DEFAULT} or not by_workload or "reward" not in over_all[LEARNED].values:
        return []
    learned, default = over_all[LEARNED].values, over_all[DEFAULT].values
    sentences = [
        f"On the held-out prompts of {_count(len(by_workload), 'workload')} the learned {subject} reach a mean reward "
        f"of {learned['reward']:.3f}, against {default['reward']:.3f} with the decoder's defaults. They decode "
        f"{learned['speedup']:.2f} times as fast as plain decoding (the defaults: {default['speedup']:.2f}), "
        f"{_price(learned, default, strays(row.values for row in table.rows))}"
    ]
    shares = [
        f"{method} {_percent(row.values[SHARE])}"
        for method, row in over_all.items()
        if SHARE in row.values and method != BEST
    ]
    if shares:
        sentences.append(f"Of the best reward on a dense grid they reach on average: {', '.join(shares)}.")
    for rival in over_all:
        if rival not in (LEARNED, PLAIN, BEST):
            sentences += _against(by_workload, rival)
    slower = [
        name for name, methods in by_workload.items() if LEARNED in methods and methods[LEARNED].values["speedup"] < 1
    ]
    if slower:
        sentences.append(f"Plain decoding is faster than the learned {subject} on {_listed(slower)}.")
    return sentences


def _price(learned: Mapping[str, float], default: Mapping[str, float], strayed: bool) -> str:
    """The price of speed: another text, or more tokens that the target reads, where they were counted."""
    if not strayed and "target_tokens_per_token" in learned:
        return (
            f"and the target reads {learned['target_tokens_per_token']:.1f} tokens for every one emitted (the "
            f"defaults: {default['target_tokens_per_token']:.1f}). The text is the target's own."
        )
    return (
        f"with a divergence of {learned['divergence']:.3f} from the target (the defaults: {default['divergence']:.3f})."
    )


def _against(by_workload: Mapping[str, Mapping[str, Row]], rival: str) -> list[str]:
    """Workloads where the learned setting has the higher reward, and where the rival has it."""
    both = {name: methods for name, methods in by_workload.items() if {LEARNED, rival} <= methods.keys()}
    gains = {
        name: methods[LEARNED].values["reward"] - methods[rival].values["reward"] for name, methods in both.items()
    }
    better = [name for name, gain in gains.items() if gain > 0]
    clear = [
        name
        for name in better
        if all("reward" in both[name][method].intervals for method in (LEARNED, rival))
        and both[name][LEARNED].intervals["reward"][0] > both[name][rival].intervals["reward"][1]
    ]
    sentence = (
        f"Against {rival}, the learned reward is higher on {len(better)} of {_count(len(both), 'workload')}; on "
        f"{len(clear)} of these the two 95 % intervals do not overlap."
    )
    worse = sorted((gain, name) for name, gain in gains.items() if gain < 0)
    if worse:
        sentence += f" A simpler setting, {rival}, is better on {_listed([name for _, name in worse])}."
    return [sentence]


def _of_maps(maps: Sequence[HeatMap]) -> list[str]:
    shares = {
        drawn.workload: drawn.reward_at(drawn.recommended) / drawn.reward_at(drawn.best)
        for drawn in maps
        if drawn.recommended is not None and drawn.reward_at(drawn.best) > 0
    }
    if not shares:
        return []
    least = min(shares, key=lambda name: shares[name])
    close = sum(share >= WITHIN for share in shares.values())
    return [
        f"On the grids the recommended settings reach {_percent(sum(shares.values()) / len(shares))} of the best "
        f"reward on average, at least {_percent(shares[least])} ({least}), and are within 3 % of the best on {close} "
        f"of {_count(len(shares), 'workload')}."
    ]


def _of_transfer(transfer: Mapping[str, Any], kind: str) -> list[str]:
    rows = [row for row in transfer["summary"] if row["kind"] == kind]
    most = max(row["measurements"] for row in rows)
    after = sorted((row for row in rows if row["measurements"] == most), key=lambda row: -row["fraction"])
    learned = next((row for row in after if row["method"] == LEARNED), None)
    begin = f"On workloads whose {KINDS.get(kind, kind)} training never saw,"
    if learned is None:
        best = after[0]
        return [
            f"{begin} the best method after {_count(most, 'measurement')} is {best['method']}, with {_share(best)} of "
            f"the grid's best; there is no learned tuner among the methods."
        ]
    sentences = [
        f"{begin} the learned tuner reaches {_share(learned)} of the grid's best after {_count(most, 'measurement')}, "
        f"and comes within 3 % of it on {_percent(learned['within'])} of the pairs."
    ]
    first = [row for row in rows if row["measurements"] == 0 and row["method"] == LEARNED]
    if first and most > 0:
        sentences[0] = sentences[0][:-1] + f"; before any measurement it reaches {_share(first[0])}."
    ahead = [row for row in after if round(row["fraction"] - learned["fraction"], 6) > 0]
    if ahead:
        names = _listed([f"{row['method']} ({_percent(row['fraction'])})" for row in ahead], len(ahead))
        simpler = "A simpler method wins" if len(ahead) == 1 else "Simpler methods win"
        sentences.append(f"{simpler} there: {names}.")
    else:
        second = next((row for row in after if row is not learned), None)
        if second is not None:
            sentences.append(f"No other method is better there; next is {second['method']} with {_share(second)}.")
    return sentences + _of_tests(transfer, kind, most)


def _of_tests(transfer: Mapping[str, Any], kind: str, measurements: int) -> list[str]:
    tests = [
        test for test in transfer["tests"]
        if (test["kind"], test["measurements"], test["method"]) == (kind, measurements, LEARNED)
    ]  # fmt: skip
    if not tests:
        return []
    better = [test["against"] for test in tests if test["p_adjusted"] < LEVEL and test["difference"] > 0]
    worse = [test["against"] for test in tests if test["p_adjusted"] < LEVEL and test["difference"] < 0]
    open_ = [test["against"] for test in tests if test["against"] not in (*better, *worse)]
    parts = [
        f"{words} {_listed(names, len(names))}"
        for words, names in (
            ("significantly better than", better),
            ("significantly worse than", worse),
            ("not distinguishable from", open_),
        )
        if names
    ]
    return [f"By paired tests with corrected p values, learned is {'; '.join(parts)}."]


def _listed(names: Sequence[str], most: int = _NAMED) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(row: Mapping[str, Any]) -> str:
    return f"{_percent(row['fraction'])} (95 % interval {100 * row['low']:.1f} to {100 * row['high']:.1f})"
