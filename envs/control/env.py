"""Environment that controls the draft length: after every drafted token, stop and verify, or go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from specgym.decoding import FEATURES, ArgumentError, LatencyProfile, Split, one_of, whole_number

from ..backends.backend import BackendName, DraftBackend, DraftSteps, backend_of
from ..backends.chain_replay import DraftCharges, DraftReplay, DraftTable
from ..backends.replay import require_single
from ..profiles import profile_of
from ..prompt_order import PromptOrder
from ..recordings.find import find_trace
from ..recordings.trace import Trace
from ..workloads import DEFAULT_WORKLOAD, Workload, constructor, reset_options
from ..workloads import workload as named_workload
from .throughput import checked_rate, linear_reward, relative_throughput

Array = NDArray[np.float32]

LONGEST = 32
"""Longest draft, in tokens; observations do not tell longer ones apart."""

_FIRST = np.zeros(1, np.int64)
_OPTIONS = ("prompt",)


class DraftLengthEnv(gymnasium.Env[Array, np.int64], EzPickle):
    """Decide after every drafted token whether to draft another one or to let the target verify what there is.

    ## Description
    Speculative decoding drafts some tokens with a cheap model and has the target verify them in one pass. Tokens after
    the first that the target rejects were drafted in vain; stopping too early wastes a pass. How far to go depends on
    how sure the draft is, here and now. Whatever the agent does, the text is the target's: all that is drafted is
    verified.

    ## Action space
    `Discrete(2)`:

    | action | meaning                                                       |
    |--------|---------------------------------------------------------------|
    | 0      | go on: draft one more token                                   |
    | 1      | stop: verify the draft, emit, and draft the first token after |

    Going on verifies as well where no more can be drafted: the draft is as long as it may be, the text has room for no
    more, or the draft knows none. After a verification the next draft begins in the same step. If it knows no token,
    or only one is still to be emitted, the target emits one by itself, as often as it takes. So an observation is of a
    draft of at least one token, save where the text is over or has not begun: if nothing can be drafted at its very
    start, the first step lets the target emit, whatever the action.

    ## Observation space
    `Box(low, high, (8,), float32)`, kept by `specgym.decoding.decoders.stop_rules.DraftTracker`, as live decoders do:

    | index | observation            | low | high | unit                                                       |
    |-------|------------------------|-----|------|------------------------------------------------------------|
    | 0     | confidence             | 0   | 1    | probability: the draft's largest, for its last token       |
    | 1     | entropy                | 0   | 12   | nats, of what that token was drawn from                    |
    | 2     | product                | 0   | 1    | product of the confidences of this draft                   |
    | 3     | place                  | 0   | 32   | tokens drafted so far in this draft                        |
    | 4     | recent_acceptance      | 0   | 1    | accepted over drafted, averaged over this text's rounds    |
    | 5     | mean_acceptance_length | 1   | 33   | emitted tokens a round, averaged over this text's rounds   |
    | 6     | cost_ratio             | 0   | 4    | cost of one more drafted token, in plain tokens            |
    | 7     | batch_size             | 0   | 10   | sequences decoded together, as the logarithm to base 2     |

    ## Rewards
    `tokens - rate * seconds / autoregressive seconds per token`, of the step. What counts is total tokens over total
    seconds; an agent that maximises this linear form at the `rate` of the best throughput maximises that ratio
    (Dinkelbach, "On nonlinear fractional programming", 1967; see `specgym.envs.control.throughput`). Time is in
    units of the
    target's plain decoding, so that a rate of 1 is no speedup, and pairs compare.

    A learner begins with a rate of 1 and, now and then, sets it to the throughput that its policy reached since:
    `env.set_rate(throughput)` (`info` has what it takes). When that no longer rises, the policy is the best it can
    find, and its mean reward is about 0.

    Seconds are those of the latency profile, never of the clock. Going on is charged what one more token adds to the
    round, a verification what a round of one token takes, and the sum over a round is exactly the round's seconds.
    `decision_seconds` are charged for every decision about a drafted token.

    `info` has the same keys at every step and after `reset`:

    | key                         | meaning                                                                     |
    |-----------------------------|-----------------------------------------------------------------------------|
    | tokens, seconds             | emitted, and charged, in this step; seconds are those of the whole batch    |
    | drafted, accepted, rounds   | in this step: draft tokens verified, those of them emitted, verifications   |
    | remaining_acceptable        | how many more tokens of this draft would each lengthen what is emitted      |
    | total_tokens, total_seconds | of the text so far                                                          |
    | throughput                  | of the text so far, relative to plain decoding; 0 before any time           |
    | workload                    | its name                                                                    |

    `remaining_acceptable` is for oracles: a negative one says how many tokens already drafted bring nothing. It is
    known in replay only; in live decoding it is -1000.

    ## Starting state
    The start of a prompt's continuation, with its first token drafted. The prompts come in an order drawn from the
    environment's generator, all of them before any comes again. `reset(options={"prompt": 3})` chooses one by index.

    ## Episode end
    With the text: an end-of-text token, or as many tokens as were asked for.

    ## Arguments
    Args:
        workload: a name such as `"tiny/prose"` or `"tiny/code@1.0"`, or a `Workload`; by default that of a given
            recording, or else `"tiny/prose"`.
        backend: `"live"`, the default, runs the models, `"replay"` a recorded trace, for which no model is loaded if
            there is a profile. When greedy the two agree, up to the rounding of recorded numbers (under 0.5 %).
        max_draft_length: tokens that a draft may have, 1 to 32; in replay at most what the trace holds.
        max_new_tokens: tokens of each text, at most; in replay at most what the trace holds.
        split: `"train"` or `"test"` prompts; by default the workload's own, or the recording's.
        profile: a `LatencyProfile` or a file with one; by default the pair's own on this hardware, measured once, and
            for a replay the pair's reference profile (`specgym.envs.profiles`).
        recording: a `Trace` or a file with one, for replay; by default the workload's that ships with the package.
        batch_size: sequences decoded together, all drafting as far as this one; the profile must cover it.
        context: tokens read before, for the profile; by default its own.
        rate: price of time in the beginning, at least 0.
        decision_seconds: time that the agent's own inference takes for each decision, at least 0.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.

    Raises:
        ValueError: an argument is out of range; the message says which. `TraceError`, `WorkloadError` and
            `LatencyProfileError` are such errors. Loading errors as for `load_pair` and `load_prompts`.

    ## Version history
    * v0: first version.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  # gymnasium declares it so

    @constructor(tokens="max_new_tokens", trace="recording")
    def __init__(
        self,
        workload: str | Workload | None = None,
        backend: BackendName | None = None,
        max_draft_length: int = 16,
        max_new_tokens: int = 64,
        split: Split | None = None,
        profile: LatencyProfile | str | Path | None = None,
        recording: Trace | str | Path | None = None,
        batch_size: int = 1,
        context: int | None = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        render_mode: Literal["rgb_array"] | None = None,
        source: BackendName | None = None,
    ) -> None:
        backend = backend_of(backend, source, "live")
        require_single(type(self).__name__, workload=workload, recording=recording)
        one_of("split", split, (None, "train", "test"))
        one_of("render_mode", render_mode, (None, "rgb_array"))
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)
        if recording is not None and backend == "live":
            raise ArgumentError("recording is for backend='replay'; the backend is 'live'")
        self._rate = checked_rate(rate)
        trace: Trace | None = None
        if backend == "replay":
            trace, self._workload = find_trace(recording, workload, split)
        else:
            self._workload = named_workload(workload or DEFAULT_WORKLOAD)
            if split is not None:
                self._workload = self._workload.with_split(split)
        self._charges = DraftCharges.of(
            profile_of(self._workload, profile, replayed=backend == "replay"),
            max_draft_length,
            batch_size=batch_size,
            context=context,
            decision_seconds=decision_seconds,
        )
        self._drafts: DraftBackend
        if trace is not None:
            table = DraftTable([trace], max_draft_length, max_new_tokens)
            self._drafts = DraftReplay(table, [self._charges], [batch_size], _FIRST)
        else:
            from ..backends.live import LiveDrafts  # which imports torch; a replay needs none

            self._drafts = LiveDrafts(self._workload, self._charges, max_draft_length, max_new_tokens, batch_size)
        self.observation_space = observation_space()
        self.action_space = spaces.Discrete(2)
        self._orders = PromptOrder(self._drafts.prompts)
        self._total_tokens = 0
        self._total_seconds = 0.0

    @property
    def workload(self) -> Workload:
        """Pair, prompts and sampling; its split is the one in use."""
        return self._workload

    @property
    def charges(self) -> DraftCharges:
        """Seconds charged for steps."""
        return self._charges

    @property
    def rate(self) -> float:
        """Price of time, relative to plain decoding."""
        return self._rate

    def set_rate(self, rate: float) -> None:
        """Price time anew, from the next step on.

        Raises:
            ValueError: the rate is negative or not finite.
        """
        self._rate = checked_rate(rate)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a text.

        Args:
            seed: fixes the order of the prompts and all sampling.
            options: `prompt`, the index of one.

        Raises:
            ValueError: an unknown option, or a prompt that does not exist.
        """
        super().reset(seed=seed)
        options = reset_options(options, _OPTIONS)
        if seed is not None:
            self._orders.restart()
        if options.get("prompt") is not None:
            prompt = np.array([self._checked_prompt(options["prompt"])])
        else:
            prompt = self._orders.take_shared(_FIRST, self.np_random)
        self._total_tokens, self._total_seconds = 0, 0.0
        self._drafts.begin(_FIRST, _FIRST, prompt, self.np_random)
        return self._drafts.features[0].copy(), self._info(DraftSteps(0, 0.0, 0, 0, 0))

    def step(self, action: int | np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Go on drafting (0), or stop and verify (1).

        Returns:
            Observation, reward, whether the text has ended, False, info.

        Raises:
            ValueError: the action is neither.
            gymnasium.error.ResetNeeded: no text has begun, or it has ended.
            NumericalError: the target gave NaN logits.
        """
        if np.shape(action) != () or action not in (0, 1):
            raise ArgumentError(f"an action is 0 (go on) or 1 (stop), got {action!r}")
        if self._drafts.over[0]:
            raise gymnasium.error.ResetNeeded("there is no text, or it has ended; call reset before the next step")
        steps, _ = self._drafts.step(np.array([bool(action)]), self.np_random)
        single = DraftSteps(*(values.item() for values in steps))
        self._total_tokens += single.tokens
        self._total_seconds += single.seconds
        reward = linear_reward(float(single.tokens), single.seconds, self._rate, self._charges.autoregressive_seconds)
        return self._drafts.features[0].copy(), reward, bool(self._drafts.over[0]), False, self._info(single)

    def _info(self, steps: DraftSteps) -> dict[str, Any]:
        throughput = relative_throughput(self._total_tokens, self._total_seconds, self._charges.autoregressive_seconds)
        return {
            **steps._asdict(),
            "remaining_acceptable": int(self._drafts.remaining_acceptable[0]),
            "total_tokens": self._total_tokens,
            "total_seconds": self._total_seconds,
            "throughput": throughput,
            "workload": self._workload.name,
        }

    def _checked_prompt(self, prompt: Any) -> int:
        count = len(self._drafts.prompts[0])
        if not isinstance(prompt, int | np.integer) or not 0 <= prompt < count:
            raise ArgumentError(
                f"reset option prompt is an index: {self._workload} has {self._workload.split} prompts 0 to "
                f"{count - 1}, got {prompt!r}"
            )
        return int(prompt)


def observation_space() -> spaces.Box[np.float32]:
    """Return the space of a draft's features, `specgym.decoding.FEATURES`: float32, shape (8,)."""
    low, high = (np.array([getattr(feature, end) for feature in FEATURES], np.float32) for end in ("low", "high"))
    return spaces.Box(low, high)


def checked_lengths(max_draft_length: int, max_new_tokens: int) -> tuple[int, int]:
    """Return both as whole numbers; raises ArgumentError unless they are in range."""
    return (
        whole_number("max_draft_length", max_draft_length, at_most=LONGEST),
        whole_number("max_new_tokens", max_new_tokens),
    )
