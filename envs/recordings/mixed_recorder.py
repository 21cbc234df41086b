"""Recorder of mixed traces: the target's own texts, and what each of several drafts does along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from specgym.decoding import Split, draft_digest, drafts_of, is_free

from ..workloads import Workload, workload
from .draft_recorder import Rows
from .mixed_trace import MixedTrace
from .own_texts import (
    OwnTexts,
    Recording,
    RecordSettings,
    chances_of,
    hung_together,
    joined,
    trained_beside,
)

_OF_TEXT = ("text", "ended")
"""Arrays of a part that all drafts share."""


def record_mixed(
    name: str | Workload,
    split: Split,
    path: str | Path,
    settings: RecordSettings | None = None,
    progress: bool = False,
) -> MixedTrace:
    """Record a workload whose pair has several drafts, and write the mixed trace.

    The target's text of every prompt is made once, and every draft is recorded along it, as it would be alone. There
    are no detours. How often drafted tokens are kept, by confidence, is counted on the training prompts, for each
    draft: they are taken from the trace of the training prompts where it stands beside the file; else a recording of
    the test prompts begins with the training prompts' texts.

    Args:
        name: a workload with a draft, or several.
        split: of the prompts.
        path: the file to write, ending in ``.npz``. Finished prompts are kept beside it, in ``<path>.parts``, until the
            trace is complete; called again, a recording goes on from there.
        settings: amount to record; what is about detours does not matter.
        progress: show a progress bar.

    Raises:
        TraceError, PromptError, ValueError: as for `record`.
    """
    settings = replace(settings or RecordSettings(), detour_prompts=0)
    named, path = workload(name).with_split(split), Path(path)
    recording = Recording.begin(named, path, settings)
    drafts = drafts_of(named.load().draft)
    texts_of = OwnTexts(named, settings)

    def own_texts(of: Split) -> list[list[Rows]]:
        """Rows of every prompt, for each draft."""
        chosen = named.prompt_ids(of)[: settings.prompts]
        shown = tqdm(chosen, f"{named} {of}", unit="prompt", disable=not progress)
        parts = [
            recording.part(f"{of}-{number:04}", partial(_packed, texts_of, prompt, settings.seed + number))
            for number, prompt in enumerate(shown)
        ]
        return [[_unpacked(part, place) for part in parts] for place in range(len(drafts))]

    texts = own_texts(split)
    beside = trained_beside(path, recording.info, MixedTrace.load)
    trained = None if beside else texts if split == "train" else own_texts("train")
    traces = []
    for place, draft in enumerate(drafts):
        parts = [_with_jumps(rows, named.sampling.greedy) for rows in texts[place]]
        info = replace(recording.info, draft=draft.name, draft_sha256=draft_digest(draft))
        chances = beside.traces[place].chances if beside else chances_of((trained or texts)[place], named.sampling)
        traces.append(joined(info, recording.prompts, parts, chances))
    names, free = tuple(draft.name for draft in drafts), tuple(map(is_free, drafts))
    MixedTrace(recording.info, names, free, tuple(traces)).save(path)
    recording.finish()
    return MixedTrace.load(path)


def _packed(texts: OwnTexts, prompt: Sequence[int], seed: int) -> Rows:
    """Record a prompt's text; the rows of all drafts under names of their own."""
    drafts = texts.of_each(prompt, seed)
    shared = {name: drafts[0][name] for name in _OF_TEXT}
    return shared | {
        f"{place}_{name}": values
        for place, rows in enumerate(drafts)
        for name, values in rows.items()
        if name not in _OF_TEXT
    }


def _unpacked(part: Rows, place: int) -> Rows:
    prefix = f"{place}_"
    rows = {name.removeprefix(prefix): values for name, values in part.items() if name.startswith(prefix)}
    return {**rows, **{name: part[name] for name in _OF_TEXT}}


def _with_jumps(rows: Rows, greedy: bool) -> Rows:
    """Add what the rows of a text without detours have of them."""
    text = rows["text"].tolist()
    known = {tuple(text[:place]): place for place in range(len(text))} if greedy else {}
    nothing = {"detour_rows": np.empty((0, 0), np.int64), "detour_knobs": np.empty((0, 2))}
    return {**rows, **hung_together(rows, [], known), **nothing}
