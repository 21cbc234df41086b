"""``python -m specgym.envs.record``: record workloads, so that decoding can be replayed without the models.

A *trace* has what the draft would do at every position of texts, and replays decoders that draft chains of tokens. With
``--decoder NAME`` the *outcomes* of that decoder are recorded, over many settings of its knobs.

A recording that is interrupted goes on from the last complete text when the same command is given again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import (
    AutoregressiveDecoder,
    SpecgymError,
    SpeculativeDecoder,
    Split,
    ThresholdDecoder,
    require_draft,
)

from .recordings.archive import TraceError
from .recordings.draft_recorder import PER_TOKEN, Recorder, Rows
from .recordings.outcome_recorder import OutcomeSettings, record_outcomes
from .recordings.outcomes import outcomes_name
from .recordings.record_command import RecordCommand
from .recordings.resumable_parts import claim_parts, parts_of, provenance_of, write_part
from .recordings.trace import Trace, TraceInfo, trace_name
from .workloads import Workload, workload

_ALL_ROWS = ("tokens", "successor", "drafted", "match", "distance")
"""What is recorded at the rows of detours, too; the first two only to see how the texts hang together."""

DETOUR_FALLBACKS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
DETOUR_ROLLBACKS = (1, 4, 16)
"""Detours are the texts that threshold decoding with these thresholds leads to; rollbacks beyond K count as K."""


@dataclass(frozen=True)
class RecordSettings:
    """How much of a workload is recorded."""

    draft_length: int = 16
    """Tokens drafted at every position (K)."""
    prompts: int = 24
    """Prompts of the split, at most; the first ones."""
    tokens: int = 64
    """Of the target's own text after each prompt, at most."""
    detour_prompts: int = 12
    """Prompts for which the texts that threshold decoding leads to are recorded too, at most; 0 for none."""
    detour_tokens: int = 32
    """Of each of those texts, at most."""
    seed: int = 0
    """Of all sampling."""

    def __post_init__(self) -> None:
        for name in ("draft_length", "prompts", "tokens", "detour_tokens"):
            if getattr(self, name) < 1:
                raise TraceError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.detour_prompts < 0 or self.seed < 0:
            raise TraceError("detour_prompts and seed must be at least 0")
        if self.draft_length > 255:
            raise TraceError(f"draft_length must be at most 255, got {self.draft_length}")


def record(
    name: str | Workload,
    split: Split,
    path: str | Path,
    settings: RecordSettings | None = None,
    progress: bool = False,
) -> Trace:
    """Record a workload, and write the trace.

    Args:
        name: a workload with a draft.
        split: whose prompts to take.
        path: the file to write, ending in ``.npz``. Finished prompts are kept beside it, in ``<path>.parts``, until the
            trace is complete; called again, a recording goes on from there.
        settings: how much to record.
        progress: show a progress bar.

    Raises:
        TraceError: the parts found are those of another recording.
        PromptError: a prompt with its text does not fit into a model's context.
        ValueError: the pair has no draft. Loading errors as for `load_pair` and `load_prompts`.
    """
    settings = settings or RecordSettings()
    found, path = workload(name).with_split(split), Path(path)
    pair = found.load()
    require_draft(pair, "a trace")
    prompts = found.prompt_ids()[: settings.prompts]
    info = _info(found, split, settings, prompts)
    parts = parts_of(path)
    claim_parts(parts, {**asdict(info), **asdict(settings)})
    recorder = _Texts(found, settings)
    for number, prompt in enumerate(tqdm(prompts, f"{found} {split}", unit="prompt", disable=not progress)):
        part = parts / f"{number:04}.npz"
        if not part.is_file():
            write_part(part, recorder.record(prompt, settings.seed + number, number < settings.detour_prompts))
    trace = _joined(info, prompts, [dict(np.load(parts / f"{n:04}.npz")) for n in range(len(prompts))])
    trace.save(path)
    shutil.rmtree(parts)
    return Trace.load(path)


