"""Environment that chooses between several drafts: before every token, who drafts it, or whether to verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import CHOICE_FEATURES, MOST_DRAFTS, ChoiceCharges, MixedProfile, Split

from ..backends.backend import BackendName
from ..backends.choice_replay import ChoiceBackend, ChoiceReplay, ChoiceTable
from ..profiles import mixed_profile_of
from ..recordings.find import counted_chances, find_mixed_trace
from ..recordings.mixed_trace import MixedTrace
from ..workloads import Workload, constructor
from .control_env import FIRST, ControlEnv, checked_lengths, find_live

Find = Callable[..., tuple[MixedTrace | None, Workload]]
"""Finds a mixed trace, or None for live decoding, and its workload."""
MEANING = f"0 (verify) or the number of a draft, 1 to {MOST_DRAFTS}"


class DraftChoiceEnv(ControlEnv):
    """Decide before every token which of several drafts proposes it, or to let the target verify what there is.

    ## Description
    Which draft is best changes from line to line: a table or a look-up where text repeats, a model elsewhere, none
    where none knows. Serving engines choose by a fixed rule. Here an agent chooses token by token: go on with the same
    draft, hand over to another, or stop. Whatever it does, the text is the target's: all that is drafted is verified.

    ## Action space
    `Discrete(7)`:

    | action | meaning                                                                                     |
    |--------|---------------------------------------------------------------------------------------------|
    | 0      | verify the draft and emit; with nothing drafted the target emits a token alone              |
    | 1 to 6 | draft the next token with this draft of the pair; if it is not available, this means 0, too |

    `action_masks()` says which are available. None but 0 is where the draft is as long as it may be, or the text has
    room for no more. A free draft, a table or a look-up, is looked up once, where the round begins, and may take
    over as long as all that was drafted is what it proposes itself. A model may take over anywhere; of what it then
    drafts nothing is seen but the number of tokens, and no free draft is available behind it.

    ## Observation space
    `Box(low, high, (77,), float32)`, kept by `specgym.decoding.decoders.choice_features.ChoiceTracker`, as live
    decoders do. The first 11 are those of `DraftLengthEnv`, of a draft to which several may have contributed:

    | index | observation            | low | high | unit                                                         |
    |-------|------------------------|-----|------|--------------------------------------------------------------|
    | 0     | confidence             | 0   | 1    | probability: the draft's largest, for the last token; 0 of a |
    |       |                        |     |      | model that took over                                         |
    | 1     | entropy                | 0   | 12   | nats, of what that token was drawn from                      |
    | 2     | product                | 0   | 1    | chance that all of this round's tokens are right: product of |
    |       |                        |     |      | `chance` (below) of each, by its confidence if that was seen |
    | 3     | place                  | 0   | 32   | tokens drafted so far in this round                          |
    | 4     | recent_acceptance      | 0   | 1    | accepted over drafted, averaged over this text's rounds      |
    | 5     | mean_acceptance_length | 1   | 33   | emitted tokens a round, averaged over this text's rounds     |
    | 6     | cost_ratio             | 0   | 4    | cost of one more token in the target's pass, in plain tokens |
    | 7     | batch_size             | 0   | 10   | 0: one sequence, as the logarithm to base 2                  |
    | 8     | matched                | 0   | 32   | tokens of context that a look-up found the last token by     |
    | 9     | drawn_probability      | 0   | 1    | probability with which the last token was drawn; 0 likewise  |
    | 10    | temperature            | 0   | 2    | of the sampling; 0 when greedy                               |

    Then eleven for each of up to six drafts, in the order of the pair; index 11 + 11 * draft + this:

    | index | observation       | low | high | unit                                                              |
    |-------|-------------------|-----|------|-------------------------------------------------------------------|
    | 0     | available         | 0   | 1    | 1 if it can propose a token here; 0 where there is no such draft  |
    | 1     | free              | 0   | 1    | 1 if its proposals cost microseconds and so may be looked at      |
    | 2     | cost_ratio        | 0   | 4    | cost of a token of it, the target's part included, in plain ones  |
    | 3     | unread            | 0   | 12   | tokens that a model reads to propose it, logarithm to base 2      |
    | 4     | next_confidence   | 0   | 1    | confidence in its next token, if it is free; otherwise 0          |
    | 5     | next_matched      | 0   | 32   | tokens of context that it finds that token by; likewise           |
    | 6     | agreement         | 0   | 1    | share of the other free drafts that propose the same token        |
    | 7     | chance            | 0   | 1    | share of tokens like its next one that were right on other texts: |
    |       |                   |     |      | of that confidence if it is free, else of any; see `profile`      |
    | 8     | recent_acceptance | 0   | 1    | accepted over drafted of its tokens, averaged over rounds with it |
    | 9     | recent_hits       | 0   | 1    | share of rounds whose first token it had right; see below         |
    | 10    | drafting          | 0   | 1    | 1 if it proposed the last token                                   |

    `recent_hits` of a free draft is over all rounds at whose start it knew a token, asked for or not; of others over
    those that it began. Before anything is known `recent_acceptance` and `recent_hits` are 0.5.

    ## Rewards
    `tokens - rate * seconds / autoregressive seconds per token`, of the step, with the `rate` as in `DraftLengthEnv`.

    Seconds are those of the latency profile, never of the clock: a drafted token is charged what its draft takes to
    read what it has not read yet and to propose one, a verification the target's pass over what was drafted. A draft
    that is a model has read the prompt but its last token when the text begins, and reads what others drafted and what
    was emitted when it is next asked. `decision_seconds` are charged for every step at which a draft was available.

    `info` has the same keys at every step and after `reset`:

    | key                         | meaning                                                                     |
    |-----------------------------|-----------------------------------------------------------------------------|
    | tokens, seconds             | emitted, and charged, in this step                                          |
    | drafted, accepted, rounds   | in this step: draft tokens verified, those of them emitted, verifications   |
    | remaining_acceptable        | for each draft, shape (6,): how many more tokens of it alone would each     |
    |                             | lengthen what is emitted                                                    |
    | total_tokens, total_seconds | of the text so far                                                          |
    | throughput                  | of the text so far, relative to plain decoding; 0 before any time           |
    | workload                    | its name                                                                    |

    `remaining_acceptable` is for oracles: a negative one says how many tokens already drafted bring nothing. It is
    known in replay only; in live decoding it is -1000.

    ## Starting state
    The start of a prompt's continuation, with nothing drafted. The prompts come in an order drawn from the
    environment's generator, all of them before any comes again. `reset(options={"prompt": 3})` chooses one by index.

    ## Episode end
    With the text: an end-of-text token, or as many tokens as were asked for.

    ## Arguments
    Args:
        workload: a name such as `"tiny-10m-mixed/prose"`, or a `Workload`, whose pair has several drafts; by default
            that of a given recording, or else `"tiny-10m-mixed/prose"`.
        backend: `"live"`, the default, runs the models, `"replay"` a recording, for which no model is loaded if there
            is a profile. When greedy, both give the same tokens, rounds, seconds and masks, and the same features up to
            the rounding of recorded numbers.
        max_draft_length: tokens that a draft may have, 1 to 32; in replay at most what the recording holds.
        max_new_tokens: tokens of each text, at most; in replay at most what the recording holds.
        split: `"train"` or `"test"` prompts; by default the workload's own, or the recording's.
        profile: a `MixedProfile` or a file with one; by default the pair's own on this hardware, measured once, and for
            a replay the pair's reference profile (`specgym.envs.profiles`). How often tokens of each draft were right,
            by their confidence (`DraftCosts.chances`), is taken from it; where it does not say so, from the recording;
            in live decoding from the recording that ships, if one does, or else a confidence is taken for a chance.
        recording: a `MixedTrace` or a file with one, for replay; by default the workload's that ships with the package.
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

    default_workload: ClassVar[str] = "tiny-10m-mixed/prose"
    meaning: ClassVar[str] = MEANING

    @constructor()
    def __init__(
        self,
        workload: str | Workload | None = None,
        backend: BackendName | None = None,
        max_draft_length: int = 12,
        max_new_tokens: int = 64,
        split: Split | None = None,
        profile: MixedProfile | str | Path | None = None,
        recording: MixedTrace | str | Path | None = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        render_mode: Literal["rgb_array"] | None = None,
        source: BackendName | None = None,
    ) -> None:
        backend = self._check(workload, recording, backend, source, split, render_mode, rate, decision_seconds)
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)
        if recording is None and workload is None:
            workload = self.default_workload
        find: Find = find_live if backend == "live" else find_mixed_trace
        trace, named = find(recording, workload, split)
        self._charges = choice_charges(trace, named, profile, max_draft_length, max_new_tokens, decision_seconds)
        self._choices: ChoiceBackend
        if trace is not None:
            table = ChoiceTable([trace], max_draft_length, max_new_tokens)
            self._choices = ChoiceReplay(table, [self._charges], FIRST)
        else:
            from .live import LiveChoices  # which imports torch; a replay needs none

            self._choices = LiveChoices([named], [self._charges], FIRST, max_draft_length, max_new_tokens)
        self._set_up(named, self._choices, self._charges.autoregressive_seconds, CHOICE_FEATURES, 1 + MOST_DRAFTS)

    @property
    def charges(self) -> ChoiceCharges:
        """Seconds charged for steps."""
        return self._charges

    def action_masks(self) -> NDArray[np.bool_]:
        """Actions that do what they say, shape (7,), as MaskablePPO of sb3-contrib asks for them."""
        return action_masks(self._choices)[0]


