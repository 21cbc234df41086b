"""Environment that tunes a decoder's knobs: the state is the knobs, an action moves them, a step decodes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from specgym.decoding import ArgumentError, LatencyProfile, Split, one_of, whole_number

from ..backends.backend import Backend, BackendName, backend_of
from ..backends.replay import replay_backend, require_single
from ..recordings.find import Recording
from ..workloads import Workload, constructor, reset_options
from .knob_space import OPTIONS, ActionKind, KnobTuning, Start
from .reward import MULTIPLIER, RewardSettings, checked_multiplier

if TYPE_CHECKING:
    from rich.text import Text

    from specgym.decoding import Decoder, Pair

Array = NDArray[np.float32]
SHOWN = ("speedup", "ms_per_token", "draft_acceptance_rate", "mean_acceptance_length", "divergence")
"""Entries of `info` that rendering shows."""
_RENDER_MODES = ("ansi", "human")


class BackendEnv(KnobTuning, gymnasium.Env[Array, Array], EzPickle):
    """Tuning of the knobs of one workload on any backend; a subclass opens the backend."""

    metadata = {"render_modes": list(_RENDER_MODES), "render_fps": 4}  # noqa: RUF012  # gymnasium declares it so

    def _check_render_mode(self, render_mode: str | None) -> None:
        # Stable-Baselines3's make_vec_env asks pictures of every environment.
        self.render_mode = None if render_mode == "rgb_array" else render_mode
        one_of("render_mode", self.render_mode, (None, *_RENDER_MODES))

    def _set_up_single(
        self,
        backend: Backend,
        ranges: Mapping[str, tuple[float, float]] | None,
        scales: Mapping[str, float] | None,
        action: ActionKind,
        reward: RewardSettings | Mapping[str, Any] | None,
    ) -> None:
        """Keep the backend, and what follows from it; arguments as for `TuningEnv`."""
        self._set_up(backend, ranges, scales, action, reward, np.zeros(1, np.int64))
        self.observation_space = self._moves.observation_space
        self.action_space = self._moves.action_space
        self._state = self._moves.defaults()
        self._fixed_prompts: NDArray[np.int64] | None = None
        self._divergence_multiplier = MULTIPLIER
        self._last_info: dict[str, Any] = {}

    @property
    def workload(self) -> Workload:
        """Pair, prompts and sampling that the knobs are tuned for; its split is the one in use."""
        return self.workloads[0]

    @property
    def divergence_multiplier(self) -> float:
        """Price of an excess over `RewardSettings.max_divergence`; at first 30. Without a bound it does nothing."""
        return self._divergence_multiplier

    def set_divergence_multiplier(self, value: float) -> None:
        """Set the price of an excess over the bound, from the next step on.

        Args:
            value: reward per unit of mean total variation, finite and at least 0.

        Raises:
            ValueError: it is not.
        """
        self._divergence_multiplier = checked_multiplier(self.workload.name, value)

    def knob_values(self) -> dict[str, float]:
        """Return the knobs as the decoder gets them, by name, in their own units."""
        return self._values(self._state)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: fixes the knobs to start from, the order of the prompts and all sampling.
            options: `knobs`, a mapping from names to values, and `prompt`, an index; live also token ids or a string.

        Raises:
            ValueError: an unknown option, a knob that does not exist or is out of range, a prompt that cannot be used.
        """
        super().reset(seed=seed)
        options = reset_options(options, OPTIONS)
        chosen = self._moves.checked(options.get("knobs") or {})
        prompt = options.get("prompt")
        self._fixed_prompts = None if prompt is None else np.array([self._backend.choose(prompt)])
        if seed is not None:
            self._orders.restart()
        self._state = self._first_states()
        for place, name in enumerate(self._moves.ranges):
            self._state[place] = chosen.get(name, self._state[place])
        self._last_info = {}
        if self.render_mode == "human":
            self._print()
        self._began = True
        return self._observation(), self._unmeasured(self.knob_values(), self.workload.name)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move the knobs, and decode the next prompt or prompts with them.

        Args:
            action: shape (knobs,), in [-1, 1]; what is beyond is clipped.

        Returns:
            Observation, reward, False, False (an episode never ends by itself), info.

        Raises:
            ValueError: the action has another shape, or is not finite.
            gymnasium.error.ResetNeeded: before the first `reset`.
            NumericalError: the target gave NaN logits.
        """
        self._require_reset()
        self._state = self._moves.moved(self._state, action)
        values = self.knob_values()
        arrays = {name: np.array([value]) for name, value in values.items()}
        metrics = self._decode(arrays, self._fixed_prompts).single()
        reward, info = self._judge(metrics, values, self._divergence_multiplier, self.workload.name)
        self._last_info = info
        if self.render_mode == "human":
            self._print()
        return self._observation(), reward, False, False, dict(info)

    def render(self) -> str | None:
        """Return the last step as text with ANSI colours; None in human mode, which has printed it already."""
        from .render import to_ansi  # which imports rich

        return to_ansi(self._text()) if self.render_mode == "ansi" else None

    def _text(self, marks: bool = False) -> Text:
        from .render import render_step

        shown = {name: self._last_info[name] for name in SHOWN} if self._last_info else {}
        prompt, rounds = self._backend.last_text() if shown else ((), [])
        pair = None if self._backend.decoder is None else self._backend.decoder.pair
        title = self.workload.name
        return render_step(pair, prompt, rounds, title=title, knobs=self.knob_values(), metrics=shown, marks=marks)

    def _print(self) -> None:
        from .render import print_step, shows_colour

        print_step(self._text(marks=not shows_colour()))

    def _observation(self) -> Array:
        return self._state.astype(np.float32)


class TuningEnv(BackendEnv):
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

    and for the speculative decoder the moves of `draft_length` by K/10 tokens and of `stop_threshold` by 0.1. The docs
    page of a decoder has its table; `knobs`, `ranges` and `scales` have the numbers of any.

    ## Observation space
    `Box(low, high, (knobs,), float32)`: the knobs in their own units. For the threshold decoder:

    | index | observation | low  | high | unit                              |
    |-------|-------------|------|------|-----------------------------------|
    | 0     | fallback    | 0    | 1    | total variation                   |
    | 1     | rollback    | 1    | K    | draft tokens that a rejection takes back |

    and for the speculative decoder `draft_length`, from 0 to K tokens, and `stop_threshold`, from 0 to 1; with
    `decoder_options={"stop": ...}` other knobs (docs/draft-length.md).

    A whole-number knob is a real number here, so that small actions add up; the decoder gets the nearest whole number,
    which is what `info` shows.

    ## Rewards
    The sum of four weighted terms (`RewardSettings` has the weights and ranges), each also in `info`:

    | term       | before its weight                                        | range  | weight |
    |------------|----------------------------------------------------------|--------|--------|
    | speed      | the target's autoregressive ms/token over the decoder's  | > 0    | 1      |
    | acceptance | accepted draft tokens over drafted ones                  | 0 to 1 | 0.1    |
    | range      | 1 for knobs in their preferred range, falling off outside | 0 to 1 | 0.05   |
    | divergence | minus the excess of the mean total variation from the target per token over 0.05 | -1 to 0 | 30 |

    A knob without a preferred range earns nothing by the range term. By default only the thresholds have one, so for
    other decoders the term is 0. A lossless decoder's divergence is 0, too: it is paid for speed, and for acceptance.

    The weight of the divergence term is `divergence_multiplier`; whoever learns may raise it while the bound is broken
    (`set_divergence_multiplier`). `reward={"max_divergence": 0.1}` sets another bound, None none at all.

    Time is charged by the pair's latency profile, so that the same tokens always cost the same; with `timing="wall"` by
    the clock. Reading the prompt is not charged.

    `info` has the same keys at every step and after `reset`, when nothing is measured and the numbers are 0: `speedup`,
    `ms_per_token`, `draft_acceptance_rate`, `mean_acceptance_length` (tokens a round), `divergence`, `tokens`,
    `rounds`, `drafted`, `accepted`, `seconds` (charged), `workload`, `knobs/<name>` and `reward/<term>`. Sums of the
    countable ones give the rates over many steps.

    ## Starting state
    Knobs drawn uniformly from their ranges (logarithmic ones in doublings), or the decoder's defaults with
    `start="default"`.
    `reset(options={"knobs": {"fallback": 0.3}})` sets some or all of them, and `options={"prompt": ...}` the prompt of
    the whole episode: an index into the workload's prompts, token ids, or a string.

    ## Episode end
    Never by itself; `gymnasium.make` truncates after 20 steps.

    ## Arguments
    Args:
        decoder: a registered name (`specgym.decoding.decoder_names` lists them), or anything that makes a decoder with
            knobs from a pair.
        workload: a name such as `"tiny/prose"` or `"tiny/code@1.0"`, or a `Workload`; by default that of the recording,
            or the first of the decoder's own.
        max_new_tokens: tokens generated of each prompt each step, at most (an end-of-text token ends a text early).
        ranges: (low, high) of knobs by name, in their own units, within what the decoder takes; by default the knobs'
            search ranges.
        scales: change that an action of 1 makes to each knob, in its own units, or in doublings; by default the knob's
            step, or a tenth of its range.
        reward: a `RewardSettings`, or those of its arguments that differ from the defaults above as a mapping.
        timing: `"profile"` or `"wall"`. With the clock, steps are neither reproducible nor free of the machine's noise.
        profile: a `LatencyProfile` or a file with one; by default the pair's own on this hardware, measured once, and
            for a replay the pair's reference profile (`specgym.envs.profiles`).
        start: `"random"` or `"default"`.
        split: `"train"` or `"test"` prompts; by default the workload's own, which is `"train"`.
        render_mode: `"ansi"` returns the last step as coloured text, `"human"` prints every step; there are no
            pictures, so `"rgb_array"` shows nothing.
        backend: `"live"`, the default, runs the models. `"replay"` looks up a recording, in microseconds: decoders
            given by name, recorded prompts, no clock, and no text when rendering. Some decoders are replayed from a
            trace of the draft (`specgym.envs.backends.trace_replay` says how true that is), others from their recorded
            outcomes (`specgym.envs.backends.outcome_replay` does).
        max_draft_length: longest draft (K), in tokens, of a decoder given by name that drafts chains. A replay of a
            lossy decoder needs the K that was recorded; exact decoding takes any up to that.
        recording: a `Trace`, `Outcomes` of the decoder, or a file of either, to replay; by default the recording that
            ships for the workload and split.
        batch_size: sequences that are decoded together, all as this one, as far as the profile's time goes.
        context: tokens of each that were read before, likewise; by default the profile's own.
        prompts_per_step: prompts decoded each step, at least 1, all with the same knobs. Metrics are of all together:
            rates are ratios of sums, so that a long text counts for more. More prompts make a step slower and its
            reward surer.
        action: `"move"` as above, or `"place"`: an action says where to put each knob, -1 for the low end of its range
            and 1 for the high end (0 is the middle, of a logarithmic knob in doublings), and `scales` play no part.
        decoder_options: further build options of a decoder given by name, as its `Options` describe them.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.

    Raises:
        ValueError: an argument is out of range; the message says which.
        TraceError: there is no such recording, or it does not hold what is asked for, also of the knobs' ranges; the
            message says how to make one.
        LatencyProfileError: the profile does not cover the batch size and context. Loading errors as for `load_pair`
            and `load_prompts`.

    ## Version history
    * v0: first version.
    """

    @constructor(tokens_per_step="max_new_tokens", draft_length="max_draft_length")
    def __init__(
        self,
        decoder: str | Callable[[Pair], Decoder[Any]] = "threshold",
        workload: str | Workload | None = None,
        max_new_tokens: int = 32,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        scales: Mapping[str, float] | None = None,
        reward: RewardSettings | Mapping[str, Any] | None = None,
        timing: Literal["profile", "wall"] = "profile",
        profile: LatencyProfile | str | Path | None = None,
        start: Start = "random",
        split: Split | None = None,
        render_mode: Literal["ansi", "human", "rgb_array"] | None = None,
        backend: BackendName | None = None,
        max_draft_length: int = 16,
        recording: Recording | str | Path | None = None,
        batch_size: int = 1,
        context: int | None = None,
        prompts_per_step: int = 1,
        action: ActionKind = "move",
        decoder_options: Mapping[str, Any] | None = None,
        source: BackendName | None = None,
    ) -> None:
        self._check(start, action, split, prompts_per_step)
        backend = backend_of(backend, source, "live")
        require_single(type(self).__name__, workload=workload, recording=recording)
        one_of("timing", timing, ("profile", "wall"))
        self._check_render_mode(render_mode)
        tokens = whole_number("max_new_tokens", max_new_tokens)
        max_draft_length = whole_number("max_draft_length", max_draft_length)
        decoding: Backend
        if backend == "live":
            if recording is not None:
                raise ArgumentError("a recording is for backend='replay'; backend='live' runs the models")
            from ..backends.live import LiveBackend  # which imports torch; a replay needs none

            decoding = LiveBackend(
                decoder,
                workload,
                split,
                tokens,
                decoder_options,
                max_draft_length,
                profile,
                batch_size,
                context,
                wall=timing == "wall",
            )
        else:
            if timing == "wall":
                raise ArgumentError(
                    "timing='wall' needs backend='live'; a replay decodes nothing that a clock could time"
                )
            decoding = replay_backend(
                decoder,
                workload,
                recording,
                split=split,
                profile=profile,
                max_new_tokens=tokens,
                max_draft_length=max_draft_length,
                options=decoder_options,
                batch_size=batch_size,
                context=context,
            )
        self._set_up_single(decoding, ranges, scales, action, reward)

    @property
    def decoder(self) -> Decoder[Any]:
        """Decoder at work.

        Raises:
            AttributeError: there is none, in a replay.
        """
        if self._backend.decoder is None:
            raise AttributeError("a replayed environment has no decoder, only its knobs; backend='live' has one")
        return self._backend.decoder

    @property
    def profile(self) -> LatencyProfile:
        """Latency profile that charges time, at the operating point."""
        return self.profiles[0]

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Let live steps inside decode nothing, and otherwise do all that later steps depend on.

        With the seed and the actions of another environment this one comes to where that is, at once. What these steps
        return means nothing.
        """
        from ..backends.live import LiveBackend

        with self._backend.rehearsing() if isinstance(self._backend, LiveBackend) else nullcontext():
            yield
