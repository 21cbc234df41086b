"""Environment that controls the draft length: after every drafted token, stop and verify, or go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from specgym.decoding import CHAIN, FEATURES, ArgumentError, LatencyProfile, Split, traits_of, whole_number

from ..backends.backend import BackendName, DraftBackend, DraftSteps
from ..backends.chain_replay import DraftCharges, DraftReplay, DraftTable
from ..backends.pipelined_replay import OverlappedCharges, PipelinedDrafts
from ..profiles import profile_of
from ..recordings.find import find_trace
from ..recordings.trace import Trace
from ..workloads import Workload, constructor
from .control_env import FIRST, ControlEnv, checked_lengths, find_live

Find = Callable[..., tuple[Trace | None, Workload]]
"""Finds a trace, or None for live decoding, and its workload."""


class DraftLengthEnv(ControlEnv):
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
    `Box(low, high, (11,), float32)`, kept by `specgym.decoding.decoders.stop_rules.DraftTracker`, as live decoders do:

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
    | 8     | matched                | 0   | 32   | tokens of context that a look-up found the last token by   |
    | 9     | drawn_probability      | 0   | 1    | probability with which the last token was drawn            |
    | 10    | temperature            | 0   | 2    | of the sampling; 0 when greedy                             |

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

    ### Rounds that overlap
    With `decoder` a decoder whose draft goes on while the target verifies (docs/pipeline.md), what is stopped is the
    draft of the bet under way. Going on is charged what the round then takes longer than the target's pass, nothing as
    long as the pass hides it, and stopping what is left of the seconds of `LatencyProfile.round_of`; decisions lengthen
    the drafting. The observation is what a rule sees that the live decoder asks, at the same tokens, but for those that
    nobody waits for: of a bet that is lost by a token before it, and of the last bet of a text. A bet that its first
    token loses is over with either action. `info` then has `ready`, too: how many tokens were drafted before this draft
    and await their verification. Without any, what came before has no further effect.

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
        decoder: name of a registered decoder whose draft goes on while the target verifies; by default draft and target
            take turns. For replays.
        pre_verify: for such a decoder, whether the target reads on at once after a rejection (1), or waits for a draft
            (0); by default as the decoder's knob.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.

    Raises:
        ValueError: an argument is out of range; the message says which. `TraceError`, `WorkloadError` and
            `LatencyProfileError` are such errors. Loading errors as for `load_pair` and `load_prompts`.

    ## Version history
    * v0: first version. Observations 8 to 10 were added later, without a new number; rules that were learned on the
      first 8 decide as before.
    """

    meaning: ClassVar[str] = "0 (go on) or 1 (stop)"

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
        decoder: str | None = None,
        pre_verify: int | None = None,
    ) -> None:
        backend = self._check(workload, recording, backend, source, split, render_mode, rate, decision_seconds)
        reads_on = overlapping(decoder, pre_verify, backend)
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)
        find: Find = find_live if backend == "live" else find_trace
        trace, named = find(recording, workload, split)
        charged = profile_of(
            named, profile, replayed=backend == "replay", decoder=None if reads_on is None else decoder
        )
        at: dict[str, Any] = {"batch_size": batch_size, "context": context, "decision_seconds": decision_seconds}
        drafts: DraftBackend
        if reads_on is not None:
            assert trace is not None
            self._charges: DraftCharges | OverlappedCharges = OverlappedCharges.of(charged, max_draft_length, **at)
            table = DraftTable([trace], max_draft_length, max_new_tokens)
            drafts = PipelinedDrafts(table, [self._charges], [batch_size], FIRST, reads_on)
        else:
            self._charges = DraftCharges.of(charged, max_draft_length, **at)
            if trace is not None:
                table = DraftTable([trace], max_draft_length, max_new_tokens)
                drafts = DraftReplay(table, [self._charges], [batch_size], FIRST)
            else:
                from .live import LiveDrafts  # which imports torch; a replay needs none

                drafts = LiveDrafts([named], [self._charges], [batch_size], FIRST, max_draft_length, max_new_tokens)
        self._set_up(named, drafts, self._charges.autoregressive_seconds, FEATURES, 2)

    @property
    def charges(self) -> DraftCharges | OverlappedCharges:
        """Seconds charged for steps."""
        return self._charges

    def _info(self, steps: DraftSteps) -> dict[str, Any]:
        info = super()._info(steps)
        return info | {"ready": int(self._drafts.ready[0])} if isinstance(self._drafts, PipelinedDrafts) else info


def overlapping(decoder: str | None, pre_verify: int | None, backend: BackendName) -> bool | None:
    """Return whether a target that works beside its draft reads on at once; None where the two take turns.

    Args:
        decoder: name of a registered decoder, or None.
        pre_verify: as it was given.
        backend: that is asked for.

    Raises:
        ArgumentError: the decoder's drafts cannot be stopped token by token, or not live, or have no `pre_verify`.
        UnknownDecoderError: there is no such decoder.
    """
    if pre_verify is not None:
        pre_verify = whole_number("pre_verify", pre_verify, at_least=0, at_most=1)
    traits = None if decoder is None else traits_of(decoder)
    if traits is None or not traits.overlaps:
        if traits is not None and not (traits.drafts_chains() and traits.lossless and traits.cost_kind(True) == CHAIN):
            raise ArgumentError(
                f"decoder: drafts of {decoder} are no chains that are verified exactly, or are stopped by knobs of "
                "their own; leave it out, which decodes in turns, or name a decoder whose draft goes on meanwhile"
            )
        if pre_verify is not None:
            raise ArgumentError(
                "pre_verify is for a decoder whose draft goes on while the target verifies; name it by decoder=..., or "
                "leave pre_verify out"
            )
        return None
    if backend == "live":
        raise ArgumentError(
            f"the draft of decoder {decoder} goes on by itself, and cannot be stepped from outside; give "
            "backend='replay', and what is learned there to the decoder as its stop=..., which the draft itself asks"
        )
    if pre_verify is None:
        pre_verify = int(next(knob.default for knob in traits.knobs_without_pair() if knob.name == "pre_verify"))
    return pre_verify == 1
