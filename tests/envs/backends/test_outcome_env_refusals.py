"""Refusals of environments that replay recorded outcomes, and the way out that they name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specgym.decoding import Pair
from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs import TokenPrompts, Workload
from specgym.envs.recordings.outcome_recorder import OutcomeSettings, record_outcomes
from specgym.envs.recordings.trace import Trace
from tests.helpers.recorded_outcomes import Recorded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 17}, r"the {decoder} outcomes of {workload} \(train\) have texts of 16 .*--tokens 17"),
        ({"decoder": "speculative"}, "the decoder asked for is speculative; give decoder='{decoder}', or record"),
        ({"decoder": "beam"}, "replays the decoders threshold, speculative, lookahead, .* by name, not 'beam'"),
        ({"split": "test"}, "has the train prompts of {workload}, not the test prompts"),
        ({"workload": "tiny-3m/code"}, "recorded from {workload}, and the workload asked for is tiny-3m/code"),
        ({"recording": "nowhere.npz"}, "there is no file of outcomes .*nowhere.npz"),
    ],
)
def test_what_was_not_recorded_is_refused(recorded: Recorded, arguments: dict[str, Any], message: str) -> None:
    expected = message.format(decoder=recorded.decoder, workload=recorded.workload.name)
    for attempt in (recorded.single, lambda **changes: recorded.many(2, **changes)):
        with pytest.raises(ValueError, match=expected):
            attempt(**arguments)


def test_outcomes_of_one_acceptance_do_not_replay_the_other(medusa: Recorded) -> None:
    with pytest.raises(ValueError, match="the decoder asked for is medusa-typical; give decoder='medusa', or record"):
        medusa.single(decoder="medusa-typical")


def test_ranges_beyond_what_was_recorded_are_refused(lookahead: Recorded) -> None:
    outcomes = lookahead.outcomes
    window, *others = outcomes.info.knobs
    narrow = replace(outcomes, info=replace(outcomes.info, knobs=(replace(window, low=0, high=12), *others)))
    for attempt in (lookahead.single, lambda **changes: lookahead.many(2, **changes)):
        with pytest.raises(ValueError, match=r"window goes from 1 to 16, .* recorded from 0 to 12; give narrower"):
            attempt(recording=narrow)
        attempt(recording=narrow, ranges={"window": (2, 10)}).reset(seed=0)


def test_a_trace_is_refused_and_the_way_to_record_outcomes_is_named(
    recorded: Recorded, toy_trace: Trace, tmp_path: Path
) -> None:
    message = rf"a trace replays the decoders threshold, speculative, pipelined .*--decoder {recorded.decoder}"
    with pytest.raises(ValueError, match=message):
        recorded.single(recording=toy_trace)
    toy_trace.save(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match=r"trace\.npz is no file of outcomes of this version"):
        recorded.single(recording=tmp_path / "trace.npz")


def test_traces_and_outcomes_do_not_mix(
    lookahead: Recorded, toy_trace: Trace, pair: Pair, profile: LatencyProfile, tmp_path: Path
) -> None:
    work = Workload(pair, TokenPrompts([[1, 2, 3]], [[11]], name="other"))
    settings = OutcomeSettings("threshold", settings=2, prompts=1, tokens=12, draft_length=4)
    result = record_outcomes(work, "train", tmp_path / "toy.npz", settings)
    changes = {"decoder": "threshold", "profile": profile, "max_new_tokens": 8}
    with pytest.raises(ValueError, match="all recordings must be traces, or all must be outcomes"):
        lookahead.many(2, recording=[toy_trace, result], max_draft_length=4, **changes)
    with pytest.raises(ValueError, match=r"max_draft_length is 16, and .* are of 4; .*--draft-length 16"):
        lookahead.many(2, recording=result, **changes)