class _Texts:
    """Generates the texts of a prompt, and records them."""

    def __init__(self, found: Workload, settings: RecordSettings) -> None:
        pair = found.load()
        self._settings = settings
        self._sampling = found.sampling
        self._recorder = Recorder(pair, found.sampling, settings.draft_length)
        # Lossless, and faster than plain decoding; a one-hot draft of a sampled text is better left out of it.
        plain = AutoregressiveDecoder(pair)
        self._own = SpeculativeDecoder(pair, settings.draft_length) if found.sampling.greedy else plain
        self._detours = ThresholdDecoder(pair, settings.draft_length)
        self._eos = pair.eos_token_ids

    def record(self, prompt: Sequence[int], seed: int, detours: bool) -> Rows:
        """One prompt's part of a trace; its detours' rows are counted from the first of its own."""
        text = self._own.generate(
            prompt, max_new_tokens=self._settings.tokens, sampling=self._sampling, seed=seed
        ).tokens
        rows = self._recorder.record(prompt, text, seed)
        part: Rows = {"text": np.array(text), "ended": np.array(text[-1] in self._eos), **rows}
        strayed, taken, knobs = [], [], []
        known = {tuple(text[:place]): place for place in range(len(text))}
        columns = {name: list(rows[name]) for name in _ALL_ROWS}
        for fallback, rollback in self._settings_of_detours() if detours else ():
            other = self._detour(prompt, known, columns, fallback, rollback, seed)
            prefixes = [tuple(other[:place]) for place in range(len(other))]
            new = [place for place, prefix in enumerate(prefixes) if prefix not in known]
            if new:  # once a text has left the others, it is on its own
                read = self._recorder.record(prompt, other, seed)
                strayed.append({name: read[name][new] for name in _ALL_ROWS})
                known |= {prefixes[place]: len(known) + number for number, place in enumerate(new)}
                for name in _ALL_ROWS:
                    columns[name].extend(strayed[-1][name])
            row = np.full(self._settings.detour_tokens, -1)
            row[: len(other)] = [known[prefix] for prefix in prefixes]
            taken.append(row)
            knobs.append((fallback, rollback))
        for name in _ALL_ROWS:
            part[f"detour_{name}"] = np.concatenate([rows[name][:0], *(stray[name] for stray in strayed)])
        part["jump"] = self._jumps(known, part)
        part["detour_rows"] = np.array(taken, np.int64).reshape(-1, self._settings.detour_tokens)
        part["detour_knobs"] = np.array(knobs, np.float64).reshape(-1, 2)
        return part

    def _detour(
        self,
        prompt: Sequence[int],
        known: Mapping[tuple[int, ...], int],
        columns: Mapping[str, Sequence[NDArray[Any]]],
        fallback: float,
        rollback: float,
        seed: int,
    ) -> list[int]:
        """The text that two thresholds lead to: read off the rows there are, then decoded."""
        text: list[int] = []
        budget = self._settings.detour_tokens
        while self._sampling.greedy and len(text) < budget and tuple(text) in known:
            tokens, successor, drafted, match, distance = (columns[name][known[tuple(text)]] for name in _ALL_ROWS)
            count = min(int(drafted), budget - len(text) - 1)
            passes = match[:count] | (distance[:count] <= fallback)
            agreed = int(passes.cumprod().sum())
            kept = agreed if agreed == count else max(agreed + 1 - int(rollback), 0)
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
                knobs={"fallback": fallback, "rollback": rollback},
            )
            text += rest.tokens
        return text

    def _jumps(self, known: Mapping[tuple[int, ...], int], part: Rows) -> NDArray[np.int64]:
        """For every row of a prompt, the row after k kept tokens and the target's own."""
        tokens, successor, drafted = (
            np.concatenate([part[name], part[f"detour_{name}"]]) for name in ("tokens", "successor", "drafted")
        )
        jumps = np.full(successor.shape, -1)
        if self._sampling.greedy:  # what is drawn at random leads anywhere
            for prefix, row in known.items():
                for kept in range(int(drafted[row]) + 1):
                    after = (*prefix, *tokens[row, :kept].tolist(), int(successor[row, kept]))
                    jumps[row, kept] = known.get(after, -1)
        return jumps

    def _settings_of_detours(self) -> list[tuple[float, float]]:
        longest = self._settings.draft_length
        return [
            (fallback, float(rollback))
            for fallback in DETOUR_FALLBACKS
            for rollback in sorted({min(rollback, longest) for rollback in DETOUR_ROLLBACKS})
        ]


