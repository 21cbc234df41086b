"""Vector environment that chooses between the drafts of many texts at once: thousands of recorded ones, or live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import CHOICE_FEATURES, MOST_DRAFTS, ArgumentError, ChoiceCharges, MixedProfile, Split

from ..backends.backend import BackendName
from ..backends.choice_replay import ChoiceBackend, ChoiceReplay, ChoiceTable
from ..backends.replay import Workloads
from ..recordings.find import find_mixed_trace
from ..recordings.mixed_trace import MixedTrace
from ..workloads import Workload, constructor
from .choice_env import MEANING, DraftChoiceEnv, Find, action_masks, choice_charges
from .control_env import checked_lengths, find_live
from .control_vector_env import ControlVectorEnv, Indices
from .throughput import OperatingPoints

File = str | Path


class DraftChoiceVectorEnv(ControlVectorEnv):
    """Many environments of `DraftChoiceEnv` that step together; on recorded texts a step is a few array operations.

    Actions, observations, rewards and the end of an episode are those of `DraftChoiceEnv`, and the same numbers. The
    environments are spread evenly over the workloads. Everything else, the beginning of the next text in the step that
    ends one, `infos`, chosen prompts, `totals` and rates, is as in `DraftLengthVectorEnv`, but for
    `remaining_acceptable`, which has shape (num_envs, 6).

    Args:
        num_envs: environments, at least one for each workload.
        workload: a name, or several; by default those of the given recordings, or else `"tiny-10m-mixed/prose"`. Their
            pairs need not have the same drafts.
        split: `"train"` or `"test"`; by default that of the given recordings, or else `"train"`.
        max_draft_length: tokens that a draft may have, 1 to 32; in replay at most what the longest of the recordings
            holds, and of another as many as that holds.
        max_new_tokens: tokens of each text, likewise.
        profile: a `MixedProfile` or a file with one, for all workloads, one for each in order, or a mapping from their
            names; by default the reference profile of each workload's pair (`specgym.envs.profiles`), live that
            measured on this hardware.
        recording: for replay, a `MixedTrace` or a file with one, one for each workload in order, or a mapping from
            their names; by default those that ship.
        rate: price of time in the beginning, for all workloads.
        decision_seconds: charged for every step at which a draft was available.
        backend: `"replay"`, the default, looks up recordings. `"live"` runs the models, all texts of a step in one
            batch, so that their passes are joined; time is charged by the profile, as if each text were alone.
        max_episode_steps: after how many steps an episode is cut; by default only the end of the text ends it.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.
        missing_drafts: in replay, share of texts that do without some of the drafts, 0 to 1: each of theirs is missing
            with a chance of 0.3. For training, so that a policy serves pairs with other drafts and learns less by
            heart.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.

    Raises:
        ValueError: an argument is out of range; the message says which. `TraceError`, `WorkloadError` and
            `LatencyProfileError` are such errors.
    """

    meaning: ClassVar[str] = MEANING
    _choices: ChoiceBackend

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
        backend = self._check(num_envs, backend, source, max_episode_steps, render_mode, rate, decision_seconds)
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)
        if workload is None and recording is None:
            workload = DraftChoiceEnv.default_workload
        if backend == "live" and missing_drafts:
            raise ArgumentError("missing_drafts is for backend='replay'; backend='live' asks all drafts of a pair")

        def charge(trace: MixedTrace | None, named: Workload, value: Any, _: int) -> ChoiceCharges:
            return choice_charges(trace, named, value, max_draft_length, max_new_tokens, decision_seconds)

        find: Find = find_live if backend == "live" else find_mixed_trace
        places = OperatingPoints.find(workload, split, recording, profile, 1, find=find, charge=charge)

        def begin(point_of: Indices) -> ChoiceBackend:
            traces = [trace for trace in places.recordings if trace is not None]
            if traces:
                table = ChoiceTable(traces, max_draft_length, max_new_tokens)
                self._choices = ChoiceReplay(table, places.charges, point_of, missing_drafts)
            else:
                from .live import LiveChoices  # which imports torch; a replay needs none

                lengths = max_draft_length, max_new_tokens
                self._choices = LiveChoices(places.workloads, places.charges, point_of, *lengths)
            return self._choices

        self._set_up(places, begin, CHOICE_FEATURES, 1 + MOST_DRAFTS)

    def action_masks(self) -> NDArray[np.bool_]:
        """Actions that do what they say, shape (num_envs, 7), as MaskablePPO of sb3-contrib asks for them."""
        return action_masks(self._choices)
