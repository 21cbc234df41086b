"""Recorder of traces: the target's own texts, those that thresholds lead to, and what the draft does along both."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from specgym.decoding import (
    AutoregressiveDecoder,
    ExpectedGain,
    KeepChances,
    LatencyProfile,
    Pair,
    Sampling,
    SpeculativeDecoder,
    Split,
    ThresholdDecoder,
    check_fields,
    levels_of,
    require_draft,
    seed_number,
    text_settings,
    whole_number,
)

from ..backends.replay_table import exact_chances, tokens_kept, tolerances_needed
from ..profiles import profile_of
from ..workloads import Workload, workload
from .archive import LONGEST_DRAFT, TraceError, claim_parts, parts_of, provenance_of, read_part, write_part
from .draft_recorder import PER_TOKEN, Recorder, Rows
from .find import find_trace
from .trace import Trace, TraceInfo

_ALL_ROWS = ("tokens", "successor", "drafted", "bins", "match", "distance")
"""Columns that are recorded at the rows of detours, too; the first two only to see how the texts hang together."""

TOLERANCES = (0.25, 0.4, 0.6, 1.0)
TAKEN_BACK = (1,)
"""Thresholds whose decoding leads to detours: tolerances, and tokens taken back, of which K are the most."""

_PROMPTS, _TOKENS = 8, 32
"""Training prompts, and tokens of each, that chances are measured on where nothing was recorded."""
_measured: dict[tuple[int, str, Sampling], tuple[Pair, KeepChances]] = {}
"""Chances by the pair's identity, which is the pair's as long as it is held here."""


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
    pair = named.load()
    require_draft(pair, "a trace")
    if by_place := text_settings(pair.target.model, place=True):
        raise TraceError(
            f"{pair.target.name}'s generation_config asks for {', '.join(sorted(by_place))}. A trace is read from the "
            "middle of its texts on, where these cannot be known: set them to None in the model's generation_config"
        )
    prompts = named.prompt_ids()[: settings.prompts]
    info = _info(named, split, settings, prompts)
    parts = parts_of(path)
    claim_parts(parts, {**asdict(info), **asdict(settings), "columns": list(PER_TOKEN)})
    recorder = _Texts(named, settings)

    def part(which: str, number: int, make: Callable[[], Rows]) -> Rows:
        file = parts / f"{which}{number:04}.npz"
        if not file.is_file():
            write_part(file, make())
        return read_part(file)

    def own_texts(of: Split) -> list[Rows]:
        chosen = named.prompt_ids(of)[: settings.prompts]
        shown = tqdm(chosen, f"{named} {of}, own texts", unit="prompt", disable=not progress)
        return [
            part(f"{of}-", number, functools.partial(recorder.own_text, prompt, settings.seed + number))
            for number, prompt in enumerate(shown)
        ]

    texts = own_texts(split)
    chances = _known_chances(path, info) if split != "train" else None
    if chances is None:
        chances = chances_of(texts if split == "train" else own_texts("train"), named.sampling)
    if settings.detour_prompts:
        recorder.draft_by(replace(profile_of(named, profile, replayed=True).at(), chances=chances))
    shown = tqdm(prompts, f"{named} {split}, detours", unit="prompt", disable=not progress)
    detours = [
        part("detours-", number, functools.partial(
            recorder.detours, prompt, texts[number], settings.seed + number, number < settings.detour_prompts
        ))
        for number, prompt in enumerate(shown)
    ]  # fmt: skip
    both = [{**text, **strayed} for text, strayed in zip(texts, detours, strict=True)]
    trace = _joined(info, prompts, both, chances)
    trace.save(path)
    shutil.rmtree(parts)
    return Trace.load(path)


def chances_of(rows: Sequence[Rows], sampling: Sampling) -> KeepChances:
    """Measure how often drafted tokens are kept on the target's own texts.

    Args:
        rows: of each text, as `Recorder.record` returns them; one text or more.
        sampling: by which tokens were chosen.
    """
    names = ("bins", "match", "p", "q", "distance", "drafted")
    bins, match, p, q, distance, drafted = (np.concatenate([text[name] for text in rows]) for name in names)
    return KeepChances.fit(bins, exact_chances(match, p, q, sampling), distance, drafted)


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


def _known_chances(path: Path, info: TraceInfo) -> KeepChances | None:
    """The chances of the trace of the training prompts, if it stands beside the file and is of the same models."""
    beside = path.with_name(path.name.replace(f".{info.split}.", ".train."))
    if beside == path or not beside.is_file():
        return None
    trace = Trace.load(beside)
    same = ("target_sha256", "draft_sha256", "temperature", "top_k", "top_p")
    if any(getattr(trace.info, name) != getattr(info, name) for name in same):
        raise TraceError(
            f"{beside} is of other models or another sampling than {path}; record both in one folder, or move it"
        )
    return trace.chances


class _Texts:
    """Generates the texts of a prompt, and records them."""

    def __init__(self, named: Workload, settings: RecordSettings) -> None:
        pair = named.load()
        self._settings = settings
        self._sampling = named.sampling
        self._recorder = Recorder(pair, named.sampling, settings.draft_length)
        # Lossless, and faster than plain decoding; a one-hot draft of a sampled text is better left out of it.
        plain = AutoregressiveDecoder(pair)
        self._target = SpeculativeDecoder(pair, settings.draft_length) if named.sampling.greedy else plain
        self._detours = ThresholdDecoder(pair, settings.draft_length)
        self._eos = pair.eos_token_ids

    def draft_by(self, profile: LatencyProfile) -> None:
        """Let the drafts of detours end by the expected gain."""
        self._detours.charge_by(profile)
        self._gain = ExpectedGain.of(profile, self._settings.draft_length)

    def own_text(self, prompt: Sequence[int], seed: int, tokens: int | None = None) -> Rows:
        """Record the target's own text of a prompt, with so many tokens at most."""
        tokens = self._settings.tokens if tokens is None else tokens
        text = self._target.generate(prompt, max_new_tokens=tokens, sampling=self._sampling, seed=seed).tokens
        rows = self._recorder.record(prompt, text, seed)
        return {"text": np.array(text), "ended": np.array(text[-1] in self._eos), **rows}

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
        columns = {name: list(target_text[name]) for name in _ALL_ROWS}
        for thresholds in self._thresholds() if follow else ():
            other = self._detour(prompt, known, columns, thresholds, seed)
            prefixes = [tuple(other[:place]) for place in range(len(other))]
            first = next((place for place, prefix in enumerate(prefixes) if prefix not in known), None)
            if first is not None:  # once a text has left the others, it is on its own
                read = self._recorder.record([*prompt, *other[:first]], other[first:], seed)
                strayed.append({name: read[name] for name in _ALL_ROWS})
                known |= {prefix: len(known) + number for number, prefix in enumerate(prefixes[first:])}
                for name in _ALL_ROWS:
                    columns[name].extend(strayed[-1][name])
            row = np.full(self._settings.detour_tokens, -1)
            row[: len(other)] = [known[prefix] for prefix in prefixes]
            taken.append(row)
            knobs.append(thresholds)
        part: Rows = {
            f"detour_{name}": np.concatenate([target_text[name][:0], *(stray[name] for stray in strayed)])
            for name in _ALL_ROWS
        }
        part["jump"] = self._jumps(known, {**target_text, **part})
        part["detour_rows"] = np.array(taken, np.int64).reshape(-1, self._settings.detour_tokens)
        part["detour_knobs"] = np.array(knobs, np.float64).reshape(-1, 2)
        return part

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
            tokens, successor, drafted, bins, match, distance = (
                columns[name][known[tuple(text)]] for name in _ALL_ROWS
            )
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

    def _jumps(self, known: Mapping[tuple[int, ...], int], part: Rows) -> NDArray[np.int64]:
        """Return, for every row of a prompt, the row after k kept tokens and the target's own."""
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

    def _thresholds(self) -> list[tuple[float, float]]:
        numbers = sorted({min(number, self._settings.draft_length) for number in TAKEN_BACK})
        return [(tolerance, float(number)) for tolerance in TOLERANCES for number in numbers]


def _info(named: Workload, split: Split, settings: RecordSettings, prompts: Sequence[Sequence[int]]) -> TraceInfo:
    return TraceInfo(
        **provenance_of(named, split, prompts, drafted=True),
        vocabulary_size=named.load().target.vocabulary_size,
        draft_length=settings.draft_length,
        tokens=settings.tokens,
        detour_tokens=settings.detour_tokens if settings.detour_prompts else 0,
        seed=settings.seed,
    )


def _joined(info: TraceInfo, prompts: Sequence[Sequence[int]], parts: Sequence[Rows], chances: KeepChances) -> Trace:
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
