"""Tuning tasks by replay: settings of a decoder measured on training prompts, and judged on held-out prompts.

A recommended setting is judged by its share of what the best setting of a dense grid reaches on the same held-out
prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import KnobError, LatencyProfile, SpecgymError, Split
from specgym.envs import (
    KnobMoves,
    Metrics,
    RewardSettings,
    Workload,
    find_recording,
    prompts_at,
    replay_backend,
    reward_terms,
)

from .statistics import Floats, Grid, grid_axes, settings_of

Flags = NDArray[np.bool_]

PASSES = 16
"""Passes over the prompts that judge a setting: sampling draws at random, and so does a replay for its path."""
PENALTY = 1000.0
"""Objective lost per unit of divergence beyond the bound. So steep that no speed makes up for it: an exact penalty,
which asks for the fastest setting within the bound and needs no weight to be chosen."""
_ROUNDING = 1e-9


class TuningTaskError(SpecgymError, ValueError):
    """A workload that cannot be tuned by these rewards; the message names it and the way out."""


@dataclass(frozen=True)
class Measurement:
    """A setting, measured on a few training prompts.

    Attributes:
        knobs: values by name, in their own units.
        values: metrics by name (`Metrics.entries`).
        reward: the objective (`TuningTask.objective`).
    """

    knobs: dict[str, float]
    values: dict[str, float]
    reward: float


@dataclass(frozen=True)
class Worth:
    """Settings judged on all prompts of a split; arrays of shape (settings,).

    Attributes:
        values: metrics by name.
        reward: the objective.
        fraction: share of the best reward of the split's grid. It may be slightly above 1, as a grid has gaps; with a
            bound on the divergence it is at most 1.
        kept: whether the divergence stays within the bound; true where there is none.
    """

    values: dict[str, Floats]
    reward: Floats
    fraction: Floats
    kept: Flags


class TuningTask:
    """One workload to tune by replay: train prompts to measure on, test prompts to be judged on.

    Args:
        name: a workload or its name.
        reward: what a setting is worth. With `max_divergence` set: the speedup, as long as the mean divergence stays
            within that bound.
        decoder: registered name of the decoder that is tuned.
        options: build options of the decoder, by name.
        prompts_per_measurement: training prompts that a measurement decodes, at least 1.
        max_new_tokens: generated for each prompt.
        train: the recording of the training prompts, or its file; by default the one that ships.
        test: the recording of the held-out prompts, or its file; by default the one that ships.
        profile: what time is charged by; by default the pair's reference profile.

    Attributes:
        name: the workload's.
        pair: the pair's name.
        prompts: the prompt set's name.
        family: the target's name.
        temperature: of sampling; 0 when greedy.
        cost_ratio: what one more drafted token adds to a round, over the time per token of plain decoding.
        reward: as given.
        knobs: of the decoder.
        ranges: (low, high) of every knob, by name.
        default: the decoder's default setting, by knob.
        grids: those that are known, by split; one of the same task in another process may be put in (`grid`).

    Raises:
        TraceError: a recording is missing, or holds shorter texts or other drafts than asked for.
        WorkloadError: the workload is not known.
        ValueError: `prompts_per_measurement` is not positive, or the decoder cannot be replayed.
    """

    def __init__(
        self,
        name: str | Workload,
        reward: RewardSettings,
        decoder: str = "threshold",
        *,
        options: Mapping[str, Any] | None = None,
        prompts_per_measurement: int = 4,
        max_new_tokens: int = 32,
        train: Any = None,
        test: Any = None,
        profile: LatencyProfile | str | Path | None = None,
    ) -> None:
        if prompts_per_measurement < 1:
            raise ValueError(f"prompts_per_measurement must be at least 1, got {prompts_per_measurement}")
        recording, workload = find_recording(decoder, train, name, "train")
        sources: dict[Split, Any] = {"train": recording, "test": test}
        self._backends = {
            split: replay_backend(
                decoder,
                workload.with_split(split),
                source,
                split=split,
                profile=profile,
                max_new_tokens=max_new_tokens,
                **split_options(options or {}, "options"),
            )
            for split, source in sources.items()
        }
        backend = self._backends["train"]
        self._profile = backend.profiles[0]
        self.name = workload.name
        self.pair = workload.pair if isinstance(workload.pair, str) else workload.pair.name
        self.prompts = workload.prompts if isinstance(workload.prompts, str) else workload.prompts.name
        self.family = recording.info.target
        self.temperature = recording.info.temperature
        self.cost_ratio = self._profile.marginal_cost()
        self.reward = reward
        self.knobs = backend.knobs
        self._prompts_per_measurement = prompts_per_measurement
        self.grids: dict[Split, Grid] = {}
        moves = KnobMoves(self.knobs, None, None)
        for replay in self._backends.values():
            replay.check_ranges(moves.ranges)
        self.ranges = dict(moves.ranges)
        self.default = moves.values(moves.defaults())

    @property
    def profiled_on(self) -> str:
        """The hardware that the latency profile is of."""
        hardware = self._profile.hardware
        return f"{hardware.get('name', hardware.get('device', 'unknown'))}, {hardware.get('threads', '?')} thread(s)"

    def measure(self, knobs: Mapping[str, float], number: int, seed: int) -> Measurement:
        """Decode a few training prompts with one setting.

        Which prompts, and all draws, depend on the seed and the number alone, so that every method gets the same. The
        prompts of a seed go through all training prompts before any comes again.

        Args:
            knobs: a value for every knob, in its own units.
            number: of the measurement, from 0.
            seed: fixes the order of the prompts, and the draws.

        Raises:
            KnobError: a knob is missing, unknown or out of range.
        """
        setting = self._checked(knobs)
        arrays = {name: np.array([value]) for name, value in setting.items()}
        texts = [
            self._backends["train"].decode(
                np.array([prompt]), np.zeros(1, np.int64), arrays, np.random.default_rng([seed, number, place])
            )
            for place, prompt in enumerate(self.measured_prompts(number, seed))
        ]
        metrics = Metrics(*(np.sum(values, axis=0) for values in zip(*texts, strict=True)))
        reward = self.objective(arrays, metrics.entries())
        return Measurement(setting, metrics.single().entries(), float(reward[0]))

    def measured_prompts(self, number: int, seed: int) -> list[int]:
        """The training prompts of a measurement, as the recording counts them; arguments as for `measure`."""
        known = self._backends["train"].prompts[0]
        count = self._prompts_per_measurement
        return known[prompts_at(number * count, count, len(known), seed)].tolist()

    def worth(self, knobs: Sequence[Mapping[str, float]], *, split: Split = "test", passes: int = PASSES) -> Worth:
        """Judge settings on all prompts of a split.

        Every setting gets the same draws, so a setting's worth does not depend on which others are asked for.

        Args:
            knobs: settings, each with a value for every knob.
            split: whose prompts.
            passes: how often every prompt is decoded.

        Raises:
            KnobError: a knob is missing, unknown or out of range.
            TuningTaskError: a reward of the split's grid is not positive.
        """
        values, reward = self._judged(knobs, split, passes)
        return Worth(values, reward, self.share_of_best(values, reward, split=split), self._kept(values))

    def share_of_best(self, values: Mapping[str, Floats], reward: Floats, *, split: Split = "test") -> Floats:
        """Share of the best reward of the split's grid; with a bound on the divergence, of the best speedup: at most 1,
        and 0 where the bound is broken.

        Args:
            values: metrics.
            reward: of the same settings and shape.
            split: whose grid.
        """
        best = self.grid(split).best_reward
        if self.reward.max_divergence is None:
            return reward / best
        share: Floats = np.minimum(values["speedup"], best) / best
        return np.where(self._kept(values), share, 0.0)

    def grid(self, split: Split = "test") -> Grid:
        """A dense grid on the prompts of a split, computed once: on training prompts for methods that learn from other
        workloads. Raises as `worth`."""
        if split not in self.grids:
            self.grids[split] = self._new_grid(split)
        return self.grids[split]

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

    def sums(
        self, knobs: Sequence[Mapping[str, float]], *, split: Split = "test", passes: int = PASSES
    ) -> Metrics[Floats]:
        """Sums over decoding every prompt of a split with some settings; arrays of shape (settings, prompts).

        Arguments and errors as for `worth`.
        """
        settings = [self._checked(values) for values in knobs]
        _, draws = self._decoded(settings[:1], split, 1)
        if not draws:
            together, draws = self._decoded(settings, split, 1)
            if not draws:  # all passes are as the first
                return Metrics(*(np.tile(values, (passes, 1, 1)).sum(0) for values in together))
        # One call a setting, for all prompts and passes, so that a setting's draws are the same whichever others are
        # asked for; with draws a larger call is no faster.
        alone = [self._decoded([setting], split, passes)[0] for setting in settings]
        return Metrics(
            *(np.stack([values.reshape(passes, -1).sum(0) for values in rows]) for rows in zip(*alone, strict=True))
        )

    def valued(self, knobs: Sequence[Mapping[str, float]], totals: Metrics[Floats]) -> tuple[dict[str, Floats], Floats]:
        """Metrics and rewards of settings from sums over prompts.

        Args:
            knobs: settings.
            totals: sums over some prompts in several ways, arrays of shape (settings, ways).

        Returns:
            Arrays of shape (settings, ways); of shape (settings,) where there is but one way.
        """
        values = totals.entries()
        columns = {name: np.array([[setting[name]] for setting in knobs]) for name in self.ranges}
        reward = self.objective(columns, values)
        if reward.shape[1] > 1:
            return values, reward
        return {name: value[:, 0] for name, value in values.items()}, reward[:, 0]

    def _decoded(
        self, settings: Sequence[Mapping[str, float]], split: Split, passes: int
    ) -> tuple[Metrics[Floats], bool]:
        """Decode every prompt with some settings, in one call: arrays of shape (settings, passes * prompts).

        Returns:
            What came of it, and whether anything was drawn at random.
        """
        backend = self._backends[split]
        prompts = np.tile(backend.prompts[0], passes)
        shape = (len(settings), len(prompts))
        arrays = {name: np.repeat([setting[name] for setting in settings], len(prompts)) for name in self.ranges}
        rng = np.random.default_rng(0)
        before = rng.bit_generator.state
        every = np.tile(prompts, len(settings))
        metrics = backend.decode(every, np.zeros(len(every), np.int64), arrays, rng)
        drawn = bool(rng.bit_generator.state != before)
        return Metrics(*(values.reshape(shape) for values in metrics)), drawn

    def _new_grid(self, split: Split) -> Grid:
        axes = grid_axes(self.knobs, self.ranges)
        settings, shape = settings_of(axes), tuple(map(len, axes.values()))
        values, reward = self._judged(settings, split, PASSES)
        if self.reward.max_divergence is None and reward.min() <= 0:
            raise TuningTaskError(
                f"{self.name}: a reward of {reward.min():.3g} on the {split} prompts is not positive, so a share of "
                "the best means nothing; take a smaller divergence_weight, or none and max_divergence instead"
            )
        kept = self._kept(values)
        place = int(np.argmax(np.where(kept, reward, -np.inf) if kept.any() else reward))
        return Grid(
            axes,
            reward.reshape(shape),
            {name: value.reshape(shape) for name, value in values.items()},
            settings[place],
            float((reward if kept.any() else values["speedup"])[place]),
        )

    def _kept(self, values: Mapping[str, Floats]) -> Flags:
        bound = np.inf if self.reward.max_divergence is None else self.reward.max_divergence
        kept: Flags = values["divergence"] <= bound
        return kept

    def _judged(
        self, knobs: Sequence[Mapping[str, float]], split: Split, passes: int
    ) -> tuple[dict[str, Floats], Floats]:
        """Metrics and rewards of settings, all arrays of shape (settings,)."""
        sums = self.sums(knobs, split=split, passes=passes)
        return self.valued(knobs, Metrics(*(values.sum(1, keepdims=True) for values in sums)))

    def _checked(self, knobs: Mapping[str, float]) -> dict[str, float]:
        if set(knobs) != set(self.ranges):
            raise KnobError(
                f"{self.name}: a setting has a value for each of {', '.join(self.ranges)}, got "
                f"{', '.join(knobs) or 'none'}"
            )
        for knob, (low, high) in self.ranges.items():
            if not low - _ROUNDING <= knobs[knob] <= high + _ROUNDING:  # so NaN is refused too
                raise KnobError(f"{self.name}: {knob} must be between {low:g} and {high:g}, got {knobs[knob]!r}")
        return {knob: float(knobs[knob]) for knob in self.ranges}


def split_options(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The longest draft, if there is one, and a decoder's other options under a name, as environments take them."""
    others = dict(options)
    longest = {"max_draft_length": others.pop("max_draft_length")} if "max_draft_length" in others else {}
    return {**longest, name: others or None}
