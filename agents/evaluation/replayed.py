"""A workload to tune by replay: training prompts to measure on, held-out prompts to be judged on.

A recommended setting is worth its share of what the best setting of a dense grid reaches on the same held-out prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import KnobError, LatencyProfile, SpecgymError, Split
from specgym.envs import (
    Backend,
    KnobMoves,
    Metrics,
    RewardSettings,
    Trace,
    Workload,
    find_trace,
    replay_backend,
    reward_terms,
    trace_in,
)

from ..experiments.tune_unseen_settings import TunerSettings
from .measurements import Floats, Grid, Measurement, Worth

PASSES = 16
"""How often every prompt is decoded to judge a setting: sampling throws dice, and so does a replay for its path."""
PENALTY = 1000.0
"""What a divergence of 1 beyond the bound takes from the objective. So steep that no speed makes up for it: an exact
penalty, which asks for the fastest setting within the bound and needs no weight to be chosen."""
FALLBACK_STEP = 0.05
"""Between the grid's fallbacks."""
_ROUNDING = 1e-9


class TuningProblemError(SpecgymError, ValueError):
    """A workload that cannot be tuned by these rewards; the message names it and the way out."""


class Problem:
    """One workload to tune by replay: train prompts to measure on, test prompts to be judged on.

    Args:
        name: the workload's, or a workload.
        reward: what a setting is worth. With `max_divergence` set: the speedup, as long as the mean divergence stays
            within that bound.
        prompts_per_measurement: training prompts that a measurement decodes, at least 1.
        tokens: generated of each prompt.
        draft_length: K.
        train: the trace of the training prompts; by default the one that ships.
        test: the trace of the held-out prompts; by default the one that ships.
        profile: what time is charged by; by default the pair's reference profile.

    Attributes:
        name: the workload's.
        pair: the pair's name.
        prompts: the prompt set's name.
        family: the target's name.
        temperature: of sampling; 0 when greedy.
        cost_ratio: what one more drafted token adds to a round, over the time per token of plain decoding.
        reward: as given.
        knobs: of the threshold decoder.
        ranges: (low, high) of every knob, by name.
        default: the decoder's default setting, by knob.

    Raises:
        TraceError: a trace is missing, or holds shorter texts or other drafts than asked for.
        WorkloadError: the workload is not known.
        ValueError: `prompts_per_measurement` is not positive.
    """

    def __init__(
        self,
        name: str | Workload,
        reward: RewardSettings,
        *,
        prompts_per_measurement: int = 4,
        tokens: int = 32,
        draft_length: int = 16,
        train: Trace | None = None,
        test: Trace | None = None,
        profile: LatencyProfile | str | Path | None = None,
    ) -> None:
        if prompts_per_measurement < 1:
            raise ValueError(f"prompts_per_measurement must be at least 1, got {prompts_per_measurement}")
        trace, workload = find_trace(train, name, "train")
        held_out, _ = find_trace(test, name, "test")
        self.name = workload.name
        self.pair = workload.pair if isinstance(workload.pair, str) else workload.pair.name
        self.prompts = workload.prompts if isinstance(workload.prompts, str) else workload.prompts.name
        self.family = trace.info.target
        self.temperature = trace.info.temperature
        self.reward = reward
        self._prompts_per_measurement = prompts_per_measurement
        self._replays: dict[Split, Backend] = {}
        self._grids: dict[Split, Grid] = {}
        traces: dict[Split, Trace] = {"train": trace, "test": held_out}
        for split, recording in traces.items():
            self._replays[split] = replay_backend(
                "threshold",
                workload.with_split(split),
                recording,
                profile=profile,
                max_new_tokens=tokens,
                max_draft_length=draft_length,
            )
        self.knobs = self._replays["train"].knobs
        self._profile = self._replays["train"].profiles[0]
        self.cost_ratio = self._profile.marginal_cost()
        moves = KnobMoves(self.knobs, None, None)
        self.ranges = dict(moves.ranges)
        self.default = moves.values(moves.defaults())

    @property
    def profiled_on(self) -> str:
        """The hardware that the latency profile is of."""
        hardware = self._profile.hardware
        return f"{hardware.get('name', hardware.get('device', 'unknown'))}, {hardware.get('threads', '?')} thread(s)"

    def measure(self, knobs: Mapping[str, float], number: int, seed: int) -> Measurement:
        """Decode a few training prompts with one setting.

        Which prompts, and the dice, depend on the seed and the number alone, so that every method gets the same. The
        prompts of a seed go through all training prompts before any comes again.

        Args:
            knobs: a value for every knob, in its own units.
            number: of the measurement, from 0.
            seed: fixes the order of the prompts, and the dice.

        Raises:
            KnobError: a knob is missing, unknown or out of range.
        """
        setting = self._checked(knobs)
        replay = self._replays["train"]
        alone, texts = np.zeros(1, np.int64), []
        columns = {name: np.array([value]) for name, value in setting.items()}
        for place, prompt in enumerate(self.measured_prompts(number, seed)):
            rng = np.random.default_rng([seed, number, place])
            texts.append(replay.decode(np.array([prompt]), alone, columns, rng).single())
        values = Metrics(*np.sum(texts, axis=0).tolist()).entries()
        arrays = {name: np.array([value]) for name, value in values.items()}
        reward = self.objective({name: np.array([value]) for name, value in setting.items()}, arrays)
        return Measurement(setting, values, float(reward[0]))

    def measured_prompts(self, number: int, seed: int) -> list[int]:
        """The training prompts of a measurement, as the trace counts them; arguments as for `measure`."""
        known = self._replays["train"].prompts[0]
        first = number * self._prompts_per_measurement
        chosen = []
        for place in range(first, first + self._prompts_per_measurement):
            turn, within = divmod(place, len(known))
            chosen.append(int(_order(seed, turn, len(known))[within]))
        return known[chosen].tolist()

    def worth(self, knobs: Sequence[Mapping[str, float]], *, split: Split = "test", passes: int = PASSES) -> Worth:
        """Judge settings on all prompts of a split.

        Every setting gets the same dice, so a setting's worth does not depend on which others are asked for.

        Args:
            knobs: settings, each with a value for every knob.
            split: whose prompts.
            passes: how often every prompt is decoded.

        Raises:
            KnobError: a knob is missing, unknown or out of range.
            TuningProblemError: a reward of the split's grid is not positive.
        """
        values, reward = self._judged(knobs, split, passes)
        bound = self.reward.max_divergence
        kept = np.ones(len(reward), np.bool_) if bound is None else values["divergence"] <= bound
        return Worth(values, reward, self.share_of_best(values, reward, split=split), kept)

    def share_of_best(self, values: Mapping[str, Floats], reward: Floats, *, split: Split = "test") -> Floats:
        """Of the best reward of the split's grid; with a bound on the divergence, of the best speedup: at most 1, and 0
        where the bound is broken.

        Args:
            values: metrics.
            reward: of the same settings and shape.
            split: whose grid.
        """
        best = self._grid(split).best_reward
        if self.reward.max_divergence is None:
            return reward / best
        share: Floats = np.minimum(values["speedup"], best) / best
        return np.where(values["divergence"] <= self.reward.max_divergence, share, 0.0)

    def grid(self) -> Grid:
        """A dense grid on the test prompts; computed once. Raises as `worth`."""
        return self._grid("test")

    def train_grid(self) -> Grid:
        """The same on the training prompts: for methods that learn from other workloads. Raises as `worth`."""
        return self._grid("train")

    def objective(self, knobs: Mapping[str, Floats], values: Mapping[str, Floats]) -> Floats:
        """The reward of settings; with a bound on the divergence the speedup minus `PENALTY` times what is beyond it.

        Args:
            knobs: by name, shape (settings,).
            values: `speedup`, `draft_acceptance_rate` and `divergence`, of the same shape or (settings, ways).
        """
        bound = self.reward.max_divergence
        if bound is not None:
            return values["speedup"] - PENALTY * np.maximum(values["divergence"] - bound, 0.0)
        terms = reward_terms(
            self.reward,
            speedup=values["speedup"],
            acceptance_rate=values["draft_acceptance_rate"],
            divergence=values["divergence"],
            knobs=self.knobs,
            values=knobs,
        )
        total: Floats = sum(terms.values(), np.zeros(1))  # the term of the range knows nothing of ways
        return total

    def _grid(self, split: Split) -> Grid:
        if split not in self._grids:
            self._grids[split] = self._new_grid(split)
        return self._grids[split]

    def _new_grid(self, split: Split) -> Grid:
        low, high = self.ranges["fallback"]
        fallback = np.linspace(low, high, round((high - low) / FALLBACK_STEP) + 1).round(9)
        rollback = np.arange(self.ranges["rollback"][0], self.ranges["rollback"][1] + 1)
        shape = len(fallback), len(rollback)
        empty = Grid(fallback, rollback, np.empty(shape), {}, {}, 0.0)
        values, reward = self._judged(empty.settings(), split, PASSES)
        bound = self.reward.max_divergence
        if bound is None and reward.min() <= 0:
            raise TuningProblemError(
                f"{self.name}: a reward of {reward.min():.3g} on the {split} prompts is not positive, so a share of "
                "the best means nothing; take a smaller divergence_weight, or none and max_divergence instead"
            )
        kept = np.ones(len(reward), np.bool_) if bound is None else values["divergence"] <= bound
        place = int(np.argmax(np.where(kept, reward, -np.inf) if kept.any() else reward))
        return Grid(
            fallback,
            rollback,
            reward.reshape(shape),
            {name: value.reshape(shape) for name, value in values.items()},
            empty.settings()[place],
            float((reward if kept.any() else values["speedup"])[place]),
        )

    def _judged(
        self, knobs: Sequence[Mapping[str, float]], split: Split, passes: int
    ) -> tuple[dict[str, Floats], Floats]:
        """Metrics and rewards of settings, all arrays of shape (settings,)."""
        sums = self.sums(knobs, split=split, passes=passes)
        return self.valued(knobs, {name: value.sum(1, keepdims=True) for name, value in sums.items()})

    def sums(
        self, knobs: Sequence[Mapping[str, float]], *, split: Split = "test", passes: int = PASSES
    ) -> dict[str, Floats]:
        """What decoding every prompt of a split with some settings adds up to; arrays of shape (settings, prompts).

        Arguments and errors as for `worth`; the sums are those of `Metrics`.
        """
        replay = self._replays[split]
        prompts = np.tile(replay.prompts[0], passes)
        workloads = np.zeros(len(prompts), np.int64)
        sums: dict[str, list[Floats]] = {}
        for setting in [self._checked(item) for item in knobs]:
            # A call for every setting, for all prompts and passes: a larger one is no faster, and draws stay the same.
            columns = {name: np.full(len(prompts), value) for name, value in setting.items()}
            texts = replay.decode(prompts, workloads, columns, np.random.default_rng(0))
            for name, value in texts._asdict().items():
                sums.setdefault(name, []).append(value.reshape(passes, -1).sum(0))
        return {name: np.stack(rows) for name, rows in sums.items()}

    def valued(
        self, knobs: Sequence[Mapping[str, float]], totals: Mapping[str, Floats]
    ) -> tuple[dict[str, Floats], Floats]:
        """Metrics and rewards of settings from sums over prompts.

        Args:
            knobs: settings.
            totals: sums as `sums` gives them, over some prompts in several ways, shape (settings, ways).

        Returns:
            Arrays of shape (settings, ways); of shape (settings,) where there is but one way.
        """
        values = Metrics(**totals).entries()
        columns = {name: np.array([[setting[name]] for setting in knobs]) for name in self.ranges}
        reward = self.objective(columns, values)
        if reward.shape[1] > 1:
            return values, reward
        return {name: value[:, 0] for name, value in values.items()}, reward[:, 0]

    def _checked(self, given: Mapping[str, float]) -> dict[str, float]:
        if set(given) != set(self.ranges):
            raise KnobError(
                f"{self.name}: a setting has a value for each of {', '.join(self.ranges)}, got "
                f"{', '.join(given) or 'none'}"
            )
        for knob, (low, high) in self.ranges.items():
            if not low - _ROUNDING <= given[knob] <= high + _ROUNDING:  # so NaN is refused too
                raise KnobError(f"{self.name}: {knob} must be between {low:g} and {high:g}, got {given[knob]!r}")
        return {knob: float(given[knob]) for knob in self.ranges}


def problems_of(settings: TunerSettings, names: Sequence[str] | None = None) -> list[Problem]:
    """The workloads of a run as problems to tune, or some of them. Raises as `Problem` and `trace_of`."""
    return [
        Problem(
            name,
            settings.reward,
            prompts_per_measurement=settings.prompts_per_measurement,
            tokens=settings.max_new_tokens,
            draft_length=settings.max_draft_length,
            train=trace_in(settings.recordings, name, "train"),
            test=trace_in(settings.recordings, name, "test"),
        )
        for name in (settings.workloads if names is None else names)
    ]


@functools.lru_cache(maxsize=4096)
def _order(seed: int, turn: int, prompts: int) -> NDArray[np.int64]:
    """In which order a seed's measurements take the prompts in a turn through all of them."""
    return np.random.default_rng([seed, turn]).permutation(prompts)
