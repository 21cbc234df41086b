"""Pools of acceptance worlds: recorded workloads as they are, or warped many times, decoded with every setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..recordings.find import find_recording
from ..recordings.trace import Trace
from ..workloads import workload
from .acceptance import Counts, Floats, Integers, Rows, Stop, Warp, count_rounds, rounds_a_token, warped

TEXTS: Final = 24
"""Texts of a workload's split, at most."""
DRAWS: Final = 3
"""Times that the verdicts of held-out texts are drawn, so that what is best there is little luck."""
STOPS: Final[tuple[Stop, ...]] = ("after", "before")


@dataclass(frozen=True)
class Source:
    """One recorded workload.

    Attributes:
        name: of the workload.
        pair: its pair's name.
        temperature: of sampling; 0 for greedy decoding.
        train: drafts on training prompts, which are measured.
        test: drafts on held-out prompts, which settings are judged on.
    """

    name: str
    pair: str
    temperature: float
    train: Rows
    test: Rows

    @classmethod
    def find(cls, name: str) -> Source:
        """Take both splits of a workload's shipped trace. Errors as for `find_recording`."""
        splits = []
        for split in ("train", "test"):
            trace, named = find_recording("speculative", None, name, split)
            assert isinstance(trace, Trace)  # which is how exact decoding is recorded
            splits.append(Rows.of(trace, min(TEXTS, trace.prompts)))
        return cls(name, str(workload(name).pair), named.sampling.temperature, *splits)


class AcceptancePool:
    """Acceptance worlds side by side, each decoded with every setting.

    Args:
        sources: the workloads that the worlds come from.
        source_of: each world's source, shape (worlds,).
        stops: each world's kind of stop rule.
        warps: of each world.
        measured: what training texts gave in each world.
        rounds: a token on held-out texts of each world, as `rounds_a_token` has them.

    Attributes:
        before: worlds whose drafts stop before a token, shape (worlds,).
        texts: training texts of each world, shape (worlds,).
        rounds: rounds a token on held-out texts, by what they draft, shape (worlds, settings, K + 3).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        source_of: Integers,
        stops: Sequence[Stop],
        warps: Sequence[Warp],
        measured: Sequence[Counts],
        rounds: Sequence[Floats],
    ) -> None:
        self.sources, self.source_of, self.warps = tuple(sources), source_of, tuple(warps)
        self.before = np.array([stop == "before" for stop in stops])
        self.texts = np.array([len(counts.tokens) for counts in measured])
        most = int(self.texts.max())
        self.tokens = np.stack([_padded(counts.tokens[None], most)[0] for counts in measured])
        self.drafts, self.kept, self.reached, self.judged, self.passed, self.entropy = (
            np.stack([_padded(getattr(counts, name), most) for counts in measured])
            for name in ("drafts", "kept", "reached", "judged", "passed", "entropy")
        )
        self.rounds = np.stack(rounds).astype(np.float32)

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def temperatures(self) -> Floats:
        """Sampling temperature of each world, shape (worlds,)."""
        return np.array([source.temperature for source in self.sources])[self.source_of]

    @cached_property
    def pairs(self) -> NDArray[np.str_]:
        """Name of each world's pair, shape (worlds,)."""
        return np.array([source.pair for source in self.sources])[self.source_of]

    @classmethod
    def recorded(cls, names: Sequence[str], seed: int = 0) -> AcceptancePool:
        """The worlds of some workloads as they were recorded, one for each kind of stop rule."""
        sources = [Source.find(name) for name in names]
        plan = [(place, stop, Warp()) for place in range(len(sources)) for stop in STOPS]
        return _decoded(sources, plan, seed)

    @classmethod
    def warped(
        cls,
        names: Sequence[str],
        worlds: int,
        seed: int = 0,
        report: Callable[[int], None] = lambda worlds: None,
    ) -> AcceptancePool:
        """Worlds that lie around some recorded workloads.

        Args:
            names: of the workloads, each the source of as many worlds as any other, or one more.
            worlds: how many.
            seed: fixes the warps and the verdicts.
            report: called with the number of worlds decoded so far.
        """
        sources = [Source.find(name) for name in names]
        rng = np.random.default_rng([seed, 1])
        plan = [(place % len(sources), STOPS[rng.integers(2)], drawn_warp(rng)) for place in range(worlds)]
        return _decoded(sources, plan, seed, report)


def drawn_warp(rng: np.random.Generator) -> Warp:
    """Draw how far a world lies from what was recorded."""
    return Warp(
        acceptance=float(rng.uniform(0.1, 0.95)),
        informed=float(rng.uniform(0.3, 1.5)),
        slope=float(rng.choice([0.0, rng.uniform(0.0, 0.2)])),
        sharpness=float(rng.uniform(0.6, 1.7)),
        bias=float(rng.normal(0.0, 0.7)),
    )


def _decoded(
    sources: Sequence[Source],
    plan: Sequence[tuple[int, Stop, Warp]],
    seed: int,
    report: Callable[[int], None] = lambda worlds: None,
) -> AcceptancePool:
    measured, rounds = [], []
    for number, (place, stop, warp) in enumerate(plan):
        rng = np.random.default_rng([seed, 2, number])
        source = sources[place]
        measured.append(count_rounds(*warped(source.train, warp, stop, rng), source.train, stop))
        certain = warp == Warp() and source.temperature == 0
        draws = (warped(source.test, warp, stop, rng) for _ in range(1 if certain else DRAWS))
        rounds.append(np.mean([rounds_a_token(*draw, source.test, stop) for draw in draws], 0))
        report(number + 1)
    numbers, stops, warps = zip(*plan, strict=True)
    return AcceptancePool(sources, np.array(numbers), stops, warps, measured, rounds)


def _padded(values: NDArray[np.generic], texts: int) -> NDArray[np.generic]:
    """Counts of shape (settings, texts, ...) with further texts that are all 0."""
    return np.pad(values, [(0, 0), (0, texts - values.shape[1]), *[(0, 0)] * (values.ndim - 2)])
