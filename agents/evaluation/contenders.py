"""The company that learned knobs keep in the table: simpler ways to decode, chosen on training prompts alone.

Exact decoding with the best fixed length of draft, exact decoding by the tuned decoder itself, the decoder's defaults,
and the one setting that is best on all other workloads. What is chosen is chosen by replay where there are recordings,
charged by the run's own profiles, and else by decoding a few training prompts.

The verdict: which of them to use on each workload, by how much, and which one overall. Nothing is advised that was
slower than plain decoding on the held-out prompts, by the profile or by the clock, or that broke the bound on the
divergence there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specgym.decoding import Decoder, KnobError, LatencyProfile, SpeculativeDecoder, Split
from specgym.envs import (
    DIVERGENCE_BOUND,
    KnobMoves,
    Metrics,
    RewardSettings,
    TraceError,
    Workload,
    measure_setting,
    replay_backend,
    reward_terms,
)

from .live import Contender, strays
from .replayed import split_options
from .results import ALL, LEARNED, PLAIN, ResultTable, Row, kept_bound
from .statistics import Floats, grid_axes, settings_of
from .text_quality import changes_told

FIXED, STOP_RULE, DEFAULT, ONE_FOR_ALL = "exact, fixed", "exact, stop rule", "default", "one for all"
CLOSED_FORM = "closed form"
"""Methods beside plain decoding and what was learned."""
DO_NOT_SPECULATE = "do not speculate"
"""Rule of a row whose method advises plain decoding."""
BEST_EXACT = "best exact"
_EXACT = (FIXED, STOP_RULE)
LIVE_LENGTHS = (1, 2, 3, 4, 6, 8)
"""Fixed lengths that are tried where nothing is recorded."""
LIVE_PROMPTS = 3
LIVE_TOKENS = 32
MOST = 320
"""Settings that are tried on recordings."""
PASSES = 4
"""Passes over recorded prompts: replays draw at random where decoding does, and for their path."""


Methods = Mapping[str, Row]
"""Rows of a workload by method."""


class TrainingReplay:
    """The recorded prompts of a workload, on which a decoder's settings are measured; by default those of training.

    Args:
        decoder: a registered name.
        workload: whose prompts.
        recording: of the prompts, or its file; None for the one that ships.
        profile: what time is charged by.
        options: build options of the decoder, by name.
        max_new_tokens: decoded of each prompt, at most.
        split: of the prompts.

    Attributes:
        workload: its name.
        knobs: of the decoder.
        grid: a dense grid of settings.

    Raises:
        TraceError: there is no such recording, or it has shorter texts or other drafts than asked for.
        KnobError: the recording has not the whole range of a knob.
    """

    def __init__(
        self,
        decoder: str,
        workload: Workload,
        recording: Path | None,
        profile: LatencyProfile,
        options: Mapping[str, Any],
        max_new_tokens: int,
        split: Split = "train",
    ) -> None:
        self._backend = replay_backend(
            decoder,
            workload.with_split(split),
            recording,
            split=split,
            profile=profile,
            max_new_tokens=max_new_tokens,
            **split_options(options, "options"),
        )
        self.workload = workload.name
        self.knobs = self._backend.knobs
        ranges = KnobMoves(self.knobs, None, None).ranges
        self._backend.check_ranges(ranges)
        self.grid = settings_of(grid_axes(self.knobs, ranges, MOST))

    def sums(self, settings: Sequence[Mapping[str, float]]) -> Metrics[Floats]:
        """Sums of some settings over each prompt, arrays of shape (settings, prompts)."""
        prompts = np.tile(self._backend.prompts[0], PASSES)
        workloads = np.zeros(len(prompts), np.int64)
        rows = []
        for setting in settings:
            arrays = {name: np.full(len(prompts), float(value)) for name, value in setting.items()}
            metrics = self._backend.decode(prompts, workloads, arrays, np.random.default_rng(0))
            rows.append([values.reshape(PASSES, -1).sum(0) for values in metrics])
        return Metrics(*(np.stack(columns) for columns in zip(*rows, strict=True)))

    def measure(self, settings: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
        """Metrics of some settings over all prompts, arrays of shape (settings,) by name."""
        entries = Metrics(*(values.sum(1) for values in self.sums(settings))).entries()
        return {name: np.asarray(values) for name, values in entries.items()}


def replays(
    decoder: str,
    workloads: Sequence[Workload],
    recordings: Sequence[Path | None],
    profiles: Sequence[LatencyProfile],
    options: Mapping[str, Any],
    max_new_tokens: int,
) -> list[TrainingReplay]:
    """The recorded training prompts of some workloads; none at all unless every one has them.

    Arguments as for `TrainingReplay`, each but the decoder's with one entry a workload.
    """
    try:
        return [
            TrainingReplay(decoder, workload, recording, profile, options, max_new_tokens)
            for workload, recording, profile in zip(workloads, recordings, profiles, strict=True)
        ]
    except (TraceError, KnobError):
        return []


def fixed_length(
    workload: Workload, recording: Path | None, profile: LatencyProfile, longest: int, max_new_tokens: int
) -> int:
    """The length of drafts with which exact decoding is fastest on training prompts; 0 where plain decoding is.

    Args:
        workload: whose prompts.
        recording: of them; None for the one that ships. Where there is none that fits, a few prompts are decoded live
            with each of `LIVE_LENGTHS`.
        profile: what time is charged by.
        longest: length, at most.
        max_new_tokens: decoded of each prompt, at most.
    """
    options = {"max_draft_length": longest, "stop": "never"}
    try:
        replay = TrainingReplay(SpeculativeDecoder.name, workload, recording, profile, options, max_new_tokens)
    except (TraceError, KnobError):
        return _measured_length(workload, profile, longest, max_new_tokens)
    best = replay.grid[int(np.argmax(replay.measure(replay.grid)["speedup"]))]
    return int(best[replay.knobs[0].name])


def _measured_length(workload: Workload, profile: LatencyProfile, longest: int, max_new_tokens: int) -> int:
    decoder = SpeculativeDecoder(workload.load(), longest, "never")
    prompts, tokens = workload.prompt_ids("train")[:LIVE_PROMPTS], min(max_new_tokens, LIVE_TOKENS)
    (knob,) = decoder.knobs
    speedups = {
        length: measure_setting(
            decoder, {knob.name: length}, prompts, tokens, workload.sampling, seed=0, profile=profile
        )["speedup"]
        for length in LIVE_LENGTHS
        if length <= longest
    }
    return max(speedups, key=lambda length: speedups[length])


def settings_of_others(
    measured: Sequence[TrainingReplay], reward: RewardSettings, bound: float | None, exact: Mapping[str, float] | None
) -> dict[str, dict[str, float]]:
    """For each workload the one setting that is best on the training prompts of all others.

    Args:
        measured: the workloads' training prompts.
        reward: what a setting is worth where there is no bound.
        bound: on the mean divergence. The setting keeps it on every other workload, and is the fastest one on average
            that does; if none does, the one that breaks it least.
        exact: knobs at which the decoder is exact, tried beside the grid.

    Returns:
        Knobs by workload. Nothing where there is no other workload, or knobs range differently among them.
    """
    if len(measured) < 2 or any(replay.grid != measured[0].grid for replay in measured):
        return {}
    settings = [*measured[0].grid, *([dict(exact)] if exact else [])]
    columns = {name: np.array([setting[name] for setting in settings]) for name in settings[0]}
    worth, excess = [], []
    for replay in measured:
        values = replay.measure(settings)
        terms = reward_terms(
            reward,
            speedup=values["speedup"],
            acceptance_rate=values["draft_acceptance_rate"],
            divergence=values["divergence"],
            knobs=replay.knobs,
            values=columns,
        )
        worth.append(np.asarray(sum(terms.values())) if bound is None else values["speedup"])
        excess.append(np.maximum(values["divergence"] - (np.inf if bound is None else bound), 0.0))
    best = {}
    for place, replay in enumerate(measured):
        beyond = np.delete(excess, place, axis=0).max(0)
        mean = np.delete(worth, place, axis=0).mean(0)
        best[replay.workload] = settings[int(np.lexsort((-mean, beyond))[0])]
    return best


def contenders(
    decoder: Decoder,
    learned: Mapping[str, float] | None,
    *,
    exact_length: int | None = None,
    exact_knobs: Mapping[str, float] | None = None,
    one_for_all: Mapping[str, float] | None = None,
) -> list[Contender]:
    """All that is compared with plain decoding on a workload, in the order of the table.

    Args:
        decoder: that is tuned, on the workload's pair.
        learned: the knobs that were learned; None where the advice is not to speculate.
        exact_length: length of drafts for exact decoding with a fixed length; None to leave it out.
        exact_knobs: knobs at which a decoder that is lossy otherwise is exact; None to leave it out.
        one_for_all: the setting that is best on other workloads; None to leave it out.
    """
    company = []
    if exact_length is not None:
        exact = SpeculativeDecoder(decoder.pair, max(exact_length, 1), "never")
        length = {exact.knobs[0].name: exact_length}
        company.append(Contender(FIXED, exact, length, f"length {exact_length}"))
    if exact_knobs is not None:
        company.append(Contender(STOP_RULE, decoder, exact_knobs))
    company.append(Contender(DEFAULT, decoder))
    if one_for_all is not None:
        company.append(Contender(ONE_FOR_ALL, decoder, one_for_all))
    if learned is None:
        return [*company, Contender(LEARNED, None, rule=DO_NOT_SPECULATE)]
    return [*company, Contender(LEARNED, decoder, learned)]


def live_verdict(rows: Sequence[Row], knobs_together: str = "knobs", max_divergence: float | None = None) -> str:
    """A line for each workload on what to use there, and a last one over all.

    What is fastest is to be used; where the divergence has a price instead of a bound, what has the highest reward.

    Args:
        rows: of `judge_live`, with or without their means.
        knobs_together: what the knobs are called together.
        max_divergence: the bound that was asked for, if there was one.
    """
    by_workload = ResultTable([row for row in rows if row.workload != ALL]).by_workload()
    judge = _Judge(f"learned {knobs_together}", max_divergence, strays(row.values for row in rows))
    lines = [judge.line(name, methods) for name, methods in by_workload.items()]
    return "\n".join([*lines, judge.summary(list(by_workload.values()), rows)])


class _Judge:
    """Judge of rows by one aim and one bound, who knows the words for them.

    Args:
        learned: what was learned, in words.
        bound: on the divergence, if there is one.
        strayed: whether any text is not the target's.
    """

    def __init__(self, learned: str, bound: float | None, strayed: bool) -> None:
        self._bound, self._strayed = bound, strayed
        self._aim = "reward" if bound is None else "speedup"
        self._words = {
            FIXED: "exact decoding with drafts of a fixed length",
            STOP_RULE: "exact decoding with the stop rule",
            BEST_EXACT: "exact decoding",
            DEFAULT: "the defaults",
            CLOSED_FORM: "the closed form",
            ONE_FOR_ALL: "one setting for all",
            LEARNED: learned,
        }

    def line(self, workload: str, methods: Methods) -> str:
        """Advice on a workload, in a line."""
        rivals = [row for row in methods.values() if row.method != PLAIN]
        kept = [row for row in rivals if self._keeps(row)]
        paying = [row for row in kept if _pays(row)]
        if not paying:
            within = " within the bound" if any(map(_pays, rivals)) else ""
            best = max(kept or rivals, key=_speedup)
            return f"{workload}: {DO_NOT_SPECULATE}: nothing{within} is faster than plain decoding (best {_both(best)})"
        # Where two decoded alike, what was learned is as good as what is simpler, and is what was asked for.
        best = max(paying, key=lambda row: (row.values[self._aim], row.method == LEARNED))
        words = self._words[best.method] if best.method != FIXED else f"exact decoding, {best.rule}"
        text = f"{workload}: {words}, {_speedup(best):.2f} x plain (clock {best.values['wall_speedup']:.2f})"
        exact = [methods[method] for method in _EXACT if method in methods]
        if exact and best.method not in _EXACT:
            text += f", {_speedup(best) / max(map(_speedup, exact)):.2f} x the best exact"
        elif not exact and best.method == LEARNED and DEFAULT in methods:
            text += f", {_speedup(best) / _speedup(methods[DEFAULT]):.2f} x the defaults"
        if self._strayed and best.method not in _EXACT:
            bound = f" (bound {self._bound:g})" if self._bound is not None else ""
            text += f"; divergence {best.values['divergence']:.3f}{bound}{changes_told(best.values)}"
        return text if best.method == LEARNED else text + f"; {self._on_learned(methods[LEARNED])}"

    def summary(self, workloads: Sequence[Methods], rows: Sequence[Row]) -> str:
        """Means over all workloads, and the way to be preferred."""
        sentences = [kept_bound(rows, self._bound).strip()] if self._bound is not None else []
        means = [_with_best_exact(methods, self._aim) for methods in workloads]
        known = [
            method
            for method in (BEST_EXACT, DEFAULT, CLOSED_FORM, ONE_FOR_ALL, LEARNED)
            if all(method in of for of in means)
        ]
        speeds = ", ".join(
            f"{method} {_mean(means, method, 'speedup'):.2f} ({_mean(means, method, 'wall_speedup'):.2f})"
            for method in known
        )
        over = f"over {len(workloads)} workloads" if len(workloads) > 1 else "on one workload"
        sentences.append(f"Mean speedup {over}, by the profile and (by the clock): plain 1.00 (1.00), {speeds}.")
        usable = [
            method
            for method in known
            if round(_mean(means, method, "speedup"), 2) > 1 and all(self._keeps(of[method]) for of in means)
        ]
        if usable:
            best = max(usable, key=lambda method: (_mean(means, method, self._aim), method == LEARNED))
            sentences.append(f"To be preferred overall: {self._words[best]}.")
        else:
            sentences.append("Overall plain decoding is to be preferred.")
        learned, default = ({key: _mean(means, m, key) for key in means[0][m].values} for m in (LEARNED, DEFAULT))
        if not self._strayed:
            sentences.append(
                f"The text is the target's own, which reads {learned['target_tokens_per_token']:.1f} tokens for every "
                f"one emitted (the defaults: {default['target_tokens_per_token']:.1f})."
            )
        elif self._bound is None and learned["divergence"] > max(default["divergence"], DIVERGENCE_BOUND):
            sentences.append(
                "The learned text follows the draft more than the target would; where that matters, train with "
                "--max-divergence, or --environment.reward.divergence-weight above 0."
            )
        return " ".join(sentences)

    def _keeps(self, row: Row) -> bool:
        return self._bound is None or row.values["divergence"] <= self._bound

    def _on_learned(self, row: Row) -> str:
        """Reason why the advice is not what was learned."""
        if row.rule == DO_NOT_SPECULATE:
            return "what was learned is not to speculate"
        if not self._keeps(row):
            return f"the learned setting breaks the bound (divergence {row.values['divergence']:.3f})"
        if not _pays(row):
            return f"the learned setting is not faster than plain decoding ({_both(row)})"
        return f"the learned setting is no better ({_both(row)})"


def _speedup(row: Row) -> float:
    return row.values["speedup"]


def _both(row: Row) -> str:
    return f"{_speedup(row):.2f} x, clock {row.values['wall_speedup']:.2f}"


def _pays(row: Row) -> bool:
    """True if a setting is faster than plain decoding in the figures that are shown, of the profile and the clock."""
    return min(round(row.values[column], 2) for column in ("speedup", "wall_speedup")) > 1


def _with_best_exact(methods: Methods, aim: str) -> dict[str, Row]:
    exact = [methods[method] for method in _EXACT if method in methods]
    return {**methods, **({BEST_EXACT: max(exact, key=lambda row: row.values[aim])} if exact else {})}


def _mean(workloads: Sequence[Methods], method: str, column: str) -> float:
    return float(np.mean([methods[method].values[column] for methods in workloads if column in methods[method].values]))