def _info(found: Workload, split: Split, settings: RecordSettings, prompts: Sequence[Sequence[int]]) -> TraceInfo:
    return TraceInfo(
        **provenance_of(found, split, prompts, drafted=True),
        vocabulary_size=found.load().target.vocabulary_size,
        draft_length=settings.draft_length,
        tokens=settings.tokens,
        detour_tokens=settings.detour_tokens if settings.detour_prompts else 0,
        seed=settings.seed,
    )


def _joined(info: TraceInfo, prompts: Sequence[Sequence[int]], parts: Sequence[Rows]) -> Trace:
    own = [len(part["text"]) for part in parts]
    starts = np.concatenate([[0], np.cumsum(own)])
    strayed = starts[-1] + np.concatenate([[0], np.cumsum([len(part["detour_drafted"]) for part in parts])])

    def counted_from_all(number: int, local: NDArray[Any]) -> NDArray[Any]:
        """Rows of one prompt's part as rows of the trace."""
        moved = np.where(local < own[number], local + starts[number], local - own[number] + strayed[number])
        return np.where(local < 0, -1, moved)

    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*PER_TOKEN, "drafted", "text")}
    for name in ("drafted", "match", "distance"):
        columns[name] = np.concatenate([columns[name], *(part[f"detour_{name}"] for part in parts)])
    jumps = [counted_from_all(number, part["jump"]) for number, part in enumerate(parts)]
    own_jumps = [jump[: own[number]] for number, jump in enumerate(jumps)]
    rows = [counted_from_all(number, part["detour_rows"]) for number, part in enumerate(parts)]
    detours = [len(part["detour_rows"]) for part in parts]
    width = info.detour_tokens
    return Trace(
        info=info,
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        starts=starts,
        ended=np.array([bool(part["ended"]) for part in parts]),
        jump=np.concatenate([*own_jumps, *(jump[own[number] :] for number, jump in enumerate(jumps))]),
        detour_prompts=np.repeat(np.arange(len(parts)), detours),
        detour_knobs=np.concatenate([part["detour_knobs"] for part in parts]),
        detour_rows=np.concatenate(rows)[:, :width] if width else np.empty((0, 0), np.int64),
        **columns,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, given as on the command line. A file that is there already is left alone."""
    command = tyro.cli(RecordCommand, prog="python -m specgym.envs.record", description=__doc__, args=arguments)
    if command.threads:
        torch.set_num_threads(command.threads)
    traces = outcomes = None
    if command.decoder is None:
        traces = RecordSettings(**command.given())
    else:
        outcomes = OutcomeSettings(command.decoder, **command.given())
    for name in command.workloads:
        for split in command.splits:
            file = trace_name(name, split) if outcomes is None else outcomes_name(name, outcomes.decoder, split)
            path = command.folder / file
            if path.is_file():
                print(f"{path} is there already")
            elif outcomes is None:
                trace = record(name, split, path, traces, progress=True)
                rate = trace.match[: len(trace.text)].mean()
                print(f"{path}: {len(trace.text)} positions of {trace.prompts} prompts, {rate:.0%} of the drafts match")
            else:
                found = record_outcomes(workload(name), split, path, outcomes, progress=True)
                length = found.emitted.mean()
                print(f"{path}: {len(found.settings)} settings of {found.prompts} prompts, {length:.2f} tokens a round")


if __name__ == "__main__":
    try:
        main()
    except SpecgymError as error:
        sys.exit(f"error: {error}")
