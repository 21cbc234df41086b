"""Environments that choose a decoder's knobs anew before every round: of one text, and of many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgym.decoding import (
    ArgumentError,
    Knob,
    LatencyProfile,
    Split,
    decoder_names,
    round_features,
    traits_of,
    whole_number,
)

from ..backends.backend import BackendName, DraftSteps, backend_of
from ..backends.replay import Workloads
from ..profiles import Profiles
from ..tuning.knob_space import ACTION_KINDS, ActionKind, KnobMoves, MovesKnobs
from ..workloads import Workload, constructor, default_workload
from .control_env import FIRST, ControlEnv
from .control_vector_env import ControlVectorEnv, Indices
from .throughput import OperatingPoint, OperatingPoints

if TYPE_CHECKING:
    from specgym.decoding import Decoder, Pair

    from ..backends.live import LiveBackend
    from .live import LiveRounds

Decodes = str | Callable[["Pair"], "Decoder[Any]"]
Scales = Mapping[str, float] | None


class RoundKnobsEnv(MovesKnobs, ControlEnv):
    """Choose the knobs of a decoder anew before every round of a text, from what the rounds so far have brought.

    ## Description
    Which settings pay changes within a text: where it repeats itself, wide rounds bring many tokens, and elsewhere they
    read in vain. `TuningEnv` finds settings for whole texts; here they follow the text. The decoder is any lossless one
    with knobs (a lossy one could buy tokens with a text that strays). Whatever the agent does, the text is the
    target's: knobs are settled before a round draws anything (`specgym.decoding.decoders.knob_rules`).

    ## Action space
    `Box(-1, 1, (knobs,), float32)`: how far to move each knob before the next round, as in `TuningEnv`, in units of its
    scale, a logarithmic one in doublings. Results are clipped to the knob's search range, and small moves add up: the
    decoder gets the nearest whole number of a knob that takes whole numbers. With `action="place"` an action says where
    to put each knob, -1 for the low end of its search range and 1 for the high end. For Lookahead decoding:

    | index | action          | scale at 1     | low | high |
    |-------|-----------------|----------------|-----|------|
    | 0     | move of window  | 0.4 doublings  | -1  | 1    |
    | 1     | move of ngram   | 0.4 tokens     | -1  | 1    |
    | 2     | move of guesses | 0.41 doublings | -1  | 1    |

    ## Observation space
    `Box(low, high, (9 + knobs,), float32)`, kept by `specgym.decoding.RoundTracker`, as `generate(knobs=rule)` does:

    | index | observation | low | high | unit                                                                       |
    |-------|-------------|-----|------|----------------------------------------------------------------------------|
    | 0     | last_tokens | 0   | 5    | tokens of the last round, as the logarithm to base 2                       |
    | 1     | few_tokens  | 0   | 5    | tokens a round, mean of the last 4, likewise                               |
    | 2     | many_tokens | 0   | 5    | tokens a round, mean of the last 16, likewise                              |
    | 3     | mean_tokens | 0   | 5    | tokens a round, mean of the whole text, likewise                           |
    | 4     | acceptance  | 0   | 1    | accepted over drafted tokens of the last 16 rounds                         |
    | 5     | read        | 0   | 8    | tokens that the target read for each emitted one, last 16 rounds, likewise |
    | 6     | place       | 0   | 16   | tokens emitted so far and one more, likewise                               |
    | 7     | prompt      | 0   | 16   | tokens before the text and one more, likewise                              |
    | 8     | temperature | 0   | 2    | of the sampling; 0 when greedy                                             |
    | 9...  | knobs/NAME  | 0   | 1    | where each knob stands in its search range; of a logarithmic one in        |
    |       |             |     |      | doublings                                                                  |

    ## Rewards
    `tokens - rate * seconds / autoregressive seconds per token`, of the round, with the `rate` as in `DraftLengthEnv`:
    time is priced at the throughput that is to be beaten (`set_rate`). Seconds are those of the decoder's latency
    profile, never of the clock, and `decision_seconds` for every round besides.

    `info` has the same keys at every step and after `reset`:

    | key                         | meaning                                                                        |
    |-----------------------------|--------------------------------------------------------------------------------|
    | tokens, seconds             | emitted, and charged, in this round                                            |
    | drafted, accepted, rounds   | draft tokens verified, those of them emitted, and 1; after `reset` 0           |
    | knobs/NAME                  | value that the decoder got in this round; after `reset` its default            |
    | total_tokens, total_seconds | of the text so far                                                             |
    | throughput                  | of the text so far, relative to plain decoding; 0 before any time              |
    | workload                    | its name                                                                       |

    ## Starting state
    The start of a prompt's continuation, with the knobs at the decoder's defaults, as far as their search ranges allow.
    The prompts come in an order drawn from the environment's generator, all of them before any comes again.
    `reset(options={"prompt": 3})` chooses one by index.

    ## Episode end
    With the text: an end-of-text token, or as many tokens as were asked for.

    ## Arguments
    Args:
        decoder: a registered name, or anything that makes a decoder with knobs from a pair; it must be lossless.
        workload: a name such as `"tiny-3m/prose"`, or a `Workload`; by default the first of the decoder's own.
        max_new_tokens: tokens of each text, at most.
        split: `"train"` or `"test"` prompts; by default the workload's own.
        profile: a `LatencyProfile` of the decoder's rounds or a file with one; by default the pair's own on this
            hardware, measured once.
        rate: price of time in the beginning, at least 0.
        decision_seconds: time that the agent's own inference takes for each round, at least 0.
        scales: change that an action of 1 makes to each knob, as for `TuningEnv`.
        action: `"move"` or `"place"`.
        max_draft_length: longest draft, in tokens, of a decoder given by name that drafts chains.
        decoder_options: further build options of a decoder given by name.
        backend: `"live"`. What a round brings depends on the knobs of all rounds before it, so `"replay"` is refused.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.

    Raises:
        ValueError: an argument is out of range; the message says which. `WorkloadError` and `LatencyProfileError` are
            such errors. Loading errors as for `load_pair` and `load_prompts`.

    ## Version history
    * v0: first version.
    """

    _rounds: LiveRounds

    @constructor()
    def __init__(
        self,
        decoder: Decodes = "speculative",
        workload: str | Workload | None = None,
        max_new_tokens: int = 64,
        split: Split | None = None,
        profile: LatencyProfile | str | Path | None = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        scales: Scales = None,
        action: ActionKind = "move",
        max_draft_length: int = 16,
        decoder_options: Mapping[str, Any] | None = None,
        backend: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
        source: BackendName | None = None,
    ) -> None:
        live = _require_live(backend, source)
        self._check(workload, None, live, None, split, render_mode, rate, decision_seconds)
        built = _opened(decoder, workload, split, max_new_tokens, decoder_options, max_draft_length, profile, action)
        self._moves = KnobMoves(built.knobs, None, scales, action)
        self._rounds = _texts_of(built, FIRST, max_new_tokens, self._moves, decision_seconds)
        seconds = built.profiles[0].autoregressive_seconds
        self._set_up(built.workloads[0], self._rounds, seconds, round_features(built.knobs), self._moves.action_space)

    def _further_info(self, steps: DraftSteps) -> dict[str, Any]:
        return {name: values.item() for name, values in self._rounds.knobs_of(np.array([steps.rounds])).items()}

    def _checked_action(self, action: Any) -> NDArray[Any]:
        moves = np.asarray(action, np.float64)
        if moves.shape != (len(self.knobs),):
            raise ArgumentError(f"an action has shape ({len(self.knobs)},), one number a knob, got {moves.shape}")
        return moves[None]


class RoundKnobsVectorEnv(MovesKnobs, ControlVectorEnv):
    """Many environments of `RoundKnobsEnv` that step together: their rounds are done in one batch, with joined passes.

    Actions, observations, rewards and the end of an episode are those of `RoundKnobsEnv`, and the same numbers, where
    no two tokens' scores are equal up to rounding. The environments are spread evenly over the workloads. Everything
    else, the beginning of the next text in the step that ends one, `infos`, chosen prompts, `totals` and rates, is as
    in `DraftLengthVectorEnv`; time is charged as if each text were alone.

    Args:
        num_envs: environments, at least one for each workload.
        decoder: as for `RoundKnobsEnv`, as is what is not listed here. It has the same knobs on all workloads.
        workload: a name, or several; by default the first of the decoder's own.
        profile: a `LatencyProfile` or a file with one, for all workloads, one for each in order, or a mapping from
            their names; by default that measured on this hardware.
        rate: price of time in the beginning, for all workloads.
        max_episode_steps: after how many steps an episode is cut; by default only the end of the text ends it.

    Raises:
        ValueError: an argument is out of range; the message says which. `WorkloadError` and `LatencyProfileError` are
            such errors.
    """

    meaning: ClassVar[str] = "a move of every knob"
    _rounds: LiveRounds

    @constructor()
    def __init__(
        self,
        num_envs: int = 1,
        decoder: Decodes = "speculative",
        workload: Workloads = None,
        max_new_tokens: int = 64,
        split: Split | None = None,
        profile: Profiles = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        scales: Scales = None,
        action: ActionKind = "move",
        max_draft_length: int = 16,
        decoder_options: Mapping[str, Any] | None = None,
        backend: BackendName | None = None,
        max_episode_steps: int | None = None,
        source: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
    ) -> None:
        live = _require_live(backend, source)
        self._check(num_envs, live, None, max_episode_steps, render_mode, rate, decision_seconds)
        built = _opened(decoder, workload, split, max_new_tokens, decoder_options, max_draft_length, profile, action)
        self._moves = KnobMoves(built.knobs, None, scales, action)
        places = OperatingPoints(
            workloads=tuple(built.workloads),
            recordings=(None,) * len(built.workloads),
            points=tuple(OperatingPoint(named.name, 1) for named in built.workloads),
            charges=tuple(built.profiles),
        )

        def begin(point_of: Indices) -> LiveRounds:
            self._rounds = _texts_of(built, point_of, max_new_tokens, self._moves, decision_seconds)
            return self._rounds

        self._set_up(places, begin, round_features(built.knobs), self._moves.action_space)

    def _further_info(self, steps: DraftSteps) -> dict[str, NDArray[Any]]:
        return self._rounds.knobs_of(steps.rounds)

    def _checked_actions(self, actions: ArrayLike) -> NDArray[Any]:
        moves = np.asarray(actions, np.float64)
        if moves.shape != (self.num_envs, len(self.knobs)):
            shape = f"({self.num_envs}, {len(self.knobs)})"
            raise ArgumentError(f"actions have shape {shape}, {self.meaning} for each environment, got {moves.shape}")
        return moves


def _require_live(backend: BackendName | None, source: BackendName | None) -> BackendName:
    """Return `"live"`; raises ArgumentError where something else is asked for."""
    if backend_of(backend, source, "live") != "live":
        raise ArgumentError(
            "backend='replay' cannot tell what knobs that change from round to round bring: a round depends on what "
            "all rounds before it, with their knobs, have left behind, and recordings are of other knobs. Leave out "
            "backend, which runs the models; or tune knobs that stay for whole texts, which is replayed "
            "(specgym.envs.environment_id names the environment of a decoder)"
        )
    return "live"


def _opened(
    decoder: Decodes,
    workload: Workloads,
    split: Split | None,
    max_new_tokens: int,
    options: Mapping[str, Any] | None,
    max_draft_length: int,
    profile: Profiles,
    action: ActionKind,
) -> LiveBackend:
    """Build the decoders of some workloads, with what charges their time; arguments as for `RoundKnobsEnv`."""
    if action not in ACTION_KINDS:
        raise ArgumentError(f"action must be one of {', '.join(map(repr, ACTION_KINDS))}, got {action!r}")
    tokens = whole_number("max_new_tokens", max_new_tokens)
    longest = whole_number("max_draft_length", max_draft_length)
    if isinstance(decoder, str | type) and (not isinstance(decoder, str) or decoder in decoder_names()):
        traits = traits_of(decoder)  # before anything is loaded or measured
        _require_choice(traits, traits.knobs_without_pair())
    from ..backends.live import LiveBackend  # which imports torch

    several = default_workload(decoder) if workload is None else workload
    built = LiveBackend(decoder, several, split, tokens, options, longest, profile, 1, None, wall=False)
    _require_choice(built.decoder, built.knobs)
    return built


def _require_choice(decoder: Any, knobs: Sequence[Knob]) -> None:
    if not knobs:
        raise ArgumentError(
            f"{decoder.name} decoding has no knobs, so there is nothing to choose; those of "
            f"{', '.join(decoder_names())} have"
        )
    if not decoder.lossless:
        raise ArgumentError(
            f"{decoder.name} decoding is lossy, and tokens of texts that stray would be bought here: choose a lossless "
            "decoder, or tune this one for whole texts, with a bound on the divergence (specgym.envs.TuningEnv)"
        )


def _texts_of(
    built: LiveBackend, workload_of: Indices, max_new_tokens: int, moves: KnobMoves, decision_seconds: float
) -> LiveRounds:
    from .live import LiveRounds  # which imports torch

    return LiveRounds(
        built.workloads, built.decoders, built.profiles, workload_of, max_new_tokens, moves, decision_seconds
    )
