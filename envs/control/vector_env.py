"""Vector environment that controls the draft length of many texts at once: thousands of recorded ones, or live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from specgym.decoding import FEATURES, Split

from ..backends.backend import BackendName, DraftBackend, DraftSteps
from ..backends.chain_replay import DraftCharges, DraftReplay, DraftTable
from ..backends.pipelined_replay import OverlappedCharges, PipelinedDrafts
from ..backends.replay import Workloads
from ..profiles import Profiles, profile_of
from ..recordings.find import Recordings, find_trace
from ..recordings.trace import Trace
from ..workloads import Workload, constructor
from .control_env import checked_lengths, find_live
from .control_vector_env import ControlVectorEnv, Indices
from .env import Find, overlapping
from .throughput import OperatingPoints


class DraftLengthVectorEnv(ControlVectorEnv):
    """Many environments of `DraftLengthEnv` that step together; on recorded traces a step is a few array operations.

    Actions, observations, rewards and the end of an episode are those of `DraftLengthEnv`, and the same numbers. The
    environments are spread evenly over the operating points, every workload with every batch size, and each stays at
    its own. All environments of a workload together take every prompt before any comes again. Pickles and copies of
    replayed ones go on where the original stands.

    A text that ends is followed by another in the same step (`AutoresetMode.SAME_STEP`): the observation is that of the
    new text, and `infos` has the old one's as `final_obs`, an array of objects, with `final_info`. The entries
    `tokens`, `seconds`, `drafted`, `accepted` and `rounds` of `infos` are about the step, also where it ended a text;
    `remaining_acceptable` is about the draft that is observed. `final_info` has all these, and of the text that ended
    `total_tokens`, `total_seconds` and `throughput`.

    To decode chosen prompts once, for instance to evaluate: `reset(options={"prompt": indices})`, an index for each
    environment, into the prompts of its workload, or -1 for none. An environment whose text has ended then
    rests: it is not charged and emits nothing until the next `reset`; `resting` tells which do.

    Args:
        num_envs: environments, at least one for each operating point.
        workload: a name, or several; by default that of a given recording, or else `"tiny/prose"`.
        split: `"train"` or `"test"`; by default that of the given recordings, or else `"train"`.
        max_draft_length: tokens that a draft may have, 1 to 32; in replay at most what the traces hold.
        max_new_tokens: tokens of each text, at most; in replay at most what the traces hold.
        profile: a `LatencyProfile` or a file with one, for all workloads, one for each in order, or a mapping from
            their names; by default the reference profile of each workload's pair (`specgym.envs.profiles`), live that
            measured on this hardware.
        recording: for replay, a `Trace` or a file with one, one for each workload in order, or a mapping from their
            names; by default those that ship.
        batch_size: sequences decoded together, or several such numbers; the profiles must cover them.
        context: tokens read before, for the profiles; by default each one's own.
        rate: price of time in the beginning, for all operating points.
        decision_seconds: charged for every decision.
        backend: `"replay"`, the default, looks up recordings. `"live"` runs the models, all texts of a step in one
            batch, so that their passes are joined; time is charged by the profile, as if each text were alone.
        max_episode_steps: after how many steps an episode is cut; by default only the end of the text ends it.
        source: a second name of `backend`, for libraries that take a `backend` for themselves.
        render_mode: there is nothing to see; `"rgb_array"`, which some tools always ask for, shows nothing.
        decoder: name of a decoder whose draft goes on while the target verifies, for replays; `infos` then has `ready`.
        pre_verify: for such a decoder, as for `DraftLengthEnv`.

    Attributes:
        autoreset_mode: `AutoresetMode.SAME_STEP`, as in `metadata`.
        workload_names: names, in order.
        workload_of: each environment's workload, an index into them, shape (num_envs,).
        points: the operating points.
        point_of: each environment's operating point, an index into them, shape (num_envs,).
        prompt_counts: how many prompts each workload has, in order.

    Raises:
        ValueError: an argument is out of range; the message says which. `TraceError`, `WorkloadError` and
            `LatencyProfileError` are such errors.
    """

    meaning: ClassVar[str] = "0 (go on) or 1 (stop)"

    @constructor(tokens="max_new_tokens", trace="recording")
    def __init__(
        self,
        num_envs: int = 1,
        workload: Workloads = None,
        split: Split | None = None,
        max_draft_length: int = 16,
        max_new_tokens: int = 64,
        profile: Profiles = None,
        recording: Recordings = None,
        batch_size: int | Sequence[int] = 1,
        context: int | None = None,
        rate: float = 1.0,
        decision_seconds: float = 0.0,
        backend: BackendName | None = None,
        max_episode_steps: int | None = None,
        source: BackendName | None = None,
        render_mode: Literal["rgb_array"] | None = None,
        decoder: str | None = None,
        pre_verify: int | None = None,
    ) -> None:
        backend = self._check(num_envs, backend, source, max_episode_steps, render_mode, rate, decision_seconds)
        reads_on = overlapping(decoder, pre_verify, backend)
        max_draft_length, max_new_tokens = checked_lengths(max_draft_length, max_new_tokens)

        def charge(trace: Trace | None, named: Workload, value: Any, size: int) -> DraftCharges | OverlappedCharges:
            charged = profile_of(
                named, value, replayed=trace is not None, decoder=None if reads_on is None else decoder
            )
            return (DraftCharges if reads_on is None else OverlappedCharges).of(
                charged, max_draft_length, batch_size=size, context=context, decision_seconds=decision_seconds
            )

        find: Find = find_live if backend == "live" else find_trace
        places = OperatingPoints.find(workload, split, recording, profile, batch_size, find=find, charge=charge)
        batch_sizes = [point.batch_size for point in places.points]

        def begin(point_of: Indices) -> DraftBackend:
            traces, charges = [trace for trace in places.recordings if trace is not None], cast("Any", places.charges)
            if traces:
                table = DraftTable(traces, max_draft_length, max_new_tokens)
                if reads_on is not None:
                    return PipelinedDrafts(table, charges, batch_sizes, point_of, reads_on)
                return DraftReplay(table, charges, batch_sizes, point_of)
            from .live import LiveDrafts  # which imports torch; a replay needs none

            lengths = max_draft_length, max_new_tokens
            return LiveDrafts(places.workloads, charges, batch_sizes, point_of, *lengths)

        self._set_up(places, begin, FEATURES, 2)

    def _info(self, steps: DraftSteps) -> dict[str, NDArray[Any]]:
        info = super()._info(steps)
        if isinstance(self._drafts, PipelinedDrafts):
            info |= {"ready": self._drafts.ready.copy(), "_ready": np.ones(self.num_envs, np.bool_)}
        return info
