"""Worlds side by side: acceptance x deployment x engine x batch size, drawn, measured and judged as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, Deployment, LatencyProfile, round_costs

from .acceptance import LENGTHS, LONGEST, Floats, Integers
from .pool import AcceptancePool

BATCH_SIZES: Final = tuple(2**power for power in range(9))
PROMPTS: Final = 12
"""Texts that a measurement decodes."""
_NOISE = 0.003, 0.05
_DRAFT_FACTOR = 0.8, 1.6
_LARGEST_OVERHEAD = 0.15


MEASURED: Final = "measured"
"""Class and software of measured profiles."""


class Engine(NamedTuple):
    """Program that people serve with, and what can be set of it.

    Attributes:
        name: of the program.
        stop: whether its threshold ends a draft after or before a token; None where drafts have a fixed length.
        batches: whether it decodes several sequences together.
        software: of the deployments that it runs on.
    """

    name: str
    stop: str | None
    batches: bool
    software: tuple[str, ...]


ENGINES: Final = (
    Engine("transformers", "after", False, ("eager", "cpu", MEASURED)),
    Engine("llama.cpp", "before", False, ("llama.cpp", "cpu", MEASURED)),
    Engine("openvino", None, True, ("compiled", "cpu", MEASURED)),
    Engine("vllm", None, True, ("compiled", MEASURED)),
)
"""Their stop rules are those of `specgym.decoding.SpeculativeDecoder`. llama.cpp drafts for one sequence at a time."""
ENGINE_NAMES: Final = tuple(engine.name for engine in ENGINES)
_STOPS_BEFORE = np.array([engine.stop == "before" for engine in ENGINES])
_STOPS_AFTER = np.array([engine.stop == "after" for engine in ENGINES])


class Readings(NamedTuple):
    """Results of measurements, one in each row.

    Attributes:
        speedup: plain seconds a token over those with the setting, shape (n,).
        drafts: rounds that drafted k tokens, shape (n, K + 1).
        kept: rounds that kept more than j drafted tokens, shape (n, K).
        reached: rounds in which the target judged more than j: those kept, and the one that was not; likewise.
        judged: tokens that the target judged, by the level of their probability, shape (n, levels).
        passed: those of them that were kept, likewise.
        entropy: mean of what the tokens judged were drawn from, in nats, shape (n,).
    """

    speedup: Floats
    drafts: Integers
    kept: Integers
    reached: Integers
    judged: Integers
    passed: Integers
    entropy: Floats

    def without_probabilities(self, rows: NDArray[np.bool_]) -> Readings:
        """Return the readings as of an engine that does not tell its draft's probabilities, in some rows."""
        seen = ~rows
        return self._replace(
            judged=self.judged * seen[:, None], passed=self.passed * seen[:, None], entropy=self.entropy * seen
        )


