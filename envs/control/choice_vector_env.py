"""Vector environment that chooses between the drafts of thousands of recorded texts at once, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import CHOICE_FEATURES, MOST_DRAFTS, MixedProfile, Split

from ..backends.backend import BackendName
from ..backends.choice_replay import ChoiceCharges, ChoiceReplay, ChoiceTable
from ..backends.replay import Workloads
from ..profiles import mixed_profile_of
from ..recordings.find import find_mixed_trace
from ..recordings.mixed_trace import MixedTrace
from ..workloads import Workload, constructor
from .choice_env import MEANING, DraftChoiceEnv, action_masks
from .control_env import checked_lengths
from .control_vector_env import ControlVectorEnv, Indices
from .throughput import OperatingPoints

File = str | Path


class DraftChoiceVectorEnv(ControlVectorEnv):
    """Many environments of `DraftChoiceEnv` on recorded texts, each step a few operations on arrays.

    Actions, observations, rewards and the end of an episode are those of `DraftChoiceEnv`, and the same numbers. The
    environments are spread evenly over the workloads. Everything else, the beginning of the next text in the step that
    ends one, `infos`, chosen prompts, `totals` and rates, is as in `DraftLengthVectorEnv`, but for
    `remaining_acceptable`, which has shape (num_envs, 6).

    Args:
        num_envs: environments, at least one for each workload.
        workload: a name, or several; by default those of the given recordings, or else `"tiny-10m-mixed/prose"`. Their
            pairs need not have the same drafts.
        split: `"train"` or `"test"`; by default that of the given recordings, or else `"train"`.
        max_draft_length: tokens that a draft may have, 1 to 32 and at most what the longest of the recordings holds; of
            another as many as that holds.
        max_new_tokens: tokens of each text, likewise.
        profile: a `MixedProfile` or a file with one, for all workloads, one for each in order, or a mapping from their
            names; by default the reference profile of each workload's pair (`specgym.envs.profiles`).
        recording: a `MixedTrace` or a file with one, one for each workload in order, or a mapping from their names; by
            default those that ship.
        rate: price of time in the beginning, for all workloads.
        decision_seconds: charged for every step at which a draft was available.
        backend: `"replay"`. `gymnasium.make_vec(..., vectorization_mode="sync")` makes live ones side by side.
        max_episode_steps: after how many steps an episode is cut; by default only the end of the text ends it.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.
        missing_drafts: share of texts that do without some of the drafts, 0 to 1: each of theirs is missing with a
            chance of 0.3. For training, so that a policy serves pairs with other drafts and learns less by heart.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.

    Raises:
        ValueError: an argument is out of range; the message says which. `TraceError`, `WorkloadError` and
            `LatencyProfileError` are such errors.
    """

    meaning: ClassVar[str] = MEANING

    @constructor()
    def __init__(
        self,
        num_envs: int = 1,
        workload: Workloads = None,
        split: Split | None = None,
        max_draft_length: int = 12,
        max_new_tokens: int = 64,
        profile: MixedProfile | File | Sequence[MixedProfile | File] | Mapping[str, MixedProfile | File] | None = None,
        recording: MixedTrace | File | Sequence[MixedTrace | File] | Mapping[str, MixedTrace | File] | None = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        backend: BackendName | None = None,
        max_episode_steps: int | None = None,
        source: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
        missing_drafts: float = 0.0,
    ) -> None:
        self._check(num_envs, backend, source, max_episode_steps, render_mode, rate, decision_seconds)
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)
        if workload is None and recording is None:
            workload = DraftChoiceEnv.default_workload

        def charge(trace: MixedTrace, named: Workload, value: Any, _: int) -> ChoiceCharges:
            profile = mixed_profile_of(named, value, replayed=True, drafts=trace.drafts).with_chances(trace.chances)
            return ChoiceCharges.of(profile, max_draft_length, max_new_tokens, decision_seconds)

        places = OperatingPoints.find(workload, split, recording, profile, 1, find=find_mixed_trace, charge=charge)
        table = ChoiceTable(places.traces, max_draft_length, max_new_tokens)

        def begin(point_of: Indices) -> ChoiceReplay:
            self._choices = ChoiceReplay(table, places.charges, point_of, missing_drafts)
            return self._choices

        self._set_up(places, begin, CHOICE_FEATURES, 1 + MOST_DRAFTS)

    def action_masks(self) -> NDArray[np.bool_]:
        """Actions that do what they say, shape (num_envs, 7), as MaskablePPO of sb3-contrib asks for them."""
        return action_masks(self._choices)
