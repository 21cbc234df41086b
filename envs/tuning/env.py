"""Tuning a decoder's knobs: the state is the knobs, an action moves them, a step decodes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from rich.text import Text

from specgym.decoding import Decoder, LatencyProfile, Pair, Split

from ..arguments import one_of, whole_number
from ..backends.sources import LiveSource, ReplaySource, Source
from ..recordings.shipped_outcomes import Recording
from ..workloads import Workload
from .knob_space import ACTION_KINDS, ActionKind, KnobMoves, prompt_orders
from .knobs import checked_values
from .render import print_step, shows_colour, to_ansi
from .reward import TERMS, RewardSettings, checked_multiplier, reward_terms
from .tuned_knobs import TunedKnobs

Array = NDArray[np.float32]
SHOWN = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
METRICS = (*SHOWN, "tokens", "rounds", "drafted", "accepted", "seconds")
_OPTIONS = ("knobs", "prompt")
_RENDER_MODES = ("ansi", "human")


class TuningEnv(TunedKnobs, gymnasium.Env[Array, Array], EzPickle):
    """Tune the knobs of a speculative decoder on one workload.

    ## Description
    A decoder reads a few numbers, its knobs, while it generates text; which are best depends on the models, the
    prompts and the machine. Here an agent moves the knobs and sees what decoding the next prompt with them was worth,
    or the next several (`prompts_per_step`). The prompts come in an order drawn from the environment's generator, all
    of them before any comes again.

    ## Action space
    `Box(-1, 1, (knobs,), float32)`: how far to move each knob, in units of its scale. The result is clipped to the
    knob's range. A logarithmic knob moves in doublings: a move of 1 doubles 1 + its distance from its low end. For the
    threshold decoder (K is the draft length):

    | index | action            | scale at 1 | low | high |
    |-------|-------------------|------------|-----|------|
    | 0     | move of fallback  | 0.2        | -1  | 1    |
    | 1     | move of rollback  | (K - 1)/10 tokens, 1.5 for K = 16 | -1 | 1 |

    and for the speculative decoder one, the move of `draft_length` by (K - 1)/10 tokens. docs/lookahead.md,
    docs/medusa.md and docs/draft-tree.md have the tables of those decoders; `knobs`, `ranges` and `scales` tell them of
    any.

    ## Observation space
    `Box(low, high, (knobs,), float32)`: the knobs in their own units. For the threshold decoder:

    | index | observation | low  | high | unit                              |
    |-------|-------------|------|------|-----------------------------------|
    | 0     | fallback    | 0.05 | 0.95 | total variation                   |
    | 1     | rollback    | 1    | K    | draft tokens that a rejection takes back |

    and for the speculative decoder one, `draft_length`, from 1 to K tokens.

    A whole-number knob is a real number here, so that small actions add up; the decoder gets the nearest whole number,
    which is what `info` shows.

    ## Rewards
    The sum of four weighted terms (`RewardSettings` has the weights and ranges), each also in `info`:

    | term       | before its weight                                        | range  | weight |
    |------------|----------------------------------------------------------|--------|--------|
    | speed      | the target's autoregressive ms/token over the decoder's  | > 0    | 1      |
    | acceptance | accepted draft tokens over drafted ones                  | 0 to 1 | 0.5    |
    | range      | 1 for knobs in their preferred range, falling off outside | 0 to 1 | 4      |
    | divergence | minus the mean total variation from the target per token | -1 to 0 | 0     |

    A knob without a preferred range earns nothing by the range term. By default only the thresholds have one, so for
    other decoders the term is 0. A lossless decoder's divergence is 0, too: it is paid for speed, and for acceptance.

    With `RewardSettings(max_divergence=0.05)` the aim is the fastest setting whose mean divergence stays below 0.05:
    acceptance and range weigh nothing, whatever their weights, and the divergence term is minus
    `divergence_multiplier` times the excess over the bound (at most 0). The multiplier starts at 1; whoever learns
    raises it while the bound is broken (`set_divergence_multiplier`).

    Time is charged by the pair's latency profile, so that the same tokens always cost the same; with `timing="wall"` by
    the clock. Reading the prompt is not charged.

    `info` has the same keys at every step: `speedup`, `ms_per_token`, `draft_acceptance_rate`,
    `mean_acceptance_length` (tokens a round), `divergence`, `tokens`, `rounds`, `drafted`, `accepted`, `seconds`
    (charged), `workload`, `knobs/<name>` and `reward/<term>`. Sums of the countable ones give the rates over many
    steps.

    ## Starting state
    Knobs drawn uniformly from their ranges (logarithmic ones in doublings), or the decoder's defaults with
    `start="default"`.
    `reset(options={"knobs": {"fallback": 0.3}})` sets some or all of them, and `options={"prompt": ...}` the prompt of
    the whole episode: an index into the workload's prompts, token ids, or a string.

    ## Episode end
    Never by itself; `gymnasium.make` truncates after 20 steps.

    ## Arguments
    Args:
        decoder: `"threshold"`, `"speculative"`, `"lookahead"`, `"medusa"`, `"medusa-typical"`, `"draft-tree"` (its
            draft must be a model), or anything that makes a decoder with knobs from a pair. Medusa's heads are those in
            the folder `<target>-medusa` beside the target's own, or those that ship for it; the typical one strays from
            the target when sampling, as thresholds do.
        workload: a name such as `"tiny/prose"` or `"tiny/code@1.0"`, or a `Workload`; by default that of the recording
            given, or `"tiny/prose"`, and `"tiny-10m/prose"`, a target without a draft, for decoders that need none.
        tokens_per_step: generated each step, at most (an end-of-text token ends a prompt early).
        ranges: (low, high) of knobs by name, in their own units, within what the decoder takes; by default all of
            that, but 0.05 to 0.95 for `fallback`.
        scales: by how much an action of 1 moves each knob, in its own units, or in doublings; by default 0.2 for
            `fallback`, and a tenth of its range for any other.
        reward: a `RewardSettings`, or its arguments as a mapping.
        timing: `"profile"` or `"wall"`. With the clock, steps are neither reproducible nor free of the machine's noise.
        profile: a `LatencyProfile` or a file with one; by default the pair's own on this hardware, measured once, and
            for a replay the pair's reference profile (`specgym.envs.profiles`).
        start: `"random"` or `"default"`.
        split: `"train"` or `"test"` prompts; by default the workload's own, which is `"train"`.
        render_mode: `"ansi"` returns the last step as coloured text, `"human"` prints every step; there are no
            pictures, so `"rgb_array"` shows nothing.
        backend: `"live"` runs the models. `"replay"` looks up a recording, in microseconds: the decoders given by name,
            the prompts recorded (those with detours, for thresholds, if there are any), no clock, and no text when
            rendering. Thresholds and exact speculative decoding are replayed from a trace of the draft
            (`specgym.envs.backends.trace_replay` says how true that is), other decoders from their recorded outcomes
            (`specgym.envs.backends.outcome_replay` does).
        draft_length: K, in tokens, for a decoder given by name that drafts chains. A replay of thresholds needs the K
            that was recorded; exact decoding takes any up to that.
        recording: what to replay, a `Trace`, `Outcomes` of the decoder, or a file of either; by default the one that
            ships for the workload and split.
        batch_size: sequences that are decoded together, all as this one, as far as the profile's time goes.
        context: tokens of each that were read before, likewise; by default the profile's own.
        prompts_per_step: decoded each step, at least 1, all with the same knobs. Metrics are of all together: rates are
            ratios of sums, so that a long text counts for more. More prompts make a step dearer and its reward surer.
        action: `"move"` as above, or `"place"`: an action says where to put each knob, -1 for the low end of its range
            and 1 for the high end (0 is the middle, of a logarithmic knob in doublings), and `scales` play no part.

    Raises:
        ValueError: an argument is out of range; the message says which.
        TraceError: there is no such recording, or it does not hold what is asked for, also of the knobs' ranges; the
            message says how to make one.
        LatencyProfileError: the profile does not cover the batch size and context. Loading errors as for `load_pair`
            and `load_prompts`.

    ## Version history
    * v0: first version.
    """

    metadata = {"render_modes": list(_RENDER_MODES), "render_fps": 4}  # noqa: RUF012  # gymnasium declares it so

    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder] = "threshold",
        workload: str | Workload | None = None,
        tokens_per_step: int = 32,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        timing: Literal["profile", "wall"] = "profile",
        profile: LatencyProfile | str | Path | None = None,
        start: Literal["random", "default"] = "random",
        split: Split | None = None,
        render_mode: Literal["ansi", "human", "rgb_array"] | None = None,
        backend: Literal["live", "replay"] = "live",
        draft_length: int = 16,
        recording: Recording | str | Path | None = None,
        batch_size: int = 1,
        context: int | None = None,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
    ) -> None:
        EzPickle.__init__(
            self, decoder, workload, tokens_per_step, ranges, scales, reward, timing, profile, start, split,
            render_mode, backend, draft_length, recording, batch_size, context, prompts_per_step, action,
        )  # fmt: skip
        one_of("action", action, ACTION_KINDS)
        one_of("backend", backend, ("live", "replay"))
        one_of("timing", timing, ("profile", "wall"))
        one_of("start", start, ("random", "default"))
        if render_mode == "rgb_array":  # Stable-Baselines3's make_vec_env asks it of every environment
            render_mode = None
        one_of("render_mode", render_mode, (None, *_RENDER_MODES))
        if split is not None:
            one_of("split", split, ("train", "test"))
        tokens = whole_number("tokens_per_step", tokens_per_step)
        self._prompts_per_step = whole_number("prompts_per_step", prompts_per_step)
        self.render_mode = render_mode
        self._settings = reward if isinstance(reward, RewardSettings) else RewardSettings(**(reward or {}))
        self._start = start
        point = (profile, batch_size, context)
        self._source: Source
        if backend == "live":
            if recording is not None:
                raise ValueError("a recording is for backend='replay'; backend='live' runs the models")
            wall = timing == "wall"
            self._source = LiveSource(decoder, workload, split, tokens, draft_length, *point, wall=wall)
        else:
            if timing == "wall":
                raise ValueError("timing='wall' needs backend='live'; a replay decodes nothing that a clock could time")
            self._source = ReplaySource(decoder, workload, split, recording, tokens, draft_length, *point)
        self._moves = KnobMoves(self._source.knobs, ranges, scales, action)
        self._source.check_ranges(self._moves.ranges)
        self.observation_space = self._moves.observation_space
        self.action_space = self._moves.action_space
        self._state = self._moves.defaults()
        self._queue: list[int] = []
        self._fixed_prompt: Any = None
        self._divergence_multiplier = 1.0
        self._last_info: dict[str, Any] = {}

    @property
    def workload(self) -> Workload:
        """The pair, prompts and sampling that the knobs are tuned for; its split is the one in use."""
        return self._source.workload

    @property
    def decoder(self) -> Decoder:
        """The decoder at work.

        Raises:
            AttributeError: there is none, in a replay.
        """
        if not isinstance(self._source, LiveSource):
            raise AttributeError("a replayed environment has no decoder, only its knobs; backend='live' has one")
        return self._source.decoder

    @property
    def profile(self) -> LatencyProfile:
        """What time is charged by, at the operating point."""
        return self._source.profile

    @property
    def divergence_multiplier(self) -> float:
        """What an excess over `RewardSettings.max_divergence` costs; at first 1. Without a bound it does nothing."""
        return self._divergence_multiplier

    def set_divergence_multiplier(self, value: float) -> None:
        """Let an excess over the bound cost this much from the next step on.

        Args:
            value: reward per unit of mean total variation, finite and at least 0.

        Raises:
            ValueError: it is not.
        """
        self._divergence_multiplier = checked_multiplier(self.workload.name, value)

    def knob_values(self) -> dict[str, float]:
        """The knobs as the decoder gets them, by name, in their own units."""
        return self._moves.values(self._state)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: fixes the knobs to start from, the order of the prompts and all sampling.
            options: `knobs`, a mapping from names to values, and `prompt`, an index; live also token ids or a string.

        Raises:
            ValueError: an unknown option, a knob that does not exist or is out of range, a prompt that cannot be used.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset option {unknown[0]!r}; there are: {', '.join(_OPTIONS)}")
        given = checked_values(options.get("knobs") or {}, self._moves.ranges)
        prompt = options.get("prompt")
        self._fixed_prompt = None if prompt is None else self._source.chosen(prompt)
        if seed is not None:
            self._queue = []
        self._state = self._moves.drawn(self.np_random) if self._start == "random" else self._moves.defaults()
        for place, name in enumerate(self._moves.ranges):
            self._state[place] = given.get(name, self._state[place])
        self._last_info = {}
        self._source.forget()
        if self.render_mode == "human":
            self._print()
        return self._observation(), {"workload": self.workload.name, **self._knob_info(self.knob_values())}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the knobs, and decode the next prompt or prompts with them.

        Args:
            action: shape (knobs,), in [-1, 1]; what is beyond is clipped.

        Returns:
            Observation, reward, False, False (an episode never ends by itself), info.

        Raises:
            ValueError: the action has another shape, or is not finite.
            NumericalError: the target gave NaN logits.
        """
        self._state = self._moves.moved(self._state, action)
        values = self.knob_values()
        found = self._source.decode(values, self._next_prompts(), self.np_random)
        terms = reward_terms(
            self._settings,
            speedup=found["speedup"],
            acceptance_rate=found["draft_acceptance_rate"],
            divergence=found["divergence"],
            knobs=self.knobs,
            values=values,
            multiplier=self._divergence_multiplier,
        )
        info: dict[str, Any] = {name: found[name] for name in METRICS}
        info["workload"] = self.workload.name
        info |= self._knob_info(values)
        info |= {f"reward/{term}": terms[term] for term in TERMS}
        self._last_info = info
        if self.render_mode == "human":
            self._print()
        return self._observation(), sum(terms.values()), False, False, dict(info)

    def render(self) -> str | None:
        """The last step as text with ANSI colours; None in human mode, which has printed it already."""
        return to_ansi(self._text()) if self.render_mode == "ansi" else None

    def _text(self, marks: bool = False) -> Text:
        shown = {name: self._last_info[name] for name in SHOWN} if self._last_info else {}
        return self._source.render(self.knob_values(), shown, marks)

    def _print(self) -> None:
        print_step(self._text(marks=not shows_colour()))

    def _observation(self) -> Array:
        return self._state.astype(np.float32)

    def _knob_info(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"knobs/{name}": value for name, value in values.items()}

    def _next_prompts(self) -> list[Any]:
        if self._fixed_prompt is not None:
            return [self._fixed_prompt] * self._prompts_per_step
        chosen = []
        for _ in range(self._prompts_per_step):
            if not self._queue:
                self._queue = prompt_orders(self.np_random, 1, len(self._source.prompts))[0].tolist()
            chosen.append(self._source.prompts[self._queue.pop(0)])
        return chosen