@dataclass(frozen=True)
class Charges:
    """Costs of rounds on many deployments.

    Attributes:
        labels: of the deployments.
        classes: kind of the hardware of each, or `MEASURED`.
        software: that each runs; `cpu` for processors, on which it matters less, and `MEASURED`.
        verify: seconds of a target pass that verifies k drafted tokens, over those of a plain token, by deployment,
            batch size and k, shape (deployments, batch sizes, K + 1); NaN where the batch does not fit in memory.
        draft: seconds that each drafted token adds, over the same, shape (deployments, batch sizes).
        begin: seconds that a round with a draft takes beside, likewise.
    """

    labels: NDArray[np.str_]
    classes: NDArray[np.str_]
    software: NDArray[np.str_]
    verify: Floats
    draft: Floats
    begin: Floats

    @classmethod
    def of(cls, deployments: Sequence[Deployment], profiles: Sequence[LatencyProfile] = ()) -> Charges:
        """Compute them by the roofline, and take those of measured profiles of chains, at their own batch size."""
        count = len(deployments) + len(profiles)
        verify = np.full((count, len(BATCH_SIZES), LONGEST + 1), np.nan)
        draft = np.full((count, len(BATCH_SIZES)), np.nan)
        begin = np.zeros_like(draft)
        for place, deployment in enumerate(deployments):
            fit = [size for size in BATCH_SIZES if deployment.fits(size)]
            plain, step, target = round_costs(deployment, fit, LONGEST)
            verify[place, : len(fit)], draft[place, : len(fit)] = target / plain[:, None], step / plain
        for place, profile in enumerate(profiles, len(deployments)):
            if profile.batch_size not in BATCH_SIZES:
                raise ArgumentError(
                    f"profile of {profile.pair}: batch size {profile.batch_size} is none of {BATCH_SIZES}"
                )
            column, plain_seconds = BATCH_SIZES.index(profile.batch_size), profile.autoregressive_seconds
            token = (profile.draft(LONGEST) - profile.draft(1)) / (LONGEST - 1)
            verify[place, column] = [profile.target(tokens + 1) / plain_seconds for tokens in LENGTHS.tolist()]
            # Plain decoding takes no round's time, so what a round without a draft takes beyond it belongs to drafting.
            begin[place, column] = (profile.draft(1) - token + profile.target(1)) / plain_seconds - 1
            verify[place, column] -= verify[place, column, 0] - 1
            draft[place, column] = token / plain_seconds
        return cls(
            np.array([item.label for item in deployments] + [profile.pair for profile in profiles]),
            np.array([item.hardware_class for item in deployments] + [MEASURED] * len(profiles)),
            np.array([_software(item) for item in deployments] + [MEASURED] * len(profiles)),
            verify,
            draft,
            begin,
        )

    def costs(
        self, deployment: Integers, batch: Integers, factor: Floats | float = 1.0, overhead: Floats | float = 0.0
    ) -> Floats:
        """Return the costs of rounds, as `Worlds.costs` has them, shape (n, K + 3).

        Args:
            deployment: places among the deployments, shape (n,).
            batch: places among `BATCH_SIZES`, shape (n,).
            factor: on the cost of a drafted token, a number or of shape (n,).
            overhead: of a round with a draft, in plain tokens, likewise.
        """
        token = (self.draft[deployment, batch] * factor)[:, None]
        begin = (self.begin[deployment, batch] + overhead)[:, None]
        return np.concatenate(
            [self.verify[deployment, batch] + LENGTHS * token + (LENGTHS > 0) * begin, token, begin], 1
        )

    @property
    def fits(self) -> NDArray[np.bool_]:
        """Mask of the batch sizes that fit on each deployment, shape (deployments, batch sizes)."""
        return ~np.isnan(self.draft)


def _software(deployment: Deployment) -> str:
    return "cpu" if deployment.hardware_class == "cpu" else deployment.software


@dataclass
class Worlds:
    """Tuning problems side by side.

    Attributes:
        pool: of the acceptance worlds.
        acceptance: place of each one's acceptance world, shape (n,), like all that follow.
        engine: place in `ENGINES`.
        batch_size: sequences decoded together.
        deployment: place among the deployments.
        noise: standard deviation of the logarithm of a measured time.
        costs: seconds of a round that drafts k tokens, of a token that is thrown away, and of drafting at all, over
            those of a plain token, shape (n, K + 3).
    """

    pool: AcceptancePool
    acceptance: Integers
    engine: Integers
    batch_size: Integers
    deployment: Integers
    noise: Floats
    costs: Floats

    def __len__(self) -> int:
        return len(self.acceptance)

    @property
    def fixed(self) -> NDArray[np.bool_]:
        """Worlds whose engine drafts a fixed length, shape (n,)."""
        return ~(_STOPS_AFTER | _STOPS_BEFORE)[self.engine]

    @property
    def before(self) -> NDArray[np.bool_]:
        """Worlds whose engine stops before a token, shape (n,)."""
        return _STOPS_BEFORE[self.engine]

    @property
    def temperature(self) -> Floats:
        """Sampling temperatures, shape (n,)."""
        return self.pool.temperatures[self.acceptance]

    def put(self, rows: Integers, others: Worlds) -> None:
        """Put other worlds of the same pool into some rows."""
        for field in fields(self)[1:]:
            getattr(self, field.name)[rows] = getattr(others, field.name)

    def taken(self, rows: Integers) -> Worlds:
        """Return some of the worlds."""
        return Worlds(self.pool, *(getattr(self, field.name)[rows] for field in fields(self)[1:]))

    def speedups(self) -> NDArray[np.float32]:
        """Speedups on held-out texts with every setting; 0 for settings that an engine lacks. Shape (n, settings)."""
        seconds = np.einsum("nsk,nk->ns", self.pool.rounds[self.acceptance], self.costs.astype(np.float32))
        speedups: NDArray[np.float32] = 1 / seconds
        speedups[self.fixed, len(LENGTHS) :] = 0
        return speedups

    def measure(self, rows: Integers, settings: Integers, rng: np.random.Generator) -> Readings:
        """Decode some training texts of each world with one setting, and time it.

        Args:
            rows: of the worlds, shape (n,).
            settings: numbers of the settings, shape (n,).
            rng: draws the texts and the noise.
        """
        pool, world = self.pool, self.acceptance[rows]
        texts = (rng.random((len(rows), PROMPTS)) * pool.texts[world][:, None]).astype(np.int64)
        where = world[:, None], settings[:, None], texts
        counted = (pool.drafts, pool.kept, pool.reached, pool.judged, pool.passed)
        drafts, kept, reached, judged, passed = (counts[where].sum(1, dtype=np.int64) for counts in counted)
        seconds = (drafts * self.costs[rows]).sum(1) * self.noisy(rows, rng)
        entropy = pool.entropy[where].sum(1, dtype=np.float64) / np.maximum(judged.sum(1), 1)
        speedup, rounds = pool.tokens[where[0], texts].sum(1) / seconds, drafts[:, : LONGEST + 1]
        return Readings(speedup, rounds, kept, reached, judged, passed, entropy)

    def noisy(self, rows: Integers, rng: np.random.Generator) -> Floats:
        """Draw what a measured time is multiplied by in some rows."""
        return np.exp(self.noise[rows] * rng.standard_normal(len(rows)))


