"""Tuning a decoder's knobs: the state is the knobs, an action moves them, a step decodes one prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from rich.text import Text

from ..decoding.decoder import Decoder, Knob, Round
from ..decoding.latency import LatencyProfile, measured
from ..decoding.pairs import Pair
from ..decoding.prompts import Split
from .knobs import build_decoder, checked_values, default_scales, env_ranges
from .measuring import decode_prompts, summarise
from .rendering import print_step, render_step, shows_colour, to_ansi
from .rewards import TERMS, RewardSettings, reward_terms
from .workloads import Workload
from .workloads import workload as named_workload

Array = NDArray[np.float32]
_SHOWN = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
_METRICS = (*_SHOWN, "tokens", "rounds", "drafted", "accepted", "seconds")
_OPTIONS = ("knobs", "prompt")
_RENDER_MODES = ("ansi", "human")


class TuningEnv(gymnasium.Env[Array, Array], EzPickle):
    """Tune the knobs of a speculative decoder on one workload.

    ## Description
    A decoder reads a few numbers, its knobs, while it generates text; which are best depends on the models, the
    prompts and the machine. Here an agent moves the knobs and sees what decoding the next prompt with them was worth.
    The prompts come in an order drawn from the environment's generator, all of them before any comes again.

    ## Action space
    `Box(-1, 1, (knobs,), float32)`: how far to move each knob, in units of its scale. The result is clipped to the
    knob's range. For the threshold decoder (K is the draft length):

    | index | action            | scale at 1 | low | high |
    |-------|-------------------|------------|-----|------|
    | 0     | move of fallback  | 0.2        | -1  | 1    |
    | 1     | move of rollback  | (K - 1)/10 tokens, 1.5 for K = 16 | -1 | 1 |

    ## Observation space
    `Box(low, high, (knobs,), float32)`: the knobs in their own units. For the threshold decoder:

    | index | observation | low  | high | unit                              |
    |-------|-------------|------|------|-----------------------------------|
    | 0     | fallback    | 0.05 | 0.95 | total variation                   |
    | 1     | rollback    | 1    | K    | draft tokens that a rejection takes back |

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

    Time is charged by the pair's latency profile, so that the same tokens always cost the same; with `timing="wall"` by
    the clock. Reading the prompt is not charged.

    `info` has the same keys at every step: `speedup`, `ms_per_token`, `draft_acceptance_rate`,
    `mean_acceptance_length` (tokens a round), `divergence`, `tokens`, `rounds`, `drafted`, `accepted`, `seconds`
    (charged), `workload`, `knobs/<name>` and `reward/<term>`. Sums of the countable ones give the rates over many
    steps.

    ## Starting state
    Knobs drawn uniformly from their ranges, or the decoder's defaults with `start="default"`.
    `reset(options={"knobs": {"fallback": 0.3}})` sets some or all of them, and `options={"prompt": ...}` the prompt of
    the whole episode: an index into the workload's prompts, token ids, or a string.

    ## Episode end
    Never by itself; `gymnasium.make` truncates after 20 steps.

    ## Arguments
    Args:
        decoder: `"threshold"`, `"speculative"`, or anything that makes a decoder with knobs from a pair.
        workload: a name such as `"tiny/prose"` or `"tiny/code@1.0"`, or a `Workload`.
        tokens_per_step: generated each step, at most (an end-of-text token ends a prompt early).
        ranges: (low, high) of knobs by name, in their own units, within what the decoder takes; by default all of
            that, but 0.05 to 0.95 for `fallback`.
        scales: by how much an action of 1 moves each knob, in its own units; by default 0.2 for `fallback`, and a tenth
            of its range for any other.
        reward: a `RewardSettings`, or its arguments as a mapping.
        timing: `"profile"` or `"wall"`. With the clock, steps are neither reproducible nor free of the machine's noise.
        profile: a `LatencyProfile` or a file with one; by default the pair's own on this hardware, measured once.
        start: `"random"` or `"default"`.
        split: `"train"` or `"test"` prompts; by default the workload's own, which is `"train"`.
        render_mode: `"ansi"` returns the last step as coloured text, `"human"` prints every step; there are no
            pictures, so `"rgb_array"` shows nothing.
        backend: `"live"`, the only one so far.
        draft_length: K, in tokens, for a decoder given by name.

    Raises:
        ValueError: an argument is out of range; the message says which. Loading errors as for `load_pair` and
            `load_prompts`.

    ## Version history
    * v0: first version.
    """

    metadata = {"render_modes": list(_RENDER_MODES), "render_fps": 4}  # noqa: RUF012  # gymnasium declares it so

    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder] = "threshold",
        workload: str | Workload = "tiny/prose",
        tokens_per_step: int = 32,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        timing: Literal["profile", "wall"] = "profile",
        profile: LatencyProfile | str | Path | None = None,
        start: Literal["random", "default"] = "random",
        split: Split | None = None,
        render_mode: Literal["ansi", "human", "rgb_array"] | None = None,
        backend: Literal["live"] = "live",
        draft_length: int = 16,
    ) -> None:
        EzPickle.__init__(
            self,
            decoder,
            workload,
            tokens_per_step,
            ranges,
            scales,
            reward,
            timing,
            profile,
            start,
            split,
            render_mode,
            backend,
            draft_length,
        )
        if backend != "live":
            raise ValueError(f"backend must be 'live' (it runs the models; there is no other so far), got {backend!r}")
        _one_of("timing", timing, ("profile", "wall"))
        _one_of("start", start, ("random", "default"))
        if render_mode == "rgb_array":  # Stable-Baselines3's make_vec_env asks it of every environment
            render_mode = None
        _one_of("render_mode", render_mode, (None, *_RENDER_MODES))
        if split is not None:
            _one_of("split", split, ("train", "test"))
        if tokens_per_step < 1 or int(tokens_per_step) != tokens_per_step:
            raise ValueError(f"tokens_per_step must be a whole number of at least 1, got {tokens_per_step}")
        self.render_mode = render_mode
        self._workload = named_workload(workload)
        if split is not None:
            self._workload = self._workload.with_split(split)
        self._settings = reward if isinstance(reward, RewardSettings) else RewardSettings(**(reward or {}))
        self._tokens = int(tokens_per_step)
        self._timing = timing
        self._start = start
        pair = self._workload.load()
        self._decoder = build_decoder(decoder, pair, draft_length)
        self._ranges = env_ranges(self._decoder.knobs, ranges)
        self._scales = default_scales(self._ranges, scales)
        self._prompts = self._workload.prompt_ids()
        if isinstance(profile, str | Path):
            profile = LatencyProfile.load(profile)
        self._profile = profile or measured(pair, sampling=self._workload.sampling)

        self._low = np.array([low for low, _ in self._ranges.values()])
        self._high = np.array([high for _, high in self._ranges.values()])
        self._step_size = np.array([self._scales[name] for name in self._ranges])
        self.observation_space = spaces.Box(self._low.astype(np.float32), self._high.astype(np.float32))
        self.action_space = spaces.Box(-1.0, 1.0, (len(self._ranges),), np.float32)

        self._state = self._clipped(np.array([knob.default for knob in self.knobs]))
        self._queue: list[int] = []
        self._fixed_prompt: tuple[int, ...] | None = None
        self._last_prompt: Sequence[int] = ()
        self._last_rounds: list[Round] = []
        self._last_info: dict[str, Any] = {}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What is tuned, in the order of observations and actions."""
        return self._decoder.knobs

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Between what a knob moves here, by name, in its own units."""
        return dict(self._ranges)

    @property
    def scales(self) -> dict[str, float]:
        """By how much an action of 1 moves a knob, by name, in its own units."""
        return dict(self._scales)

    @property
    def workload(self) -> Workload:
        """The pair, prompts and sampling that the knobs are tuned for; its split is the one in use."""
        return self._workload

    @property
    def decoder(self) -> Decoder:
        """The decoder at work."""
        return self._decoder

    @property
    def profile(self) -> LatencyProfile:
        """What time is charged by."""
        return self._profile

    @property
    def reward_settings(self) -> RewardSettings:
        """Weights and ranges of the reward."""
        return self._settings

    def knob_values(self) -> dict[str, float]:
        """The knobs as the decoder gets them, by name, in their own units."""
        return {
            knob.name: float(round(value) if knob.integer else value)
            for knob, value in zip(self.knobs, self._state.tolist(), strict=True)
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: fixes the knobs to start from, the order of the prompts and all sampling.
            options: `knobs`, a mapping from names to values, and `prompt`, an index, token ids or a string.

        Raises:
            ValueError: an unknown option, a knob that does not exist or is out of range, a prompt that cannot be used.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset option {unknown[0]!r}; there are: {', '.join(_OPTIONS)}")
        given = checked_values(options.get("knobs") or {}, self._ranges)
        self._fixed_prompt = None if options.get("prompt") is None else self._chosen_prompt(options["prompt"])
        if seed is not None:
            self._queue = []
        if self._start == "random":
            drawn = self.np_random.uniform(self._low, self._high)
        else:
            drawn = np.array([knob.default for knob in self.knobs])
        state = dict(zip(self._ranges, drawn.tolist(), strict=True)) | given
        self._state = self._clipped(np.array([state[name] for name in self._ranges]))
        self._last_rounds, self._last_info = [], {}
        if self.render_mode == "human":
            self._print()
        return self._observation(), {"workload": self._workload.name, **self._knob_info()}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the knobs, and decode the next prompt with them.

        Args:
            action: shape (knobs,), in [-1, 1]; what is beyond is clipped.

        Returns:
            Observation, reward, False, False (an episode never ends by itself), info.

        Raises:
            ValueError: the action has another shape, or is not finite.
            NumericalError: the target gave NaN logits.
        """
        self._state = self._clipped(self._state + self._checked_action(action) * self._step_size)
        values = self.knob_values()
        prompt = self._next_prompt()
        seed = int(self.np_random.integers(2**31))
        generations = decode_prompts(self._decoder, values, [prompt], self._tokens, self._workload.sampling, seed)
        metrics = summarise(self._decoder, generations, self._profile)
        if self._timing == "wall":
            metrics |= _by_the_clock(metrics, self._profile)
        terms = reward_terms(
            self._settings,
            speedup=metrics["speedup"],
            acceptance_rate=metrics["draft_acceptance_rate"],
            divergence=metrics["divergence"],
            knobs=self.knobs,
            values=values,
        )
        info: dict[str, Any] = {name: float(metrics[name]) for name in _METRICS}
        info |= {"workload": self._workload.name, **self._knob_info()}
        info |= {f"reward/{term}": float(terms[term]) for term in TERMS}
        self._last_prompt, self._last_rounds, self._last_info = prompt, generations[0].rounds, info
        if self.render_mode == "human":
            self._print()
        return self._observation(), float(sum(terms.values())), False, False, dict(info)

    def render(self) -> str | None:
        """The last step as text with ANSI colours; None in human mode, which has printed it already."""
        return to_ansi(self._text()) if self.render_mode == "ansi" else None

    def _text(self, marks: bool = False) -> Text:
        return render_step(
            self._decoder.pair,
            self._last_prompt,
            self._last_rounds,
            title=self._workload.name,
            knobs=self.knob_values(),
            metrics={name: self._last_info[name] for name in _SHOWN} if self._last_info else {},
            marks=marks,
        )

    def _print(self) -> None:
        print_step(self._text(marks=not shows_colour()))

    def _observation(self) -> Array:
        return self._state.astype(np.float32)

    def _knob_info(self) -> dict[str, float]:
        return {f"knobs/{name}": value for name, value in self.knob_values().items()}

    def _clipped(self, state: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(state, self._low, self._high)

    def _checked_action(self, action: Array) -> NDArray[np.float64]:
        moves = np.asarray(action, dtype=np.float64)
        if moves.shape != self.action_space.shape:
            raise ValueError(f"an action has shape {self.action_space.shape}, one number a knob, got {moves.shape}")
        for name, move in zip(self._ranges, moves.tolist(), strict=True):
            if not np.isfinite(move):
                raise ValueError(f"the action for knob {name} is {move}; actions must be finite numbers in [-1, 1]")
        return np.clip(moves, -1.0, 1.0)

    def _next_prompt(self) -> Sequence[int]:
        if self._fixed_prompt is not None:
            return self._fixed_prompt
        if not self._queue:
            self._queue = self.np_random.permutation(len(self._prompts)).tolist()
        return self._prompts[self._queue.pop(0)]

    def _chosen_prompt(self, prompt: int | str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, int | np.integer):
            if not 0 <= prompt < len(self._prompts):
                raise ValueError(
                    f"reset option prompt={prompt}: {self._workload} has {self._workload.split} prompts 0 to "
                    f"{len(self._prompts) - 1}"
                )
            return self._prompts[prompt]
        try:
            return tuple(self._decoder.check_prompt(prompt))
        except (TypeError, ValueError) as error:
            raise ValueError(f"reset option prompt (an index, token ids or a string): {error}") from error


def _one_of(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _by_the_clock(metrics: Mapping[str, float], profile: LatencyProfile) -> dict[str, float]:
    """Charged time replaced by the clock's; plain decoding is not run beside, its time stays the profile's."""
    return {
        "ms_per_token": metrics["wall_ms_per_token"],
        "seconds": metrics["wall_seconds"],
        "speedup": 1000 * profile.autoregressive_seconds / metrics["wall_ms_per_token"],
    }
