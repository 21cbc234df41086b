"""Recorder of traces: the target's own texts, those that thresholds lead to, and what the draft does along both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import (
    ExpectedGain,
    KeepChances,
    LatencyProfile,
    Pair,
    Sampling,
    Split,
    ThresholdDecoder,
    drafts_of,
    levels_of,
)

from ..backends.replay_table import tokens_kept, tolerances_needed
from ..profiles import profile_of
from ..workloads import Workload, workload
from .archive import TraceError
from .draft_recorder import Rows
from .find import find_trace
from .own_texts import (
    ALL_ROWS,
    OwnTexts,
    Recording,
    RecordSettings,
    chances_of,
    hung_together,
    joined,
    trained_beside,
)
from .trace import Trace

TOLERANCES = (0.25, 0.4, 0.6, 1.0)
TAKEN_BACK = (1,)
"""Thresholds whose decoding leads to detours: tolerances, and tokens taken back, of which K are the most."""

_PROMPTS, _TOKENS = 8, 32
"""Training prompts, and tokens of each, that chances are measured on where nothing was recorded."""
_measured: dict[tuple[int, str, Sampling], tuple[Pair, KeepChances]] = {}
"""Chances by the pair's identity, which is the pair's as long as it is held here."""


def record(
    name: str | Workload,
    split: Split,
    path: str | Path,
    settings: RecordSettings | None = None,
    progress: bool = False,
    profile: LatencyProfile | None = None,
) -> Trace:
    """Record a workload, and write the trace.

    First the target's own texts, then those that thresholds lead to, whose drafts end by `ExpectedGain`: by a latency
    profile, and by the chances that the own texts of the training prompts show.
    Those of the trace of the training prompts are taken where it stands beside the file; else a recording of the test
    prompts begins with the training prompts' texts.

    Args:
        name: a workload with a draft.
        split: of the prompts.
        path: the file to write, ending in ``.npz``. Finished prompts are kept beside it, in ``<path>.parts``, until the
            trace is complete; called again, a recording goes on from there.
        settings: amount to record.
        progress: show a progress bar.
        profile: by which the drafts of detours end; by default the pair's reference profile, or its own.

    Raises:
        TraceError: the parts found are those of another recording, or the target's generation config asks for what
            depends on where a prompt ends.
        PromptError: a prompt with its text does not fit into a model's context.
        ValueError: the pair has no draft. Loading errors as for `load_pair` and `load_prompts`.
    """
    settings = settings or RecordSettings()
    named, path = workload(name).with_split(split), Path(path)
    recording = Recording.begin(named, path, settings)
    if len(drafts_of(named.load().draft)) > 1:
        raise TraceError(
            f"pair {named.load().name} has several drafts, and a trace is of one: record them together with "
            "specgym.envs.recordings.mixed_recorder.record_mixed, as the command does"
        )
    if settings.detour_prompts and named.load().target.source_limit is not None:
        raise TraceError(
            f"{named.load().name} has an encoder, whose texts begin at their beginning, so that none which thresholds "
            "lead to can be followed from where it left the target's own: give --detour-prompts 0"
        )
    texts_of = _Texts(named, settings)

    def own_texts(of: Split) -> list[Rows]:
        chosen = named.prompt_ids(of)[: settings.prompts]
        shown = tqdm(chosen, f"{named} {of}, own texts", unit="prompt", disable=not progress)
        return [
            recording.part(f"{of}-{number:04}", partial(texts_of.own_text, prompt, settings.seed + number))
            for number, prompt in enumerate(shown)
        ]

    texts = own_texts(split)
    beside = trained_beside(path, recording.info, Trace.load)
    chances = (
        chances_of(texts if split == "train" else own_texts("train"), named.sampling)
        if beside is None
        else beside.chances
    )
    if settings.detour_prompts:
        texts_of.draft_by(replace(profile_of(named, profile, replayed=True).at(), chances=chances))
    shown = tqdm(recording.prompts, f"{named} {split}, detours", unit="prompt", disable=not progress)
    detours = [
        recording.part(f"detours-{number:04}", partial(
            texts_of.detours, prompt, texts[number], settings.seed + number, number < settings.detour_prompts
        ))
        for number, prompt in enumerate(shown)
    ]  # fmt: skip
    both = [{**text, **strayed} for text, strayed in zip(texts, detours, strict=True)]
    trace = joined(recording.info, recording.prompts, both, chances)
    trace.save(path)
    recording.finish()
    return Trace.load(path)


def chances_for(named: Workload) -> KeepChances:
    """Return how often the drafted tokens of a workload are kept: by its shipped trace, or else measured now.

    Args:
        named: a workload with a draft; it is loaded where no trace of it ships. A few training prompts are then
            decoded, once in this process.
    """
    try:
        return find_trace(None, named, "train")[0].chances
    except TraceError:
        pass
    key = (id(named.load()), named.name, named.sampling)
    if key not in _measured:
        texts = _Texts(named, RecordSettings())
        prompts = named.prompt_ids("train")[:_PROMPTS]
        rows = [texts.own_text(prompt, seed, _TOKENS) for seed, prompt in enumerate(prompts)]
        _measured[key] = named.load(), chances_of(rows, named.sampling)
    return _measured[key][1]


class _Texts(OwnTexts):
    """Texts of one draft: the target's own, and those that thresholds lead to."""

    def __init__(self, named: Workload, settings: RecordSettings) -> None:
        super().__init__(named, settings)
        self._detours = ThresholdDecoder(named.load(), settings.draft_length)

    def draft_by(self, profile: LatencyProfile) -> None:
        """Let the drafts of detours end by the expected gain."""
        self._detours.charge_by(profile)
        self._gain = ExpectedGain.of(profile, self._settings.draft_length)

    def own_text(self, prompt: Sequence[int], seed: int, tokens: int | None = None) -> Rows:
        """Record the target's own text of a prompt, with so many tokens at most."""
        (rows,) = self.of_each(prompt, seed, tokens)
        return rows

    def detours(self, prompt: Sequence[int], target_text: Rows, seed: int, follow: bool) -> Rows:
        """Record the texts that thresholds lead to; their rows are counted from the first of the target's text.

        Args:
            prompt: token ids.
            target_text: what `own_text` returned for it.
            seed: of all draws.
            follow: whether to record any; without, this is how the own text hangs together.
        """
        text = target_text["text"].tolist()
        strayed, taken, knobs = [], [], []
        known = {tuple(text[:place]): place for place in range(len(text))}
        columns = {name: list(target_text[name]) for name in ALL_ROWS}
        for thresholds in self._thresholds() if follow else ():
            other = self._detour(prompt, known, columns, thresholds, seed)
            prefixes = [tuple(other[:place]) for place in range(len(other))]
            first = next((place for place, prefix in enumerate(prefixes) if prefix not in known), None)
            if first is not None:  # once a text has left the others, it is on its own
                read = self._recorder.record([*prompt, *other[:first]], other[first:], seed)
                strayed.append({name: read[name] for name in ALL_ROWS})
                known |= {prefix: len(known) + number for number, prefix in enumerate(prefixes[first:])}
                for name in ALL_ROWS:
                    columns[name].extend(strayed[-1][name])
            row = np.full(self._settings.detour_tokens, -1)
            row[: len(other)] = [known[prefix] for prefix in prefixes]
            taken.append(row)
            knobs.append(thresholds)
        return {
            **hung_together(target_text, strayed, known if self._sampling.greedy else {}),
            "detour_rows": np.array(taken, np.int64).reshape(-1, self._settings.detour_tokens),
            "detour_knobs": np.array(knobs, np.float64).reshape(-1, 2),
        }

    def _detour(
        self,
        prompt: Sequence[int],
        known: Mapping[tuple[int, ...], int],
        columns: Mapping[str, Sequence[NDArray[Any]]],
        thresholds: tuple[float, float],
        seed: int,
    ) -> list[int]:
        """Follow two thresholds to a text: read it off the rows there are, then decode the rest."""
        tolerance, taken_back = thresholds
        text: list[int] = []
        budget = self._settings.detour_tokens
        while self._sampling.greedy and len(text) < budget and tuple(text) in known:
            tokens, successor, drafted, bins, match, distance = (columns[name][known[tuple(text)]] for name in ALL_ROWS)
            longest = int(self._gain.lengths(bins[None], [levels_of(tolerance)])[0, 0])
            count = min(int(drafted), longest, budget - len(text) - 1)
            agreed = (tolerances_needed(match[:count], distance[:count]) <= np.float32(tolerance)).sum()
            kept = int(tokens_kept(np.asarray(agreed), np.asarray(count), np.asarray(taken_back - 1)))
            for token in (*tokens[:kept].tolist(), int(successor[kept])):
                text.append(token)
                if token in self._eos:
                    return text
        if len(text) < budget:
            rest = self._detours.generate(
                [*prompt, *text],
                max_new_tokens=budget - len(text),
                sampling=self._sampling,
                seed=seed,
                knobs=dict(zip((knob.name for knob in self._detours.knobs), thresholds, strict=True)),
            )
            text += rest.tokens
        return text

    def _thresholds(self) -> list[tuple[float, float]]:
        numbers = sorted({min(number, self._settings.draft_length) for number in TAKEN_BACK})
        return [(tolerance, float(number)) for tolerance in TOLERANCES for number in numbers]
