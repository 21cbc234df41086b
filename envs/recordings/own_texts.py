"""Recorder of the target's own texts, which traces of one draft and of several are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import (
    AutoregressiveDecoder,
    KeepChances,
    Sampling,
    SpeculativeDecoder,
    check_fields,
    require_draft,
    seed_number,
    text_settings,
    whole_number,
)

from ..backends.replay_table import exact_chances
from ..workloads import Workload
from .archive import LONGEST_DRAFT, TraceError, claim_parts, parts_of, provenance_of, read_part, write_part
from .draft_recorder import PER_TOKEN, Recorder, Rows
from .mixed_trace import MixedTrace
from .trace import Trace, TraceInfo

ALL_ROWS = ("tokens", "successor", "drafted", "bins", "match", "distance")
"""Columns that are recorded at the rows of detours, too; the first two only to see how the texts hang together."""

Content = TypeVar("Content", Trace, MixedTrace)


@dataclass(frozen=True)
class RecordSettings:
    """Amount of a workload that is recorded."""

    draft_length: int = 16
    """Tokens drafted at every position (K)."""
    prompts: int = 24
    """Prompts of the split, at most; the first ones."""
    tokens: int = 64
    """Tokens of the target's own text after each prompt, at most."""
    detour_prompts: int = 12
    """Prompts for which the texts that threshold decoding leads to are recorded too, at most; 0 for none."""
    detour_tokens: int = 32
    """Tokens of each of those texts, at most."""
    seed: int = 0
    """Seed of all sampling."""

    def __post_init__(self) -> None:
        whole = partial(whole_number, error=TraceError)
        check_fields(self, partial(whole, at_most=LONGEST_DRAFT), "draft_length")
        check_fields(self, whole, "prompts", "tokens", "detour_tokens")
        check_fields(self, partial(whole, at_least=0), "detour_prompts")
        check_fields(self, partial(seed_number, error=TraceError), "seed")


@dataclass(frozen=True)
class Recording:
    """A recording under way, and its folder of finished parts.

    Attributes:
        info: facts of it.
        prompts: tokens of its prompts.
        parts: the folder.
    """

    info: TraceInfo
    prompts: tuple[tuple[int, ...], ...]
    parts: Path

    @classmethod
    def begin(cls, named: Workload, path: Path, settings: RecordSettings) -> Recording:
        """Begin a recording of a workload's split, or go on with one. Errors as for `record`."""
        pair = named.load()
        require_draft(pair, "a trace")
        if by_place := text_settings(pair.target.model, place=True):
            raise TraceError(
                f"{pair.target.name}'s generation_config asks for {', '.join(sorted(by_place))}. A trace is read from "
                "the middle of its texts on, where these cannot be known: set them to None in the model's "
                "generation_config"
            )
        prompts = named.prompt_ids()[: settings.prompts]
        info = TraceInfo(
            **provenance_of(named, named.split, prompts, drafted=True),
            vocabulary_size=pair.target.vocabulary_size,
            draft_length=settings.draft_length,
            tokens=settings.tokens,
            detour_tokens=settings.detour_tokens if settings.detour_prompts else 0,
            seed=settings.seed,
        )
        parts = parts_of(path)
        claim_parts(parts, {**asdict(info), **asdict(settings), "columns": list(PER_TOKEN)})
        return cls(info, prompts, parts)

    def part(self, name: str, make: Callable[[], Rows]) -> Rows:
        """Return a part by its name, made now if it is not finished yet."""
        file = self.parts / f"{name}.npz"
        if not file.is_file():
            write_part(file, make())
        return read_part(file)

    def finish(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.parts)


class OwnTexts:
    """Generates the target's own texts, and records what its drafts do along them."""

    def __init__(self, named: Workload, settings: RecordSettings) -> None:
        pair = named.load()
        self._settings = settings
        self._sampling = named.sampling
        self._recorder = Recorder(pair, named.sampling, settings.draft_length)
        # Lossless, and faster than plain decoding; a one-hot draft of a sampled text is better left out of it.
        plain = AutoregressiveDecoder(pair)
        self._target = SpeculativeDecoder(pair, settings.draft_length) if named.sampling.greedy else plain
        self._eos = pair.eos_token_ids

    def of_each(self, prompt: Sequence[int], seed: int, tokens: int | None = None) -> list[Rows]:
        """Record the target's own text of a prompt, with so many tokens at most; the rows of each draft."""
        tokens = self._settings.tokens if tokens is None else tokens
        text = self._target.generate(prompt, max_new_tokens=tokens, sampling=self._sampling, seed=seed).tokens
        ended = np.array(text[-1] in self._eos)
        return [
            {"text": np.array(text), "ended": ended, **rows} for rows in self._recorder.record_each(prompt, text, seed)
        ]


