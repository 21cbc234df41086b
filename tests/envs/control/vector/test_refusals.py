"""Control of the draft length for many texts at once: bad arguments and actions."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest

from specgym.decoding.latency.profile import LatencyProfile
from specgym.envs.recordings.trace import Trace
from tests.helpers.drafted_together import CODE, PROSE, make


def test_a_step_before_the_first_reset_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before the first step"):
        make(traces, profile).step(np.ones(6, np.int64))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.ones(5, np.int64), r"actions have shape \(6,\), one for each environment, got \(5,\)"),
        (np.array([0, 1, 0, 2, 0, 0]), r"an action is 0 \(go on\) or 1 \(stop\), got 2"),
        (np.array([0, 1, 0, math.nan, 0, 0]), r"an action is 0 \(go on\) or 1 \(stop\), got nan"),
    ],
)
def test_bad_actions_are_refused(traces: dict[str, Trace], profile: LatencyProfile, actions: Any, message: str) -> None:
    env = make(traces, profile)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places": 1}, "unknown reset option 'places'; there are: prompt"),
        ({"prompt": [0, 1]}, r"reset option prompt has shape \(6,\)"),
        ({"prompt": np.full(6, 0.5)}, r"reset option prompt has shape \(6,\), an index for each"),
        ({"prompt": [0, 0, 0, 3, 0, 0]}, "tiny/code has prompts 0 to 2 .*, got 3"),
        ({"prompt": [-2, 0, 0, 0, 0, 0]}, "tiny/prose has prompts 0 to 4 .*, got -2"),
    ],
)
def test_bad_options_are_refused(
    traces: dict[str, Trace], profile: LatencyProfile, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(traces, profile).reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"tiny/chat": 1.0}, "there is no workload 'tiny/chat'; there are: tiny/prose, tiny/code"),
        ({CODE: -1.0}, "rate must be a finite number of at least 0"),
        ([1.0, math.nan], "rate must be a finite number of at least 0"),
        ([1.0, 2.0, 3.0], r"set_rates takes shape \(2,\)"),
    ],
)
def test_bad_rates_are_refused_and_change_nothing(
    traces: dict[str, Trace], profile: LatencyProfile, rates: Any, message: str
) -> None:
    env = make(traces, profile)
    with pytest.raises(ValueError, match=message):
        env.set_rates(rates)
    assert env.rates.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "live"}, "recording is for backend='replay'; the backend is 'live'"),
        ({"num_envs": 1}, "num_envs must be at least 2, one for each workload with each batch size, got 1"),
        ({"max_draft_length": 5}, r"drafts of 4 tokens, and max_draft_length is 5"),
        ({"max_draft_length": 0}, "max_draft_length must be a whole number from 1 to 32"),
        ({"max_new_tokens": 13}, "texts of 12 tokens, and max_new_tokens is 13"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be a whole number of at least 1, got 0"),
        ({"batch_size": []}, "batch_size must have at least 1 value"),
        ({"batch_size": [1, 1]}, "batch_size has 1 twice"),
        ({"batch_size": 64}, "has no point at batch size 64"),
        ({"workload": []}, "recording: there is no workload 'tiny/code'"),
        ({"workload": [PROSE, PROSE]}, "recording: there is no workload 'tiny/code'"),
        ({"profile": []}, "profile: 0 were given for 2 workloads"),
        ({"profile": {"tiny/chat": None}}, "profile: there is no workload 'tiny/chat'"),
        ({"split": "test"}, "not the test prompts"),
        ({"rate": -0.5}, "rate must be a finite number of at least 0"),
        ({"decision_seconds": -0.5}, "decision_seconds must be a finite number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(
    traces: dict[str, Trace], profile: LatencyProfile, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"traces": traces, "profile": profile, **arguments})


def test_one_trace_for_several_workloads_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match="recording: one was given for 2 workloads; give a mapping"):
        make(traces[PROSE], profile, workload=[PROSE, CODE])


def test_a_workload_named_twice_is_refused(traces: dict[str, Trace], profile: LatencyProfile) -> None:
    with pytest.raises(ValueError, match=r"workload must name one or more different workloads, got \['tiny/prose'"):
        make([traces[PROSE], traces[PROSE]], profile, workload=[PROSE, PROSE])
