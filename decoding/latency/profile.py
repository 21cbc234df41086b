"""Latency profiles: seconds of drafting and verifying by number of tokens, for one pair on one machine. Free of torch.

A clock read while an agent learns is noisy and never the same twice. A profile is measured once (`latency_measure`) or
computed for hardware that is not at hand (`roofline`), and then charges every round the same time for the same work.
Reading the prompt is outside all rounds, and is not charged.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..decoders.expected_gain import KeepChances
from ..errors import ArgumentError, SpecgymError, check_fields, mapping_of, number, whole_number
from ..sampling import Sampling
from ..sealed_files import DamagedFileError, read_sealed, write_sealed
from ..traits import CHAIN
from .probe import Uncertainty

if TYPE_CHECKING:
    from ..rounds import Round

_FORMAT = "specgym-latency-4"
_UNSEALED = "specgym-latency-3"  # has no checksum
_TABLES = ("draft_seconds", "target_seconds")
_ABOUT = {"pair": "pair", "hardware": "hardware", "sampling": "sampling", "rounds": "kind", "overlaps": "overlaps"}
"""Attributes that all points share, by their names in files."""
_TYPES = {"pair": str, "hardware": dict, "sampling": str, "overlaps": bool}
_LONGEST_FITTED = 16


class LatencyProfileError(SpecgymError, ValueError):
    """A profile that makes no sense, a file that holds none, or an operating point that was not measured."""


_count = partial(whole_number, error=LatencyProfileError)
_seconds = partial(number, error=LatencyProfileError)


@dataclass(frozen=True)
class LatencyProfile:
    """Seconds per draft and per target pass, by number of tokens.

    The tables are those of one operating point: so many sequences decoded together, so many tokens read before. A
    batch is decoded in lockstep: all its sequences draft the same number of tokens and are verified in one pass, the
    seconds are those of the whole batch, and a speedup compares with plain decoding of as large a batch. `points` adds
    other batch sizes and contexts, and `at` reads them.

    Attributes:
        pair: name of the pair.
        draft_seconds: seconds to draft, by steps (0 or more): tokens of a chain, levels of a tree, heads that are
            asked; {0: 0.0} where drafting is part of the pass.
        target_seconds: seconds of a target pass over so many tokens (1 or more) and its verification, by number.
        autoregressive_seconds: seconds per token of plain decoding with the target.
        hardware: what it was measured on: device, its name, threads, dtype, torch version, prepacked layers; and what
            else of the decoder its time depends on.
        sampling: which arithmetic was measured: `greedy` or `sampled`, with `top-k` and `top-p` where used.
        kind: cost kind, a decoder's `DecoderTraits.cost_kind`: `chain`, or a kind of its own. Charging one kind by the
            times of another is wrong; see `require_kind`.
        batch_size: sequences decoded together, 1 or more.
        context: tokens of each sequence that were read before the first round, 1 or more; None where it is not known.
        points: profiles of other batch sizes and contexts, without points of their own; with this profile they form a
            full grid, every batch size with every context.
        chances: how often drafted tokens of the pair are kept, for rules that ask; None where it was not measured. It
            does not depend on the machine.
        overlaps: whether drafting goes on while the target verifies: a round then takes the longer of the two times
            instead of their sum.
        uncertainty: how sure the numbers are; None where they were computed, interpolated, or measured by an earlier
            version.

    Raises:
        LatencyProfileError: an empty table, seconds that are negative, infinite or NaN (0 is for drafting alone), an
            unknown kind of rounds, or points that are no full grid.
    """

    pair: str
    draft_seconds: Mapping[int, float]
    target_seconds: Mapping[int, float]
    autoregressive_seconds: float
    hardware: Mapping[str, Any]
    sampling: str = "greedy"
    kind: str = CHAIN
    batch_size: int = 1
    context: int | None = None
    points: tuple[LatencyProfile, ...] = ()
    overlaps: bool = False
    uncertainty: Uncertainty | None = None
    chances: KeepChances | None = None

    def __post_init__(self) -> None:
        for name, fewest in zip(_TABLES, (0, 1), strict=True):
            object.__setattr__(self, name, checked_seconds(name, getattr(self, name), fewest))
        check_fields(self, partial(_seconds, above=0), "autoregressive_seconds")
        if not (isinstance(self.kind, str) and self.kind):
            raise LatencyProfileError(f"kind must be the name of a cost kind, got {self.kind!r}")
        check_fields(self, _count, "batch_size", *(["context"] if self.context is not None else []))
        object.__setattr__(self, "hardware", dict(self.hardware))
        object.__setattr__(self, "points", tuple(self.points))
        if self.points:
            self._check_grid()

    @property
    def doubts(self) -> tuple[str, ...]:
        """Clauses on what contradicted itself when it was measured; none for a profile to be trusted."""
        known = (point.uncertainty for point in (self, *self.points))
        return tuple(dict.fromkeys(doubt for uncertainty in known if uncertainty for doubt in uncertainty.doubts))

    def draft(self, tokens: int) -> float:
        """Seconds of this many drafting steps, 0 or more: linear between measured numbers, and beyond the last two."""
        return interpolated(self.draft_seconds, tokens, 0)

    def target(self, tokens: int) -> float:
        """Seconds of a target pass over so many tokens, 1 or more, verification included; linear as in `draft`."""
        return interpolated(self.target_seconds, tokens, 1)

    def round(self, drafted: int) -> float:
        """Seconds of a round that drafts so many tokens, 0 or more; of a tree's with as many levels as it can have."""
        steps = drafted if self.kind == CHAIN else min(drafted, max(self.draft_seconds))
        return self.round_of(steps, drafted + 1)

    def round_of(self, draft_steps: int, target_tokens: int, awaited_steps: int = 0) -> float:
        """Seconds of a round by its drafting steps, `awaited_steps` of them before the pass, and the pass's tokens.

        Where drafting goes on meanwhile (`overlaps`), nobody is at work beside a pass over 1 token without a draft.
        """
        if not self.overlaps:
            return self.draft(draft_steps) + self.target(target_tokens)
        if (draft_steps, target_tokens) == (0, 1):
            return self.autoregressive_seconds
        awaited = self.draft(awaited_steps) if awaited_steps else 0.0
        return awaited + max(self.draft(draft_steps - awaited_steps), self.target(target_tokens))

    def rounds_of(self, draft_steps: NDArray[np.integer], target_tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Seconds of many rounds of which nothing is awaited, as `round_of`; arrays of one shape, not empty."""
        width = int(target_tokens.max()) + 1
        kinds, which = np.unique(draft_steps.astype(np.int64) * width + target_tokens, return_inverse=True)
        seconds = np.array([self.round_of(*divmod(kind, width)) for kind in kinds.tolist()])
        return seconds[which.reshape(draft_steps.shape)]

    def round_seconds(self, longest: int) -> NDArray[np.float64]:
        """Seconds of a round by number of drafted tokens, from 0 to `longest`; shape (longest + 1,)."""
        return np.array([self.round(drafted) for drafted in range(longest + 1)], dtype=np.float64)

    def marginal_cost(self) -> float:
        """Cost of another drafted token in a round, over the time per token of plain decoding; at least 0.

        It holds the token's drafting and its share of the target pass: the slope of `round` fitted by least squares
        from 1 drafted token to 16, or to as many as were measured. Drafting that is no chain costs nearly the same
        however many candidates it gives, and is left out. Where it goes on meanwhile, it alone counts, hidden or not.
        """
        longest = min(_LONGEST_FITTED, max(max(self.target_seconds) - 1, 2))
        centred = np.arange(1, longest + 1) - (longest + 1) / 2
        whole = self.draft if self.overlaps else self.round if self.kind == CHAIN else lambda n: self.target(n + 1)
        seconds = np.array([whole(drafted) for drafted in range(1, longest + 1)])
        slope = centred @ seconds / (centred @ centred)
        return max(0.0, float(slope)) / self.autoregressive_seconds

    def charge(self, rounds: Iterable[Round]) -> float:
        """Seconds of some rounds together, each by what it drafted and what the target read; none for empty ones."""
        return sum(self.round_of(it.draft_steps, it.target_tokens, it.awaited_steps) for it in rounds if it.tokens)

    def require_kind(self, kind: str) -> LatencyProfile:
        """Return the profile itself, if it is of this cost kind.

        Raises:
            LatencyProfileError: it is of another kind; the message says how to get the right profile.
        """
        if self.kind == kind:
            return self
        option = "" if kind == CHAIN else f" --decoder {kind}"
        raise LatencyProfileError(
            f"the latency profile of {self.pair} was made for {self.kind} rounds, and {kind} rounds are to be charged. "
            "Give no profile, which measures one, or get the right kind: specgym.decoding.latency_measure.measured("
            f"pair{'' if kind == CHAIN else ', decoder'}), or python -m specgym.envs.profiles WORKLOAD{option}"
        )

    def at(self, *, batch_size: int = 1, context: int | None = None) -> LatencyProfile:
        """The profile of another operating point, without points of its own.

        Args:
            batch_size: sequences decoded together; linear between measured sizes.
            context: tokens read before; linear between measured lengths. By default this profile's own.

        Raises:
            LatencyProfileError: the point lies outside what was measured; the message says what that is.
        """
        batch_size = _count("batch_size", batch_size)
        context = self.context if context is None else _count("context", context)
        if (batch_size, context) == (self.batch_size, self.context):
            return replace(self, points=())
        grid = self._grid()
        batch_sizes = sorted({size for size, _ in grid})
        contexts = sorted({length for _, length in grid if length is not None})
        if context is None or not (_covers(batch_sizes, batch_size) and _covers(contexts, context)):
            measuring = "decoder" if self.kind != CHAIN else "batch_sizes=..."
            raise LatencyProfileError(
                f"the latency profile of {self.pair} has no point at batch size {batch_size} and context {context}: "
                f"it covers {_words('batch size', batch_sizes)} and {_words('context', contexts)}. Get a wider one "
                f"with specgym.decoding.latency.measure.measure(pair, {measuring}, contexts=...), or compute one "
                "with specgym.decoding.roofline.roofline, which takes batch_sizes and contexts"
            )
        corners = [
            (grid[size, length], size_share * length_share)
            for size, size_share in _neighbours(batch_sizes, batch_size)
            for length, length_share in _neighbours(contexts, context)
        ]
        if len(corners) == 1:
            return replace(corners[0][0], points=(), chances=self.chances)
        return replace(
            self,
            draft_seconds={
                tokens: sum(share * point.draft(tokens) for point, share in corners)
                for tokens in _shared(point.draft_seconds for point, _ in corners)
            },
            target_seconds={
                tokens: sum(share * point.target(tokens) for point, share in corners)
                for tokens in _shared(point.target_seconds for point, _ in corners)
            },
            autoregressive_seconds=sum(share * point.autoregressive_seconds for point, share in corners),
            batch_size=batch_size,
            context=context,
            points=(),
            uncertainty=None,
        )

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; a reader never sees half a file."""
        about = {key: getattr(self, name) for key, name in _ABOUT.items()}
        if not self.overlaps:
            del about["overlaps"]  # as in files of earlier versions
        if self.chances is not None:
            about["chances"] = self.chances.to_json()
        write_sealed(
            path,
            {"format": _FORMAT, **about, **self._stored(), "points": [point._stored() for point in self.points]},
        )

    @classmethod
    def load(cls, path: str | Path) -> LatencyProfile:
        """Read a profile.

        Raises:
            LatencyProfileError: the file is missing, damaged, or not one of `save`.
        """
        way_out = "measure it again with specgym.decoding.latency.measure.measured(pair, refresh=True)"
        content = profile_content(path, "latency profile", way_out, _FORMAT, _UNSEALED)
        try:
            about = {name: content.pop(key) for key, name in _ABOUT.items() if key in content or name != "overlaps"}
            if not all(isinstance(about[name], kind) for name, kind in _TYPES.items() if name in about):
                raise ArgumentError("pair, hardware, sampling or overlaps is of another type")
            chances = content.pop("chances", None)
            points = tuple(cls(**about, **_restored(point)) for point in content.pop("points"))
            return cls(
                **about,
                **_restored(content),
                points=points,
                chances=None if chances is None else KeepChances.from_json(chances),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LatencyProfileError(f"latency profile {path} is damaged ({error}); {way_out}") from error

    def _stored(self) -> dict[str, Any]:
        names = ("batch_size", "context", *_TABLES, "autoregressive_seconds")
        content = {name: getattr(self, name) for name in names}
        for table in _TABLES:  # JSON would make strings of the numbers of tokens
            content[table] = list(content[table].items())
        return content if self.uncertainty is None else {**content, "uncertainty": self.uncertainty.stored()}

    def _grid(self) -> dict[tuple[int, int | None], LatencyProfile]:
        return {(point.batch_size, point.context): point for point in (self, *self.points)}

    def _check_grid(self) -> None:
        grid = self._grid()
        if any((point.kind, point.overlaps) != (self.kind, self.overlaps) for point in self.points):
            raise LatencyProfileError(f"the points must be of {self.kind} rounds, as the profile's own are")
        if any(point.points or point.context is None for point in self.points) or self.context is None:
            raise LatencyProfileError("every point of a grid has a context, and no point has points of its own")
        sizes, lengths = {size for size, _ in grid}, {length for _, length in grid}
        if not len(grid) == len(sizes) * len(lengths) == len(self.points) + 1:
            known = ", ".join(f"{size} x {length}" for size, length in grid)
            raise LatencyProfileError(
                f"the points (batch size x context: {known}) are no full grid; give every batch size with every "
                "context, each once"
            )
        for table in _TABLES:
            if not _shared(getattr(point, table) for point in grid.values()):
                raise LatencyProfileError(f"the points share no number of tokens in {table}, so nothing lies between")


def checked_seconds(name: str, table: Mapping[int, float], fewest: int) -> dict[int, float]:
    """Return a table of seconds by numbers of tokens, ascending.

    Args:
        name: of the table, for messages.
        table: as it was given.
        fewest: tokens that an entry has at least. If that is not 0, all seconds must be positive.

    Raises:
        LatencyProfileError: it is empty, or has a number that makes no sense.
    """
    checked = (
        (_count(f"tokens of {name}", tokens, at_least=0), _seconds(f"{name}[{tokens!r}]", seconds, at_least=0))
        for tokens, seconds in mapping_of(name, table, LatencyProfileError).items()
    )
    ordered = dict(sorted(checked))
    if not ordered or min(ordered) < fewest:
        raise LatencyProfileError(f"{name} must have an entry, and none below {fewest} tokens")
    for tokens, seconds in ordered.items():
        if seconds == 0 and fewest > 0:
            raise LatencyProfileError(f"{name}[{tokens}] is {seconds}; seconds are finite and positive")
    return ordered


def profile_content(path: str | Path, noun: str, way_out: str, current: str, *earlier: str) -> dict[str, Any]:
    """Read the JSON of a profile, without its format.

    Args:
        path: the file.
        noun: name of such profiles in messages.
        way_out: of a file that cannot be used, for messages.
        current: format that it must have, sealed.
        earlier: formats that it may have.

    Raises:
        LatencyProfileError: the file is missing, damaged, or of another format.
    """
    try:
        content = read_sealed(path, current)
    except FileNotFoundError:
        raise LatencyProfileError(f"there is no {noun} {path}; {way_out}") from None
    except (OSError, DamagedFileError) as error:
        raise LatencyProfileError(f"{noun} {path} cannot be read ({error}); {way_out}") from error
    if content.pop("format", None) not in (current, *earlier):
        raise LatencyProfileError(f"{path} is not a {noun} of this version ({current}); {way_out}")
    return content


def arithmetic_of(sampling: Sampling) -> str:
    """Which sampling settings take the same time: `greedy`, or `sampled` with `-top-k` and `-top-p` where used."""
    if sampling.greedy:
        return "greedy"
    return "sampled" + ("-top-k" if sampling.top_k else "") + ("-top-p" if sampling.top_p < 1 else "")


def _restored(point: Mapping[str, Any]) -> dict[str, Any]:
    known = {"uncertainty": Uncertainty.restored(point["uncertainty"])} if "uncertainty" in point else {}
    return {**point, **{table: dict(point[table]) for table in _TABLES}, **known}


def interpolated(table: Mapping[int, float], tokens: int, fewest: int) -> float:
    """Return the seconds of a number of tokens: linear between those of a table, ascending, and beyond the last two.

    Raises:
        ArgumentError: there are fewer tokens than the fewest that make sense.
    """
    if tokens < fewest:
        raise ArgumentError(f"a latency is asked for at least {fewest} tokens, got {tokens}")
    known = list(table)
    if len(known) == 1:
        return table[known[0]]
    if tokens in table:
        return table[tokens]
    right = min(max(bisect_right(known, tokens), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (table[high] - table[low]) / (high - low)
    return max(0.0, table[low] + slope * (tokens - low))


def _covers(known: Sequence[int], size: int) -> bool:
    return bool(known) and known[0] <= size <= known[-1]


def _neighbours(known: Sequence[int], size: int) -> list[tuple[int, float]]:
    """The known numbers on both sides with their shares, which sum to 1; one alone where the number itself is known."""
    right = bisect_left(known, size)
    if known[right] == size:
        return [(size, 1.0)]
    low, high = known[right - 1], known[right]
    share = (size - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def _shared(tables: Iterable[Mapping[int, float]]) -> list[int]:
    """Numbers of tokens that all tables have, ascending."""
    first, *others = tables
    return [tokens for tokens in first if all(tokens in other for other in others)]


def _words(name: str, known: Sequence[int]) -> str:
    if not known:
        return f"no {name} but its own, which is not known"
    return f"{name} {known[0]}" if len(known) == 1 else f"{name}s {known[0]} to {known[-1]}"