def trained_beside(path: Path, info: TraceInfo, load: Callable[[Path], Content]) -> Content | None:
    """Read the trace of the training prompts, if it stands beside that of the test prompts.

    Args:
        path: of the trace to be recorded.
        info: facts of it.
        load: reads a trace with an `info`.

    Raises:
        TraceError: it is of other models or another sampling, or damaged.
    """
    beside = path.with_name(path.name.replace(f".{info.split}.", ".train."))
    if info.split == "train" or beside == path or not beside.is_file():
        return None
    trace = load(beside)
    same = ("target_sha256", "draft_sha256", "temperature", "top_k", "top_p")
    if any(getattr(trace.info, name) != getattr(info, name) for name in same):
        raise TraceError(
            f"{beside} is of other models or another sampling than {path}; record both in one folder, or move it"
        )
    return trace


def chances_of(rows: Sequence[Rows], sampling: Sampling) -> KeepChances:
    """Measure how often drafted tokens are kept on the target's own texts.

    Args:
        rows: of each text, as `Recorder.record` returns them; one text or more.
        sampling: by which tokens were chosen.
    """
    names = ("bins", "match", "p", "q", "distance", "drafted")
    bins, match, p, q, distance, drafted = (np.concatenate([text[name] for text in rows]) for name in names)
    return KeepChances.fit(bins, exact_chances(match, p, q, sampling), distance, drafted)


def hung_together(target_text: Rows, strayed: Sequence[Rows], known: Mapping[tuple[int, ...], int]) -> Rows:
    """Return the rows of a prompt's detours, and `jump` for all its rows: the row after k kept tokens and the target's.

    Args:
        target_text: rows of the target's own text.
        strayed: rows that texts which left it have of their own.
        known: rows by the tokens before them; none of a sampled text, as what is drawn at random leads anywhere.
    """
    part: Rows = {
        f"detour_{name}": np.concatenate([target_text[name][:0], *(stray[name] for stray in strayed)])
        for name in ALL_ROWS
    }
    tokens, successor, drafted = (
        np.concatenate([target_text[name], part[f"detour_{name}"]]) for name in ("tokens", "successor", "drafted")
    )
    jumps = np.full(successor.shape, -1)
    for prefix, row in known.items():
        for kept in range(int(drafted[row]) + 1):
            after = (*prefix, *tokens[row, :kept].tolist(), int(successor[row, kept]))
            jumps[row, kept] = known.get(after, -1)
    return {**part, "jump": jumps}


def joined(info: TraceInfo, prompts: Sequence[Sequence[int]], parts: Sequence[Rows], chances: KeepChances) -> Trace:
    """Return the trace of prompts that were recorded one after another."""
    lengths = [len(part["text"]) for part in parts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    strayed = starts[-1] + np.concatenate([[0], np.cumsum([len(part["detour_drafted"]) for part in parts])])

    def counted_from_all(number: int, local: NDArray[Any]) -> NDArray[Any]:
        """Rows of one prompt's part as rows of the trace."""
        moved = np.where(local < lengths[number], local + starts[number], local - lengths[number] + strayed[number])
        return np.where(local < 0, -1, moved)

    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*PER_TOKEN, "drafted", "text")}
    for name in ("drafted", "bins", "match", "distance"):
        columns[name] = np.concatenate([columns[name], *(part[f"detour_{name}"] for part in parts)])
    jumps = [counted_from_all(number, part["jump"]) for number, part in enumerate(parts)]
    own_jumps = [jump[: lengths[number]] for number, jump in enumerate(jumps)]
    rows = [counted_from_all(number, part["detour_rows"]) for number, part in enumerate(parts)]
    detours = [len(part["detour_rows"]) for part in parts]
    width = info.detour_tokens
    return Trace(
        info=info,
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        starts=starts,
        ended=np.array([bool(part["ended"]) for part in parts]),
        jump=np.concatenate([*own_jumps, *(jump[lengths[number] :] for number, jump in enumerate(jumps))]),
        chances=chances,
        detour_prompts=np.repeat(np.arange(len(parts)), detours),
        detour_knobs=np.concatenate([part["detour_knobs"] for part in parts]),
        detour_rows=np.concatenate(rows)[:, :width] if width else np.empty((0, 0), np.int64),
        **columns,
    )