def choice_charges(
    trace: MixedTrace | None,
    named: Workload,
    profile: MixedProfile | str | Path | None,
    max_draft_length: int,
    max_new_tokens: int,
    decision_seconds: float,
) -> ChoiceCharges:
    """Return what the time of a workload is charged by.

    Args:
        trace: its recording; None for live decoding.
        named: the workload.
        profile: as for `DraftChoiceEnv`, as is the rest.
        max_draft_length: likewise.
        max_new_tokens: likewise.
        decision_seconds: likewise.

    Raises:
        ValueError: as for `DraftChoiceEnv`.
    """
    if trace is None:
        from specgym.decoding import require_choice  # which imports torch; a replay needs none

        require_choice(named.load())
        costs = mixed_profile_of(named, profile, replayed=False)
        chances = counted_chances(named, costs)
    else:
        costs = mixed_profile_of(named, profile, replayed=True, drafts=trace.drafts)
        chances = trace.chances
    return ChoiceCharges.of(costs.with_chances(chances), max_draft_length, max_new_tokens, decision_seconds)


def action_masks(choices: ChoiceBackend) -> NDArray[np.bool_]:
    """Return which actions do what they say, shape (texts, 1 + MOST_DRAFTS)."""
    available = choices.available
    return np.concatenate([np.ones((len(available), 1), np.bool_), available], axis=1)