@dataclass(frozen=True)
class WorldSampler:
    """Domain randomisation: draws worlds.

    Any acceptance goes with any deployment: how well a draft guesses is not known from its size. A drafted token costs
    0.8 to 1.6 times what the roofline says, and a round with a draft up to 0.15 plain tokens more. The noise of
    measured times is between 0.3 and 5 % in a world.

    Attributes:
        pool: of the acceptance worlds.
        charges: of the deployments.
        deployments: to draw from, a mask of shape (deployments,).
        batch_sizes: to draw from, some of `BATCH_SIZES`.
        engines: to draw from, some of `ENGINE_NAMES`; an engine that decodes single sequences always does.

    Raises:
        ValueError: there is nothing to draw for an engine.
    """

    pool: AcceptancePool
    charges: Charges
    deployments: NDArray[np.bool_]
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    engines: tuple[str, ...] = ENGINE_NAMES

    def __post_init__(self) -> None:
        for name in self.engines:
            acceptance, _, classes = self._candidates[ENGINE_NAMES.index(name)]
            if not (len(acceptance) and classes):
                raise ArgumentError(
                    f"no world is left to draw for {name}: hold out less, ask for more acceptance worlds, or leave the "
                    "engine out"
                )

    @cached_property
    def _candidates(self) -> list[tuple[Integers, NDArray[np.bool_], list[Integers]]]:
        """By engine: acceptance worlds, which batch sizes fit on each deployment, and deployments by hardware class."""
        chosen, alone = np.isin(BATCH_SIZES, self.batch_sizes), np.arange(len(BATCH_SIZES)) == 0
        candidates = []
        for engine in ENGINES:
            suits = self.pool.before == (engine.stop == "before") if engine.stop else np.full(len(self.pool), True)
            fits = self.charges.fits & self.deployments[:, None] & (chosen if engine.batches else alone)
            usable = fits.any(1) & np.isin(self.charges.software, engine.software)
            classes = [
                np.flatnonzero(usable & (self.charges.classes == kind)) for kind in np.unique(self.charges.classes)
            ]
            candidates.append((np.flatnonzero(suits), fits, [places for places in classes if len(places)]))
        return candidates

    def draw(self, count: int, rng: np.random.Generator) -> Worlds:
        """Draw so many worlds; engines, hardware classes and sizes that fit are each as likely as any other."""
        engine = rng.choice([ENGINE_NAMES.index(name) for name in self.engines], count)
        acceptance, deployment, batch = np.zeros((3, count), np.int64)
        for place in np.unique(engine).tolist():
            worlds, fits, classes = self._candidates[place]
            rows = np.flatnonzero(engine == place)
            acceptance[rows] = rng.choice(worlds, len(rows))
            kind, where = rng.integers(len(classes), size=len(rows)), rng.random(len(rows))
            for number, places in enumerate(classes):
                of_kind = kind == number
                deployment[rows[of_kind]] = places[(where[of_kind] * len(places)).astype(np.int64)]
            batch[rows] = np.where(fits[deployment[rows]], rng.random((len(rows), len(BATCH_SIZES))), -1).argmax(1)
        factor = np.exp(rng.uniform(math.log(_DRAFT_FACTOR[0]), math.log(_DRAFT_FACTOR[1]), count))
        overhead = rng.uniform(0, _LARGEST_OVERHEAD, count)
        costs = self.charges.costs(deployment, batch, factor, overhead)
        noise = np.exp(rng.uniform(math.log(_NOISE[0]), math.log(_NOISE[1]), count))
        return Worlds(self.pool, acceptance, engine, np.array(BATCH_SIZES)[batch], deployment, noise, costs)
